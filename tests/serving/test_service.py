"""What the service answers is what the classifiers say offline, to the one who asked, whatever else goes on."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from qwen_vl_classifier import Example, ServeConfig
from qwen_vl_classifier.errors import (
    ArtifactError,
    ClosedError,
    ConfigError,
    DeadlineError,
    OutOfMemoryError,
    QueueFullError,
)
from qwen_vl_classifier.serving import service as service_module
from qwen_vl_classifier.serving.items import Item, ItemError, ItemResult
from qwen_vl_classifier.serving.models.panels import Probabilities, Scoring, ServedPanel
from qwen_vl_classifier.serving.models.registry import Registry
from qwen_vl_classifier.serving.observability.prometheus import Metrics
from qwen_vl_classifier.serving.service import Service
from tests.serving.batch_scorer import settle
from tests.serving.client import DecoderHere, Gate, Score, classify, picture
from tests.serving.clock import AGE, FOREVER, Clock
from tests.serving.saved_classifiers import NAMES, config_of, examples, files, item_of, ready, save_all
from tests.waiting import run, soon


@dataclass(frozen=True, slots=True)
class Lodgers:
    """Saved classifiers, and what they say of the examples offline: by name, the probabilities of shape (n, 2)."""

    folder: Path
    expected: dict[str, npt.NDArray[np.float64]]
    examples: list[Example] = field(default_factory=examples)


@pytest.fixture(scope="module")
def lodgers_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lodgers]:
    """Return a function that makes classifiers of a type of weights, once."""

    @functools.cache
    def make(dtype: str) -> Lodgers:
        folder = tmp_path_factory.mktemp(dtype)
        classifiers = save_all(folder, dtype)
        return Lodgers(folder, {name: one.predict_proba(examples()) for name, one in classifiers.items()})

    return make


@pytest.fixture
def exact(lodgers_of: Callable[[str], Lodgers]) -> Lodgers:
    return lodgers_of("float32")


@pytest.fixture
def decoded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "DecoderPool", DecoderHere)


class TestEquality:
    @pytest.mark.parametrize(
        ("dtype", "tolerance", "max_batch", "together"),
        [
            *(("float32", 1e-6, *way) for way in [(3, False), (64, True)]),
            ("bfloat16", 2e-3, 64, False),
            *(pytest.param("float32", 1e-6, *way, marks=pytest.mark.soak) for way in [(1, True), (64, False)]),
            pytest.param("bfloat16", 2e-3, 3, True, marks=pytest.mark.soak),
        ],
    )
    def test_answers_are_those_of_predict_proba(
        self, lodgers_of: Callable[[str], Lodgers], dtype: str, tolerance: float, max_batch: int, together: bool
    ) -> None:
        """Whether examples come in one request or in one each, all at once, and in whatever passes."""
        lodgers = lodgers_of(dtype)
        rows = list(range(len(lodgers.examples)))

        async def main() -> list[ItemResult | ItemError]:
            async with ready(config_of(lodgers.folder, max_batch=max_batch, max_batch_tokens=2000)) as service:
                asks = [item_of(example, uploaded=row % 2 == 0) for row, example in enumerate(lodgers.examples)]
                requests = [asks] if together else [[ask] for ask in asks]
                answers = await asyncio.gather(*(classify(service, request, NAMES) for request in requests))
                return [answer for one in answers for answer in one]

        answers = run(main())
        for row in rows:
            answer = answers[row]
            assert isinstance(answer, ItemResult)
            assert tuple(answer.probabilities) == NAMES
            for name in NAMES:
                np.testing.assert_allclose(
                    answer.probabilities[name], lodgers.expected[name][row], rtol=0, atol=tolerance
                )

    def test_only_those_who_are_asked_answer_and_tokens_count_once_for_each_backbone(self, exact: Lodgers) -> None:
        async def main() -> list[list[ItemResult | ItemError]]:
            async with ready(config_of(exact.folder)) as service:
                assert service.served.names == list(NAMES)
                asks = [item_of(example) for example in exact.examples]
                return list(
                    await asyncio.gather(
                        *(
                            classify(service, asks, models)
                            for models in (["last"], ["curved", "mean"], ["mean", "tuned"])
                        )
                    )
                )

        one, two, groups = run(main())
        for row in range(len(exact.examples)):
            answers = [one[row], two[row], groups[row]]
            assert [list(answer.probabilities) for answer in answers if isinstance(answer, ItemResult)] == [
                ["last"],
                ["curved", "mean"],
                ["mean", "tuned"],
            ]
            tokens = [answer.tokens for answer in answers if isinstance(answer, ItemResult)]
            assert tokens == [tokens[0], tokens[0], 2 * tokens[0]]

    def test_backbones_that_read_alike_have_pictures_resized_once(
        self, exact: Lodgers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from qwen_vl_classifier.backbone.processor import Processor

        resized: list[int] = []
        resize_pictures = Processor.resize_pictures

        def counted(processor: Processor, images: Sequence[Image.Image]) -> Any:
            resized.append(len(images))
            return resize_pictures(processor, images)

        async def main() -> None:
            async with ready(config_of(exact.folder, ["mean", "tuned"])) as service:
                monkeypatch.setattr(Processor, "resize_pictures", counted)
                await classify(service, [Item("a", (picture("red"),))] * 3, ["mean", "tuned"])

        run(main())
        assert resized == [1]


@pytest.mark.usefixtures("decoded_here")
class TestNobodyGetsAnothersAnswer:
    def test_a_hundred_at_once_with_failures_and_callers_who_leave(
        self, exact: Lodgers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.crowd(exact, monkeypatch, requests=100)

    @pytest.mark.soak
    def test_thousands(self, exact: Lodgers, monkeypatch: pytest.MonkeyPatch) -> None:
        for seed in range(1, 6):
            self.crowd(exact, monkeypatch, requests=1000, seed=seed)

    @staticmethod
    def crowd(lodgers: Lodgers, monkeypatch: pytest.MonkeyPatch, requests: int, seed: int = 0) -> None:
        """Item for random examples of random classifiers; each answer must be that of its own example and no other."""
        rng = random.Random(seed)
        for name in set(NAMES) - {"curved"}:  # to which, since it looks at pictures alone, texts are the same
            said = lodgers.expected[name][:, 1]
            assert np.min(np.abs(said[:, None] - said[None]) + np.eye(len(said))) > 1e-5, "a mix-up would not show"
        score = ServedPanel.score
        hurt: dict[str, type[Exception]] = {"bug": RuntimeError, "big": OutOfMemoryError}
        chance = random.Random(seed)

        def failing(group: ServedPanel, questions: Sequence[Scoring]) -> list[Probabilities]:
            for example, _ in questions:
                start, end = example.spans.text
                word = group.processor.tokenizer.decode(example.ids[start:end])
                if word in hurt:
                    raise hurt[word](word)
            if len(questions) > 1 and chance.random() < 0.1:
                raise RuntimeError("a failure that is no example's")
            return score(group, questions)

        bad = {
            "bug": (Item("bug"), "internal_error"),
            "big": (Item("big", (picture("red"),)), "out_of_memory"),
            "damaged": (Item("x", (picture("red")[:-20],)), "image_damaged"),
            "blank": (Item(" "), "invalid_item"),
        }

        async def one(service: Service) -> int:
            names = rng.sample(NAMES, rng.randint(1, len(NAMES)))
            chosen = [rng.choice([*range(len(lodgers.examples)), *bad]) for _ in range(rng.randint(1, 4))]
            asks = [bad[c][0] if isinstance(c, str) else item_of(lodgers.examples[c]) for c in chosen]
            leaves, steps = rng.random() < 0.3, rng.randint(0, 200)
            task = asyncio.create_task(classify(service, asks, names))
            if leaves:
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
            try:
                answers = await task
            except asyncio.CancelledError:
                return 0
            for choice, answer in zip(chosen, answers, strict=True):
                if isinstance(choice, str):
                    assert isinstance(answer, ItemError)
                    assert answer.code == bad[choice][1]
                else:
                    assert isinstance(answer, ItemResult), answer
                    assert list(answer.probabilities) == names
                    for name in names:
                        np.testing.assert_allclose(
                            answer.probabilities[name], lodgers.expected[name][choice], rtol=0, atol=1e-6
                        )
            return 1

        async def main() -> int:
            monkeypatch.setattr(ServedPanel, "score", failing)
            async with ready(config_of(lodgers.folder, max_batch=8, queue_size=10_000)) as service:
                answered = sum(await asyncio.gather(*(one(service) for _ in range(requests))))
                assert service.admission.requests == 0
                assert service.admission.held == 0
                return answered

        assert run(main()) > requests / 2


class TestItems:
    @pytest.mark.usefixtures("one_thread")  # the texts of one pass give the same numbers, bit by bit
    def test_what_is_wrong_with_an_example_stands_in_its_place(self, loaded: ServeConfig) -> None:
        good = Item("It is red.", (picture("red"),))
        bad = [
            (Item(" "), "invalid_item", 400),
            (Item("\ud800"), "invalid_item", 400),
            (Item("x" * 8001), "text_too_large", 413),
            (Item(" ".join(map(str, range(1000)))), "example_too_large", 413),
            (Item("x", ("AAAA",) * 9), "invalid_item", 400),
            (Item("x", (picture("red")[:-20],)), "image_damaged", 422),
            (Item("x", (picture("red", "GIF"),)), "image_format", 415),
            (Item("x", (picture("red", size=(201, 1)),)), "image_too_large", 413),
            (Item("x", ("https://example.org/secret.png",)), "image_refused", 422),
            (Item("x", (picture("red"), "/etc/secret")), "image_refused", 422),
            (ItemError("invalid_item", "as it was"), "invalid_item", 400),
        ]
        asks = [part for ask, _, _ in bad for part in (ask, good)]

        async def main() -> list[ItemResult | ItemError]:
            async with ready(replace(loaded, max_example_tokens=800)) as service:
                return await classify(service, asks, ["claims"])

        answers = run(main())
        (expected,) = {tuple(a.probabilities["claims"]) for a in answers if isinstance(a, ItemResult)}
        assert 0 < expected[1] < 1
        for place, (_, code, status) in enumerate(bad):
            error = answers[2 * place]
            assert isinstance(error, ItemError)
            assert (error.code, error.status) == (code, status)
            assert "secret" not in error.message
            assert isinstance(answers[2 * place + 1], ItemResult)

    def test_a_request_of_nothing_but_errors_is_answered(self, loaded: ServeConfig) -> None:
        async def main() -> list[ItemResult | ItemError]:
            async with ready(loaded) as service:
                assert await classify(service, [], ["claims"]) == []
                return await classify(service, [Item("")] * 2, ["claims"])

        assert [type(answer) for answer in run(main())] == [ItemError] * 2

    def test_what_is_not_a_number_is_never_an_answer(
        self, loaded: ServeConfig, scoring: Callable[[Score], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        scoring(lambda words: [float("nan") if word == "nan" else 0.25 for word in words])

        async def main() -> list[ItemResult | ItemError]:
            async with ready(loaded) as service:
                return await classify(service, [Item("a"), Item("nan"), Item("b")], ["claims"])

        first, error, last = run(main())
        assert isinstance(error, ItemError)
        assert error.code == "internal_error"
        assert "not a number" not in error.message
        assert "not a number" in caplog.text
        assert (
            first == last == ItemResult({"claims": (0.75, 0.25)}, first.tokens if isinstance(first, ItemResult) else 0)
        )

    def test_each_picture_of_a_request_is_decoded_once(
        self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second, third = files(3)
        seen: list[bytes] = []

        class Counting(DecoderHere):
            async def decode(self, data: bytes, seconds: float = 0) -> Image.Image:
                seen.append(data)
                return await super().decode(data)

        monkeypatch.setattr(service_module, "DecoderPool", Counting)

        async def main() -> None:
            async with ready(loaded) as service:
                seen.clear()  # the picture that warms up
                pairs = itertools.permutations([first, second, third], 2)
                asks = [Item(text, pair) for pair in pairs for text in ("one", "two")]
                answers = await classify(service, [*asks, Item("x", (first, first))], ["claims"])
                assert all(isinstance(answer, ItemResult) for answer in answers)
                assert service.admission.held == 0

        run(main())
        assert sorted(seen) == sorted([first, second, third])


class TestLimits:
    def test_pictures_beyond_the_memory_of_all_are_429_and_beyond_that_of_one_an_error(
        self, loaded: ServeConfig
    ) -> None:
        async def main() -> None:
            async with ready(replace(loaded, queue_bytes=100_000)) as service:
                with service.admission.admit() as other, service.admission.admit() as third:
                    other.hold(43_000)
                    third.hold(22_000)
                    with pytest.raises(QueueFullError, match="requests hold 65"):
                        await classify(service, [Item("a", (picture("red"),))], ["claims"])
                assert service.admission.held == 0
                # One that could not be answered if it were alone is told so, and its neighbour is not.
                items = [Item("a", (picture("red", size=(200, 100)),)), Item("b")]
                large, small = await classify(service, items, ["claims"])
                assert isinstance(large, ItemError)
                assert large.code == "image_too_large"
                assert isinstance(small, ItemResult)

        run(main())

    def test_a_deadline_holds_while_pictures_are_decoded(
        self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoding = asyncio.Event()

        class Slow(DecoderHere):
            async def decode(self, data: bytes, seconds: float = 0) -> Image.Image:
                decoding.set()
                await asyncio.Event().wait()
                return await super().decode(data)

        async def nothing(*_: Any) -> dict[str, Exception]:
            return {}

        monkeypatch.setattr(service_module, "DecoderPool", Slow)
        monkeypatch.setattr(Registry, "_warm_up", nothing)

        async def main() -> None:
            async with ready(replace(loaded, deadline=AGE)) as service:
                clock = Clock()
                task = asyncio.create_task(classify(service, [Item("a", (picture("red"),))], ["claims"]))
                await decoding.wait()
                clock.ahead += AGE
                with pytest.raises(DeadlineError):
                    await task
                (answer,) = await classify(service, [Item("a")], ["claims"])
                assert isinstance(answer, ItemResult)

        run(main())


class TestStates:
    def test_the_way_up_and_down(self, loaded: ServeConfig, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
        states: list[str] = []
        warm = asyncio.Event()

        async def wait(*_: Any) -> dict[str, Exception]:
            await warm.wait()
            return {}

        monkeypatch.setattr(Registry, "_warm_up", wait)

        async def main() -> None:
            service = Service(replace(loaded, grace=FOREVER), metrics=Metrics())
            states.append(service.state)
            loading = asyncio.create_task(service.load())
            await soon(lambda: service.state == "warming")
            states.append(service.state)
            warm.set()
            await loading
            states.append(service.state)
            task = asyncio.create_task(classify(service, [Item("a")], ["claims"]))
            await asyncio.to_thread(gate.entered.wait)
            service.drain()
            states.append(service.state)
            closing = asyncio.create_task(service.close())
            await settle()
            assert not closing.done(), "what was accepted is finished"
            gate.open.set()
            (answer,) = await task
            assert isinstance(answer, ItemResult)
            await closing

        run(main())
        assert states == ["loading", "warming", "ready", "draining"]

    def test_what_is_not_done_in_the_grace_period_is_told_so(self, loaded: ServeConfig, gate: Gate) -> None:
        async def main() -> None:
            service = Service(replace(loaded, grace=AGE), metrics=Metrics())
            await service.load()
            task = asyncio.create_task(classify(service, [Item("a")], ["claims"]))
            await asyncio.to_thread(gate.entered.wait)
            clock = Clock()
            closing = asyncio.create_task(service.close())
            await settle()
            assert not closing.done()
            clock.ahead += AGE
            await closing
            with pytest.raises(ClosedError):
                await task

        run(main())

    def test_the_first_pass_runs_before_anyone_is_let_in_and_has_a_picture(
        self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[int, int, tuple[str, ...]]] = []
        score = ServedPanel.score

        def watched(group: ServedPanel, questions: Sequence[Scoring]) -> list[Probabilities]:
            seen.extend((len(example.pictures.grids), threading.get_ident(), names) for example, names in questions)
            return score(group, questions)

        monkeypatch.setattr(ServedPanel, "score", watched)

        async def main() -> None:
            async with ready(loaded):
                pass

        run(main())
        ((pictures, thread, names),) = seen
        assert (pictures, names) == (1, ("claims",))
        assert thread != threading.get_ident()

    def test_a_classifier_that_gives_no_numbers_is_not_served(
        self, loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nan = float("nan")
        monkeypatch.setattr(ServedPanel, "score", lambda _group, questions: [{"claims": (nan, nan)} for _ in questions])
        failures: list[Exception] = []

        async def main() -> str:
            service = Service(loaded, metrics=Metrics(), on_failure=failures.append)
            await service.load()
            state = service.state
            await service.close()
            return state

        assert run(main()) == "failed"
        assert isinstance(failures[0], ArtifactError)

    def test_a_pass_that_hangs_is_noticed_once_no_caller_can_wait_for_it(self, loaded: ServeConfig, gate: Gate) -> None:
        async def main() -> None:
            async with ready(replace(loaded, deadline=0.05)) as service:
                assert service.stuck_seconds == 0
                with pytest.raises(DeadlineError):
                    await classify(service, [Item("a")], ["claims"])
                await soon(lambda: service.stuck_seconds > 0, "a pass that is stuck")
                gate.open.set()
                await soon(lambda: service.stuck_seconds == 0, "the end of the pass")

        run(main())

    @pytest.mark.parametrize(
        ("folders", "message"), [((), "no classifiers to serve"), (("a/x", "b/x"), "would both be served as 'x'")]
    )
    def test_what_cannot_be_served(self, folders: tuple[str, ...], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Service(ServeConfig(classifiers=folders), metrics=Metrics())

    def test_a_missing_folder_is_a_failure(self, tmp_path: Path) -> None:
        failures: list[Exception] = []

        async def main() -> None:
            service = Service(
                ServeConfig(classifiers=(str(tmp_path / "none"),)), metrics=Metrics(), on_failure=failures.append
            )
            await service.load()
            await service.close()

        run(main())
        assert isinstance(failures[0], ArtifactError)
