"""Compute curves over all thresholds, as plain numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.probabilities import log_odds, quantile_bins
from qwen_vl_classifier.classifier.ranking import Ranking
from qwen_vl_classifier.evaluation.metrics import Labels, Probabilities
from qwen_vl_classifier.training.uncertainty import wilson

_MOST_BINS = 20
_BIN_WIDTHS = (0.001, 0.002, 0.0025, 0.005, 0.01, 0.02, 0.025, 0.05)  # such that edges are short numbers
_MOST_POINTS = 200  # more than a plot can show; keeps the report of a million rows small


class Counts:
    """What is counted at each distinct probability as threshold.

    Attributes:
        thresholds: Falling, the first above every probability.
        hits: Rows of class 1 at or above each.
        alarms: Rows of class 0 at or above each.
    """

    def __init__(self, labels: Labels, probabilities: Probabilities) -> None:
        ranking = Ranking(probabilities, labels == 1)
        self.thresholds = np.append(np.inf, ranking.scores)
        self.hits, self.alarms = (np.append(0, counted.astype(np.int64)) for counted in ranking.counts())

    def at(self, threshold: float | npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return hits and alarms at other thresholds."""
        number = np.searchsorted(-self.thresholds, -np.asarray(threshold, dtype=np.float64), side="right") - 1
        return self.hits[number], self.alarms[number]


def curves(
    labels: Labels, probabilities: Probabilities, threshold: float, band: tuple[float, float] | None
) -> dict[str, Any]:
    """Compute all curves of a report.

    Args:
        labels: Shape (n,), 0 or 1, at least one.
        probabilities: Shape (n,), of class 1.
        threshold: Probability from which the answer is 1.
        band: Probabilities in which there is no answer, or `None`.

    Returns:
        `roc`, `pr`, `reliability`, `histogram`, `risk_coverage` and `cost`: see the functions of these names. `roc`
        and `pr` are `None` where only one class occurs.
    """
    counts = Counts(labels, probabilities)
    both = 0 < counts.hits[-1] < len(labels)
    return {
        "roc": roc(counts) if both else None,
        "pr": precision_recall(counts) if both else None,
        "reliability": reliability(labels, probabilities),
        "histogram": histogram(labels, probabilities, threshold),
        "risk_coverage": risk_coverage(labels, probabilities, threshold, band),
        "cost": cost(counts, threshold),
    }


def roc(counts: Counts) -> dict[str, list[float]]:
    """Return `false_positive_rate` and `true_positive_rate`, both rising from 0 to 1, and `threshold`, at most 1."""
    kept = _spread(len(counts.thresholds))
    return {
        "false_positive_rate": (counts.alarms[kept] / counts.alarms[-1]).tolist(),
        "true_positive_rate": (counts.hits[kept] / counts.hits[-1]).tolist(),
        "threshold": np.minimum(counts.thresholds[kept], 1.0).tolist(),
    }


def precision_recall(counts: Counts) -> dict[str, list[float]]:
    """Return `recall`, rising to 1, `precision` and `threshold` from the highest probability that occurs."""
    kept = 1 + _spread(len(counts.thresholds) - 1)
    hits, alarms = counts.hits[kept], counts.alarms[kept]
    return {
        "recall": (hits / counts.hits[-1]).tolist(),
        "precision": (hits / (hits + alarms)).tolist(),
        "threshold": counts.thresholds[kept].tolist(),
    }


def reliability(labels: Labels, probabilities: Probabilities) -> dict[str, list[float]]:
    """Compare probabilities with how often they came true, in bins of as many rows each.

    The bins are those of `expected_calibration_error`.

    Returns:
        For each bin that is not empty, in rising order: `probability` (its mean), `share` (of class 1), `low` and
        `high` (95 % interval of the share by Wilson) and `count`.
    """
    numbers = quantile_bins(probabilities)
    counts = np.bincount(numbers)
    used = counts > 0
    rows = counts[used]
    means = np.bincount(numbers, weights=probabilities)[used] / rows
    right = np.bincount(numbers, weights=labels)[used]
    limits = [wilson(float(k), int(n)) for k, n in zip(right, rows, strict=True)]
    return {
        "probability": means.tolist(),
        "share": (right / rows).tolist(),
        "low": [low for low, _ in limits],
        "high": [high for _, high in limits],
        "count": rows.tolist(),
    }


