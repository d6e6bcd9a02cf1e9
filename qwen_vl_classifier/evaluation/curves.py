"""Curves over all thresholds: plain numbers, which know nothing of how they are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.evaluation.metrics import Labels, Probabilities
from qwen_vl_classifier.training.uncertainty import wilson

_MOST_POINTS = 200  # more than a plot can show; keeps the report of a million rows small


class Ranking:
    """Rows from the highest probability to the lowest: what is counted at each distinct probability as threshold.

    Attributes:
        thresholds: Falling, the first above every probability.
        hits: Rows of class 1 at or above each.
        alarms: Rows of class 0 at or above each.
    """

    def __init__(self, labels: Labels, probabilities: Probabilities) -> None:
        order = np.argsort(-probabilities, kind="stable")
        falling, positive = probabilities[order], labels[order] == 1
        ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
        self.thresholds = np.append(np.inf, falling[ends])
        self.hits = np.append(0, np.cumsum(positive)[ends])
        self.alarms = np.append(0, np.cumsum(~positive)[ends])

    def at(self, threshold: float | npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return hits and alarms at other thresholds."""
        place = np.searchsorted(-self.thresholds, -np.asarray(threshold, dtype=np.float64), side="right") - 1
        return self.hits[place], self.alarms[place]


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
    ranking = Ranking(labels, probabilities)
    both = 0 < ranking.hits[-1] < len(labels)
    return {
        "roc": roc(ranking) if both else None,
        "pr": precision_recall(ranking) if both else None,
        "reliability": reliability(labels, probabilities),
        "histogram": histogram(labels, probabilities),
        "risk_coverage": risk_coverage(labels, probabilities, threshold, band),
        "cost": cost(ranking, threshold),
    }


def roc(ranking: Ranking) -> dict[str, list[float]]:
    """Return `false_positive_rate` and `true_positive_rate`, both rising from 0 to 1, and `threshold`, at most 1."""
    kept = _spread(len(ranking.thresholds))
    return {
        "false_positive_rate": (ranking.alarms[kept] / ranking.alarms[-1]).tolist(),
        "true_positive_rate": (ranking.hits[kept] / ranking.hits[-1]).tolist(),
        "threshold": np.minimum(ranking.thresholds[kept], 1.0).tolist(),
    }


def precision_recall(ranking: Ranking) -> dict[str, list[float]]:
    """Return `recall`, rising to 1, `precision` and `threshold` from the highest probability that occurs."""
    kept = 1 + _spread(len(ranking.thresholds) - 1)
    hits, alarms = ranking.hits[kept], ranking.alarms[kept]
    return {
        "recall": (hits / ranking.hits[-1]).tolist(),
        "precision": (hits / (hits + alarms)).tolist(),
        "threshold": ranking.thresholds[kept].tolist(),
    }


def reliability(labels: Labels, probabilities: Probabilities, *, bins: int = 10) -> dict[str, list[float]]:
    """Compare probabilities with how often they came true, in bins of as many rows each.

    The bins are those of `expected_calibration_error`: adaptive (Nguyen and O'Connor, 2015, arXiv:1508.05154, section
    3), equal probabilities in one bin.

    Returns:
        For each bin that is not empty, in rising order: `probability` (its mean), `share` (of class 1), `low` and
        `high` (95 % interval of the share by Wilson) and `count`.
    """
    place = np.searchsorted(np.quantile(probabilities, np.linspace(0, 1, bins + 1)[1:-1]), probabilities)
    counts = np.bincount(place, minlength=bins)
    used = counts > 0
    rows = counts[used]
    means = np.bincount(place, weights=probabilities, minlength=bins)[used] / rows
    right = np.bincount(place, weights=labels, minlength=bins)[used]
    limits = [wilson(float(k), int(n)) for k, n in zip(right, rows, strict=True)]
    return {
        "probability": means.tolist(),
        "share": (right / rows).tolist(),
        "low": [low for low, _ in limits],
        "high": [high for _, high in limits],
        "count": rows.tolist(),
    }


