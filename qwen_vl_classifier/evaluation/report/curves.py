"""Curves of a report: plain numbers by scikit-learn's definitions, which know nothing of how they are drawn."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

Labels: TypeAlias = npt.NDArray[np.int64]
Probabilities: TypeAlias = npt.NDArray[np.float64]

_MOST_POINTS = 400  # more than a plot can show; keeps the report of a million rows small


def roc(labels: Labels, probabilities: Probabilities) -> dict[str, list[float]] | None:
    """Compute the ROC curve.

    Args:
        labels: Shape (n,), 0 or 1.
        probabilities: Shape (n,), of class 1.

    Returns:
        `false_positive_rate` and `true_positive_rate`, both rising from 0 to 1; `None` where only one class occurs.
    """
    if labels.min() == labels.max():
        return None
    false_positive, true_positive, _ = roc_curve(labels, probabilities)
    kept = np.linspace(0, len(false_positive) - 1, min(len(false_positive), _MOST_POINTS)).round().astype(int)
    return {
        "false_positive_rate": false_positive[kept].tolist(),
        "true_positive_rate": true_positive[kept].tolist(),
    }


def reliability(labels: Labels, probabilities: Probabilities, *, bins: int = 10) -> list[dict[str, Any]]:
    """Compare probabilities with how often they came true (Guo et al., 2017, arXiv:1706.04599, section 2).

    Args:
        labels: Shape (n,), 0 or 1.
        probabilities: Shape (n,), of class 1.
        bins: Number of equally wide bins of probability.

    Returns:
        For each bin that is not empty, in rising order: `probability` (mean of the bin), `share` (of class 1 in
        it) and `count`.
    """
    share, mean = calibration_curve(labels, probabilities, pos_label=1, n_bins=bins)
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]  # as calibration_curve has them
    counts = np.bincount(np.searchsorted(inner_edges, probabilities), minlength=bins)
    return [
        {"probability": float(p), "share": float(s), "count": int(count)}
        for p, s, count in zip(mean, share, counts[counts > 0], strict=True)
    ]


def histogram(labels: Labels, probabilities: Probabilities, *, bins: int = 20) -> dict[str, list[int]]:
    """Count the probabilities of each class in equally wide bins from 0 to 1.

    Args:
        labels: Shape (n,), 0 or 1.
        probabilities: Shape (n,), of class 1.
        bins: Number of bins.

    Returns:
        `class_0` and `class_1`: one count for each bin.
    """
    return {
        f"class_{label}": np.histogram(probabilities[labels == label], bins=bins, range=(0, 1))[0].tolist()
        for label in (0, 1)
    }
