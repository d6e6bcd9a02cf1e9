"""Models that several tests of the backbone share, each loaded once."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.backbone.adapters import add_adapter, write_adapter
from tests import nano
from tests.backbone.adapted import SETTINGS, load_exact, train
from tests.reference import load_reference


@pytest.fixture(scope="session")
def reference_model(nano_checkpoint: tuple[str, Path]) -> Callable[[torch.dtype], nn.Module]:
    """Return transformers' own model of the random checkpoint, in a type of number."""
    return functools.cache(lambda dtype: load_reference(*nano_checkpoint, dtype))


@pytest.fixture(scope="session")
def nano_backbone(nano_checkpoint: tuple[str, Path]) -> Callable[..., Backbone]:
    """Return the random checkpoint as a backbone, in a type of number and with so many layers (`None`: all)."""
    _, folder = nano_checkpoint
    return functools.cache(
        lambda dtype, num_layers=None: Backbone.load(folder, device="cpu", dtype=dtype, num_layers=num_layers)
    )


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint that nothing may change."""
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "sound")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of that checkpoint, to break."""
    return shutil.copytree(sound, tmp_path / "broken")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")


@pytest.fixture(scope="module")
def untouched(checkpoint) -> Backbone:
    """A backbone that no test changes."""
    return load_exact(checkpoint)


@pytest.fixture
def adapted(checkpoint) -> Backbone:
    backbone = load_exact(checkpoint)
    add_adapter(backbone, **SETTINGS)
    return train(backbone)


@pytest.fixture(scope="session")
def written(checkpoint, tmp_path_factory) -> Path:
    backbone = load_exact(checkpoint)
    add_adapter(backbone, **SETTINGS)
    folder = tmp_path_factory.mktemp("written") / "adapter"
    write_adapter(train(backbone), folder)
    return folder
