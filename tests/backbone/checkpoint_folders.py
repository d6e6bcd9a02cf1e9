"""Checkpoints to load, to change and to break."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.errors import CheckpointError, QwenVLClassifierError

TAPS = [Tap(1, "mean"), Tap(2, "last")]
EXAMPLES = [Example(Image.new("RGB", (84, 56), "red"), "a text"), Example(None, "no picture")]


def load(folder: Path | str, **options: Any) -> Backbone:
    return Backbone.load(folder, **{"device": "cpu", "dtype": "float32", **options})


def refusal(folder: Path | str, error: type[QwenVLClassifierError] = CheckpointError, **options: Any) -> str:
    """Return what is said of a folder: one line, without a heap of paths or a traceback."""
    with pytest.raises(error) as caught:
        load(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def message_of(action: Callable[[], object]) -> str:
    """Return what an action says in refusal, nothing where it went well."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; `None` takes one out."""
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
