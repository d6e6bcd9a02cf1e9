"""Changes while requests are in progress: each is answered by the version that was served when it came."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qwen_vl_classifier import Classifier, Example, ServeConfig, Tap
from qwen_vl_classifier.config.serve import ADMIN_KEY_VARIABLE
from qwen_vl_classifier.errors import ArtifactError, ConfigError
from qwen_vl_classifier.serving.items import Item, ItemResult
from qwen_vl_classifier.serving.models import registry
from qwen_vl_classifier.serving.models.panels import Probabilities, Scoring, ServedPanel
from qwen_vl_classifier.serving.observability.prometheus import Metrics
from qwen_vl_classifier.serving.service import Service
from tests.serving.client import DecoderHere, classify
from tests.serving.clock import PATIENT
from tests.serving.saved_classifiers import ready
from tests.waiting import run, soon

TEXT = "a claim"


class Passes:
    """Passes of the model, which can be held.

    Attributes:
        entered: Set once one has begun.
        open: They wait for it.
    """

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.open.set()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    passes, score = Passes(), ServedPanel.score

    def held(panel: ServedPanel, scorings: Sequence[Scoring]) -> list[Probabilities]:
        passes.entered.set()
        passes.open.wait()
        return score(panel, scorings)

    monkeypatch.setattr(ServedPanel, "score", held)
    monkeypatch.setattr("qwen_vl_classifier.serving.service.DecoderPool", DecoderHere)
    monkeypatch.setenv(ADMIN_KEY_VARIABLE, "key")
    yield passes
    passes.open.set()


@pytest.fixture
def no_chance() -> Iterator[None]:
    """Nothing is freed by garbage collection that happens to run."""
    gc.disable()
    yield
    gc.enable()


def variant(classifier: Classifier, layer: int, temperature: float) -> Classifier:
    other = copy.copy(classifier)
    other.tap, other.temperature = Tap(layer, "mean"), temperature
    return other


def probability(classifier: Classifier) -> float:
    return pytest.approx(classifier.predict_proba([Example(None, TEXT)])[0, 1], abs=1e-6)


async def ask(service: Service, name: str) -> float:
    (answer,) = await classify(service, [Item(TEXT)], [name])
    assert isinstance(answer, ItemResult)
    return answer.probabilities[name][1]


def config_of(folder: Path, **options: str) -> ServeConfig:
    return ServeConfig(device="cpu", **{"models_root": str(folder), **options}, **PATIENT)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_chance")
def test_who_came_before_is_answered_by_the_version_before_which_then_goes(
    tmp_path: Path, tiny_classifier: Classifier, passes: Passes
) -> None:
    """The new version reads deeper layers, so that it has a backbone of its own."""
    old, new = variant(tiny_classifier, 1, 1.0), variant(tiny_classifier, -1, 0.3)

    async def main() -> None:
        async with ready(config_of(tmp_path)) as service:
            assert service.served.names == []
            old.save(tmp_path / "claims")
            assert await service.registry.put("claims", None) == ("claims", True)
            version, layer = (
                service.served.versions["claims"],
                weakref.ref(service.served.models["claims"].backbone.model.get_submodule("visual.blocks.0")),
            )
            passes.open.clear()
            passes.entered.clear()
            first = asyncio.create_task(ask(service, "claims"))
            await soon(passes.entered.is_set)
            second = asyncio.create_task(ask(service, "claims"))
            await soon(lambda: service.batcher.waiting == 1)
            new.save(tmp_path / "claims")
            changing = asyncio.create_task(service.registry.put("claims", None))
            await soon(lambda: service.registry.pending == {"claims": "warming"}, "a version that is loaded meanwhile")
            assert service.served.versions["claims"] == version
            passes.open.set()
            assert await changing == ("claims", False)
            assert await first == await second == probability(old)
            assert service.served.versions["claims"] != version
            assert await ask(service, "claims") == probability(new)
            await soon(lambda: layer() is None, "the end of a backbone that nobody uses")

    run(main())


def test_a_classifier_is_removed_while_its_pass_runs(
    tmp_path: Path, tiny_classifier: Classifier, passes: Passes
) -> None:
    """Who asked before is answered; nobody waits for the pass to remove it."""
    tiny_classifier.save(tmp_path / "claims")

    async def main() -> None:
        async with ready(config_of(tmp_path, classifiers=(str(tmp_path / "claims"),))) as service:  # type: ignore[arg-type]
            passes.open.clear()
            passes.entered.clear()
            asking = asyncio.create_task(ask(service, "claims"))
            await soon(passes.entered.is_set)
            await service.registry.remove("claims")
            assert service.served.names == []
            passes.open.set()
            assert await asking == probability(tiny_classifier)
            with pytest.raises(LookupError):
                await service.registry.remove("claims")

    run(main())


def test_a_watched_folder_wins_over_requests(
    tmp_path: Path,
    tiny_classifier: Classifier,
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(registry, "POLL_SECONDS", 0.01)
    watched, root = tmp_path / "watched", tmp_path / "root"
    first, second = variant(tiny_classifier, 1, 1.0), variant(tiny_classifier, 1, 2.0)
    first.save(watched / "claims")
    second.save(root / "claims")
    second.save(root / "other")

    async def main() -> None:
        async with ready(config_of(root, watch=str(watched))) as service:
            assert service.served.names == ["claims"]
            with pytest.raises(ConfigError, match="the name is that of a classifier in the watched folder"):
                await service.registry.put("claims", None)
            with pytest.raises(ConfigError, match="remove its folder there"):
                await service.registry.remove("claims")
            await service.registry.put("other", None)
            first.save(watched / "other")
            await soon(lambda: service.registry.pending == {"other": "failed"}, "a name that is taken")
            assert await ask(service, "other") == probability(second)
            await service.registry.remove("other")
            await soon(lambda: "other" in service.served.names, "the classifier of the watched folder")
            assert await ask(service, "other") == probability(first)
            assert service.registry.pending == {}
            second.save(watched / "now")
            await service.registry.put(str(watched / "now"), None)
            version = service.served.versions["now"]
            first.save(watched / "now")
            await soon(lambda: service.served.versions["now"] != version, "a version that was followed")
            (watched / "a\nb").mkdir()
            (watched / "a\nb" / "classifier.json").write_text("{}")
            watched.rename(tmp_path / "away")
            await soon(lambda: "cannot be read" in caplog.text, "a look at a folder that is away")
            assert service.served.names == ["claims", "now", "other"], "nothing goes because a volume is away"

    run(main())


def test_what_is_broken_in_a_watched_folder_stops_no_start(
    tmp_path: Path, tiny_classifier: Classifier, passes: Passes
) -> None:
    tiny_classifier.save(tmp_path / "sound")
    (tiny_classifier.save(tmp_path / "broken") / "head.safetensors").write_bytes(b"half")

    async def main() -> None:
        async with ready(ServeConfig(device="cpu", watch=str(tmp_path), **PATIENT)) as service:
            assert service.served.names == ["sound"]
            assert service.registry.pending == {"broken": "failed"}

    run(main())

    async def listed() -> None:
        failures: list[Exception] = []
        config = ServeConfig(classifiers=(str(tmp_path / "broken"),), watch=str(tmp_path), device="cpu")
        service = Service(config, metrics=Metrics(), on_failure=failures.append)
        await service.load()
        await service.close()
        assert isinstance(failures[0], ArtifactError)

    run(listed())
