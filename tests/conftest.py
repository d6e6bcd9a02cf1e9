"""Fixtures that several folders of tests share. Nothing here, and no test, reaches the network."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: it reads this once

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.data.scenes import scene_examples
from tests import nano

# A shell that runs tests in the background has them ignore SIGINT, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="session", params=nano.FAMILIES)
def nano_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A random checkpoint of each family in turn: its `model_type` and its folder."""
    folder = tmp_path_factory.mktemp("nano") / request.param
    return request.param, nano.make_checkpoint(request.param, folder)


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
def _same_random_numbers() -> Iterator[None]:
    """Give every test the same random numbers, whatever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
