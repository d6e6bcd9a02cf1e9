"""Panels of untrained heads on the built-in backbone: everything but their accuracy is real."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen_vl_classifier import Backbone, Classifier, Panel, Tap
from qwen_vl_classifier.classifier.head import HeadSpec

LABELS = ("defect", "scratch", "dirty")
CLASSES = ("cat", "dog", "other animal")

_TAPS = (Tap(-1, "mean"), Tap(2, "last"), Tap(1, "image"))
_TEMPERATURES = (0.2, 0.1, 0.3)  # so that answers differ from 0.5


def make_panel(
    backbone: Backbone, names: Sequence[str] = LABELS, *, one_of: bool = False, temperature: float = 1.0, seed: int = 0
) -> Panel:
    """Make a panel whose labels have different taps, heads and thresholds; the second one sometimes abstains."""
    spec = HeadSpec("linear", backbone.hidden_size)
    classifiers = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, _ in enumerate(names):
            classifier = Classifier(
                backbone,
                _TAPS[number % 3],
                spec.build(),
                spec,
                temperature=_TEMPERATURES[number % 3],
                threshold=0.4 + number % 3 / 10,
                abstention=(0.45, 0.55) if number == 1 else None,
                label_names=("fine", "dirty") if number == 2 else ("0", "1"),
            )
            classifiers.append(classifier)
    return Panel(classifiers, names=names, one_of=one_of, temperature=temperature)