def histogram(labels: Labels, probabilities: Probabilities, threshold: float) -> dict[str, list[float]]:
    """Count the probabilities of each class in equally wide bins.

    Returns:
        `edges`, at most 21, from the lowest to the highest probability or threshold, rounded outwards to whole bins;
        and `class_0` and `class_1`, counts.
    """
    lowest, highest = (float(pick(probabilities, initial=threshold)) for pick in (np.min, np.max))
    for width in _BIN_WIDTHS:
        most = round(1 / width)
        first = min(math.floor(lowest / width), most - 1)
        last = min(max(math.ceil(highest / width), first + 1), most)
        if last - first <= _MOST_BINS:
            break
    edges = (np.arange(first, last + 1) * width).round(6)
    inside = np.clip(probabilities, edges[0], edges[-1])  # whatever rounding did
    counts = {f"class_{label}": np.histogram(inside[labels == label], bins=edges)[0].tolist() for label in (0, 1)}
    return {"edges": edges.tolist()} | counts


def risk_coverage(
    labels: Labels, probabilities: Probabilities, threshold: float, band: tuple[float, float] | None
) -> dict[str, Any]:
    """Return the error rate if only the most certain answers are given (El-Yaniv and Wiener, 2010, JMLR 11, section 2).

    Sure is what is far from the threshold in log odds, as in `abstention_band`.

    Returns:
        `coverage` (share of rows that are answered, rising to 1) and `risk` (share of these that is wrong); `area`, the
        mean risk over all coverages; and `stored`: `coverage` and `risk` with the classifier's own band, risk `None`
        where it answers nothing, or `None` without a band.
    """
    wrong = (probabilities >= threshold) != (labels == 1)
    errors, right = Ranking(np.abs(log_odds(probabilities) - log_odds(threshold)), wrong).counts()
    answered = errors + right
    risk = errors / answered
    kept = _spread(len(risk))
    stored = None
    if band is not None:
        decided = (probabilities < band[0]) | (probabilities > band[1])
        stored = {
            "coverage": float(decided.mean()),
            "risk": float(wrong[decided].mean()) if decided.any() else None,
            "band": list(band),
        }
    return {
        "coverage": (answered[kept] / len(labels)).tolist(),
        "risk": risk[kept].tolist(),
        "area": float(np.average(risk, weights=np.diff(answered, prepend=0))),
        "stored": stored,
    }


def cost(counts: Counts, threshold: float) -> dict[str, list[float]]:
    """Return what answers cost on average if a miss costs w and a false alarm 1 - w, for w from 0.01 to 0.99.

    Returns:
        `miss_weight`, the w; and mean costs per row: `stored` at the classifier's threshold, `calibrated` at 1 - w,
        the best threshold if probabilities are right (Elkan, 2001, "The foundations of cost-sensitive learning",
        equation 2), `best` at the threshold that is best on these very rows, and `trivial`, the cheaper of always and
        never answering 1.
    """
    weight = np.linspace(0.01, 0.99, 99)
    positives, negatives = int(counts.hits[-1]), int(counts.alarms[-1])
    rows = positives + negatives

    def price(hits: npt.NDArray[np.int64], alarms: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        paid: npt.NDArray[np.float64] = (weight * (positives - hits) + (1 - weight) * alarms) / rows
        return paid

    best = np.full(len(weight), np.inf)
    for start in range(0, len(counts.hits), 10_000):  # bounded memory
        hits, alarms = counts.hits[start : start + 10_000, None], counts.alarms[start : start + 10_000, None]
        best = np.minimum(best, price(hits, alarms).min(axis=0))
    return {
        "miss_weight": weight.tolist(),
        "stored": price(*counts.at(threshold)).tolist(),
        "calibrated": price(*counts.at(1 - weight)).tolist(),
        "best": best.tolist(),
        "trivial": (np.minimum(weight * positives, (1 - weight) * negatives) / rows).tolist(),
    }


def threshold_table(labels: Labels, probabilities: Probabilities, threshold: float) -> list[dict[str, float]]:
    """Count answers at many thresholds.

    Returns:
        At most 201 objects in rising order of `threshold`, with `tp`, `fp`, `fn` and `tn`: steps of 0.01 from 0 to 1,
        the classifier's own threshold, and quantiles of the probabilities, which resolve where they crowd.
    """
    crowded = np.quantile(probabilities, np.linspace(0, 1, 99), method="nearest")
    thresholds = np.unique(np.concatenate([np.linspace(0, 1, 101).round(2), crowded, [threshold]]))
    counts = Counts(labels, probabilities)
    hits, alarms = counts.at(thresholds)
    return [
        {
            "threshold": float(at),
            "tp": int(tp),
            "fp": int(fp),
            "fn": int(counts.hits[-1] - tp),
            "tn": int(counts.alarms[-1] - fp),
        }
        for at, tp, fp in zip(thresholds, hits, alarms, strict=True)
    ]


def _spread(points: int) -> npt.NDArray[np.int64]:
    """Return the numbers of at most 200 points, first and last among them."""
    return np.linspace(0, points - 1, min(points, _MOST_POINTS)).round().astype(np.int64)
