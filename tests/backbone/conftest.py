"""Models that several tests of the backbone share, each loaded once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qwen_vl_classifier import Backbone
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
