"""Fixtures that several folders of tests share. Processes that only hand out tests do not import this, nor torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, ServeConfig, Tap
from qwen_vl_classifier.backbone import devices
from qwen_vl_classifier.backbone.layers import varlen
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.scenes.statements import scene_examples
from tests import nano
from tests.backbone.layers import varlen_definition
from tests.fresh import FreshProcesses

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    """The built-in backbone, in float32 on the CPU."""
    return Backbone.load("builtin:tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny_classifier(tiny_backbone: Backbone) -> Classifier:
    """A classifier whose head is untrained: everything but its accuracy is real."""
    spec = HeadSpec("mlp", tiny_backbone.hidden_size, units=512, dropout=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = spec.build()
    return Classifier(tiny_backbone, Tap(-1, "mean"), head, spec)


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the random checkpoint of a family, by its `model_type`; nothing may change it."""
    place = tmp_path_factory.mktemp("nano")
    return functools.cache(lambda family: nano.make_checkpoint(family, place / family))


@pytest.fixture(scope="session", params=nano.FAMILIES)
def nano_checkpoint(request: pytest.FixtureRequest, nano_folder: Callable[[str], Path]) -> tuple[str, Path]:
    """A random checkpoint of each family in turn: its `model_type` and its folder."""
    return request.param, nano_folder(request.param)


@pytest.fixture(scope="session", params=nano.KINDS)
def kind_checkpoint(request: pytest.FixtureRequest, nano_folder: Callable[[str], Path]) -> tuple[str, Path]:
    """A random checkpoint of each kind in turn, for tests of what all families of a kind share."""
    return request.param, nano_folder(request.param)


@pytest.fixture(scope="session")
def mixed_examples() -> list[Example]:
    """Examples of every form: several sizes, shared pictures, two pictures, none, and hostile text."""
    rng = np.random.default_rng(0)

    def noise(width: int, height: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    first, second, third = noise(120, 90), noise(60, 150), noise(224, 200)
    return [
        Example(first, "hello world"),
        Example(first, "another, longer text about it <|image_pad|><|im_end|>"),
        Example(second, "x"),
        Example((first, second), "two pictures"),
        Example(None, "no picture at all"),
        Example(third, "There is 1 tower with at least 2 yellow blocks."),
        Example(first, "the third text about the same picture"),
        Example((second, first), "two pictures"),
    ]


@pytest.fixture(scope="session")
def scene_rows() -> list[Example]:
    """Labelled examples on scenes of the test split, two of each picture."""
    return [
        Example(picture, line.text, line.label, fields={"kind": line.kind})
        for picture, _, lines in scene_examples("test", scenes=40, per_scene=2)
        for line in lines
    ]


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcesses]:
    """Processes that share nothing with the tests, for what has to hold after a restart or to survive a kill."""
    processes = FreshProcesses(tmp_path_factory.mktemp("fresh") / "errors.txt")
    yield processes
    processes.close()


@pytest.fixture
def scores_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score without processes of workers, each of which imports torch; `tests/scoring/test_kills.py` has real ones."""
    from qwen_vl_classifier.scoring import local
    from qwen_vl_classifier.scoring.jobs import Task, job_to_json
    from qwen_vl_classifier.scoring.workers import job_from_json

    def run(
        job: Any,
        todo: Any,
        config: Any,
        on_report: Callable[[Any], None],
        should_stop: Callable[[], bool],
        on_rows: Callable[[int], object],
    ) -> None:
        sent = job_from_json(json.loads(json.dumps(job_to_json(job))))
        for report in sent.worker().run_all(map(Task, todo)):
            on_report(report)
            if should_stop():
                return

    monkeypatch.setattr(local, "run", run)


@pytest.fixture
def blank_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write empty files in place of the plots of a report, which take a second to draw."""

    def names(evaluation: dict[str, Any]) -> dict[str, bytes]:
        drawn = ["confusion", *(name for name, curve in evaluation["curves"].items() if curve is not None)]
        return {f"{name}.{kind}": b"" for name in drawn for kind in ("png", "svg")}

    monkeypatch.setattr("qwen_vl_classifier.evaluation.report.draw_plots", names)


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Return the folder of a real data set, or skip where it is not on this machine."""

    def find(name: str) -> Path:
        folder = SHARED_DATA / name
        if not folder.is_dir():
            pytest.skip(f"the real data set {name} is not on this machine")
        return folder

    return find


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute in one thread, for tests that compare bit by bit.

    How many threads share a matrix product, and with it the order of its sums, depends on the machine's load.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut batches alike on every machine: where memory is short, they follow what is free of it, and last bits too."""
    monkeypatch.setattr(devices, "free_memory", lambda _: 10**12)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Give every test the same random numbers, whatever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> Iterator[str]:
    """The address of a server of one classifier, called my_classifier; it has no key and keeps nothing.

    It runs in this process, so it ends with the module: tests elsewhere change what it rests on.
    """
    from tests.serving.clock import PATIENT  # here, since most tests need no server
    from tests.serving.served import listening

    folder = tiny_classifier.save(tmp_path_factory.mktemp("server") / "my_classifier")
    with listening(ServeConfig(classifiers=(str(folder),), device="cpu", **PATIENT)) as url:
        yield url


@pytest.fixture
def varlen_anywhere(monkeypatch) -> None:
    """Let attention of many lengths run on any device, by its definition."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_definition.varlen_attn)
    monkeypatch.setattr(varlen, "may_run", lambda *_: True)
    varlen.proven_attention.cache_clear()
    varlen_definition.calls.clear()
