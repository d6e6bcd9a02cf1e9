"""A small start for tests of fine-tuning, and ways to compare what came of it."""

from __future__ import annotations

from dataclasses import replace

import torch

from qwen_vl_classifier import Backbone, Classifier, FinetuneConfig, Tap
from qwen_vl_classifier.classifier.head import HeadSpec
from tests.coloured_pictures import pictures

FULL = FinetuneConfig(
    method="full", towers="all", learning_rate=1e-3, head_learning_rate=1e-2, epochs=2, batch_size=8, warmup=0
)
LORA = replace(FULL, method="lora", rank=4, adapter_dropout=0.0)
NOTHING = replace(FULL, learning_rate=1e-30, head_learning_rate=1e-30, weight_decay=0, epochs=1)

ROWS, VALIDATION = pictures(16, seed=1), pictures(12, seed=2)
LABELS = [row.label for row in VALIDATION]


def start_at(backbone: Backbone, tap: Tap, *, dropout: float = 0.1, **options) -> Classifier:
    spec = HeadSpec("mlp", backbone.hidden_size, units=8, dropout=dropout)
    torch.manual_seed(0)
    return Classifier(backbone, tap, spec.build(), spec, **options)


def snapshot(classifier: Classifier) -> dict[str, torch.Tensor]:
    weights = {**classifier.backbone.model.state_dict(), **classifier.head.state_dict()}
    return {name: tensor.clone() for name, tensor in weights.items()}


def assert_same(seen: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert seen.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(seen[name], tensor), name
