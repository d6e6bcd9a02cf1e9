"""A backbone with an adapter, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen_vl_classifier import Backbone, Tap
from qwen_vl_classifier.backbone.checkpoint.adapter_layout import adapter_weights

LAST = Tap(-1, "mean")
TAPS = [Tap(1, "mean"), Tap(3, "text"), LAST, Tap(-1, "last")]
SETTINGS = {"towers": "llm+vision", "tap": LAST, "rank": 4, "alpha": 8.0, "dropout": 0.1}


def load_exact(folder: Path, **options) -> Backbone:
    return Backbone.load(folder, **{"device": "cpu", "dtype": "float32", **options})


def train(backbone: Backbone, seed: int = 1) -> Backbone:
    """Give the adapter weights as if it had trained."""
    generator = torch.Generator().manual_seed(seed)
    for weight in adapter_weights(backbone.model, backbone.adapter).values():
        weight.data += torch.randn(weight.shape, generator=generator) * 0.1
    backbone.mark_changed()
    return backbone
