"""Classifiers to explain, and what the parts of an explanation add up to."""

import numpy as np

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.classifier.head import HeadSpec

TAPS = [Tap(-1, "mean"), Tap(2, "image"), Tap(3, "text"), Tap(-1, "last")]
TEXT = "There are at least two red circles."


def make_classifier(
    backbone: Backbone, tap: Tap, kind: str = "linear", temperature: float = 1.0, **options
) -> Classifier:
    spec = HeadSpec(kind, backbone.hidden_size, units=32 if kind == "mlp" else 0)
    return Classifier(backbone, tap, spec.build(), spec, temperature=temperature, **options)


def total(explanation) -> float:
    """Add up all contributions."""
    pictures = sum(float(grid.sum()) for grid in explanation.patches)
    return pictures + sum(value for _, value in explanation.words) + explanation.template


def log_odds_of(classifier: Classifier, example: Example) -> float:
    negative, positive = classifier.predict_proba([example])[0]
    return float(np.log(positive / negative))