def histogram(labels: Labels, probabilities: Probabilities, *, bins: int = 20) -> dict[str, list[float]]:
    """Count the probabilities of each class in equally wide bins: `edges` from 0 to 1, `class_0` and `class_1`."""
    counts = {
        f"class_{label}": np.histogram(probabilities[labels == label], bins=bins, range=(0, 1))[0].tolist()
        for label in (0, 1)
    }
    return {"edges": np.linspace(0, 1, bins + 1).tolist()} | counts


def risk_coverage(
    labels: Labels, probabilities: Probabilities, threshold: float, band: tuple[float, float] | None
) -> dict[str, Any]:
    """Say how many answers are wrong if only the surest are given (El-Yaniv and Wiener, 2010, JMLR 11, section 2).

    Sure is what is far from the threshold in log odds, as in `abstention_band`.

    Returns:
        `coverage` (share of rows that are answered, rising to 1) and `risk` (share of these that is wrong); `area`, the
        mean risk over all coverages; and `stored`: `coverage` and `risk` with the classifier's own band, risk `None`
        where it answers nothing, or `None` without a band.
    """
    wrong = (probabilities >= threshold) != (labels == 1)
    distance = np.abs(_log_odds(probabilities) - _log_odds(np.array(threshold)))
    order = np.argsort(-distance, kind="stable")
    farthest = distance[order]
    ends = np.flatnonzero(np.append(farthest[1:] != farthest[:-1], True))
    answered = ends + 1
    risk = np.cumsum(wrong[order])[ends] / answered
    kept = _spread(len(ends))
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


def cost(ranking: Ranking, threshold: float) -> dict[str, list[float]]:
    """Say what answers cost on average if a miss costs w and a false alarm 1 - w, for w from 0.01 to 0.99.

    Returns:
        `miss_weight`, the w; and mean costs per row: `stored` at the classifier's threshold, `calibrated` at 1 - w,
        the best threshold if probabilities are right (Elkan, 2001, "The foundations of cost-sensitive learning",
        equation 2), `best` at the threshold that is best on these very rows, and `trivial`, the cheaper of always and
        never answering 1.
    """
    weight = np.linspace(0.01, 0.99, 99)
    positives, negatives = int(ranking.hits[-1]), int(ranking.alarms[-1])
    rows = positives + negatives

    def price(hits: npt.NDArray[np.int64], alarms: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        paid: npt.NDArray[np.float64] = (weight * (positives - hits) + (1 - weight) * alarms) / rows
        return paid

    best = np.full(len(weight), np.inf)
    for start in range(0, len(ranking.hits), 10_000):  # bounded memory
        hits, alarms = ranking.hits[start : start + 10_000, None], ranking.alarms[start : start + 10_000, None]
        best = np.minimum(best, price(hits, alarms).min(axis=0))
    return {
        "miss_weight": weight.tolist(),
        "stored": price(*ranking.at(threshold)).tolist(),
        "calibrated": price(*ranking.at(1 - weight)).tolist(),
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
    wanted = np.unique(np.concatenate([np.linspace(0, 1, 101).round(2), crowded, [threshold]]))
    ranking = Ranking(labels, probabilities)
    hits, alarms = ranking.at(wanted)
    return [
        {
            "threshold": float(at),
            "tp": int(tp),
            "fp": int(fp),
            "fn": int(ranking.hits[-1] - tp),
            "tn": int(ranking.alarms[-1] - fp),
        }
        for at, tp, fp in zip(wanted, hits, alarms, strict=True)
    ]


def _spread(points: int) -> npt.NDArray[np.int64]:
    """Return the numbers of at most 200 points, first and last among them."""
    return np.linspace(0, points - 1, min(points, _MOST_POINTS)).round().astype(np.int64)


def _log_odds(probability: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    tiny = np.finfo(np.float64).eps
    p = np.clip(probability, tiny, 1 - tiny)
    odds: npt.NDArray[np.float64] = np.log(p) - np.log1p(-p)
    return odds
