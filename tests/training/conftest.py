"""What several modules here start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_vl_classifier import Backbone, Classifier, Tap, finetune
from tests import nano
from tests.tuning import FULL, ROWS, VALIDATION, start_at


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")


@pytest.fixture(scope="module")
def start(checkpoint) -> Classifier:
    return start_at(
        Backbone.load(checkpoint, device="cpu", dtype="float32"),
        Tap(3, "mean"),
        threshold=0.4,
        abstention=(0.3, 0.5),
        label_names=("blue", "red"),
        training={"method": "none"},
    )


@pytest.fixture(scope="module")
def result(start):
    """The start, all of it trained."""
    return finetune(start, ROWS, VALIDATION, config=FULL, progress=False)
