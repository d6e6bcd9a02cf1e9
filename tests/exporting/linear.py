"""Classifiers with linear heads, for tests of `export`."""

from __future__ import annotations

from typing import Any

import torch

from qwen_vl_classifier import Backbone, Classifier, Tap
from qwen_vl_classifier.classifier.head import HeadSpec


def linear_classifier(backbone: Backbone, tap: str, *, temperature: float = 0.37, **options: Any) -> Classifier:
    """Return a classifier whose probabilities differ from example to example."""
    spec = HeadSpec("linear", backbone.hidden_size)
    head = spec.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.05)
        head.bias.copy_(torch.tensor([0.3, -0.2]))
    return Classifier(backbone, Tap.parse(tap), head, spec, temperature=temperature, **options)
