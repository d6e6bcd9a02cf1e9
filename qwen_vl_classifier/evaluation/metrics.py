"""Numbers from labels and probabilities, by scikit-learn's definitions, for many weightings of the rows at once.

A bootstrap resample is a weighting: how often each row was drawn. So one piece of code gives both the value (every
row weighs 1) and its resamples (`intervals.py`), and they cannot disagree.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.probabilities import NEAREST, quantile_bins
from qwen_vl_classifier.classifier.ranking import Ranking, area_under_roc

Labels: TypeAlias = npt.NDArray[np.int64]
Probabilities: TypeAlias = npt.NDArray[np.float64]
Weights: TypeAlias = npt.NDArray[np.float64]

METRICS = (
    "accuracy",
    "balanced_accuracy",
    "precision_1",
    "recall_1",
    "f1_1",
    "precision_0",
    "recall_0",
    "f1_0",
    "mcc",
    "auroc",
    "average_precision",
    "log_loss",
    "brier",
    "ece",
)
"""All metrics in the order in which they are shown; `_0` and `_1` name the class that is looked for."""

LOWER_IS_BETTER = frozenset({"log_loss", "brier", "ece"})


class Measure:
    """The metrics of one set of labels and probabilities, as a function of the rows' weights.

    Args:
        labels: Shape (n,), 0 or 1, at least one.
        probabilities: Shape (n,), of class 1.
        threshold: Probability from which the answer is 1.
        answered: Which rows are answered with 1, shape (n,), where that does not follow from the threshold.

    Attributes:
        positive: Which rows are of class 1, shape (n,).
        probabilities: As given.
        threshold: As given.
        answered: Which rows are answered with 1, shape (n,).
        shares: Those metrics that are a share of rows, each with these rows, shape (n,).
    """

    def __init__(
        self,
        labels: Labels,
        probabilities: Probabilities,
        threshold: float,
        answered: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels) == 1
        answered = p >= threshold if answered is None else answered
        self.positive, self.probabilities, self.threshold, self.answered = y, p, threshold, answered
        surprise = -np.log(np.clip(np.where(y, p, 1 - p), NEAREST, 1 - NEAREST))
        numbers = quantile_bins(p)
        in_bin = numbers[:, None] == np.arange(numbers.max() + 1)
        columns = [answered & y, answered & ~y, ~answered & y, ~answered & ~y, surprise, (p - y) ** 2]
        self.shares = {
            "accuracy": np.ones(len(p), dtype=np.bool_),
            "precision_1": answered,
            "recall_1": y,
            "precision_0": ~answered,
            "recall_0": ~y,
        }
        # What is a sum over rows: one matrix product gives it for all weightings.
        self._sums = np.column_stack([*columns, in_bin * (p - y)[:, None]]).astype(np.float64)
        self._ranking = Ranking(p, y)

    def __call__(self, weights: Weights) -> dict[str, npt.NDArray[np.float64]]:
        """Compute all metrics.

        Args:
            weights: Shape (m, n), not negative, each line with some weight: of each row in each of m weightings.

        Returns:
            By name, in the order of `METRICS`, shape (m,). NaN where the rows lack what a metric is about: AUROC with
            one class only; average precision without class 1; recall and F1 of a class that does not occur. Precision
            of a class that is never answered is 0, and so is an MCC without variation, as in scikit-learn.
        """
        sums = weights @ self._sums
        tp, fp, fn, tn, surprise, squares = sums.T[:6]
        total = tp + fp + fn + tn
        with np.errstate(invalid="ignore", divide="ignore"):
            recall_1, recall_0 = tp / (tp + fn), tn / (tn + fp)
            spread = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
            found = {
                "accuracy": (tp + tn) / total,
                "balanced_accuracy": np.where(
                    np.isnan(recall_0), recall_1, np.where(np.isnan(recall_1), recall_0, (recall_0 + recall_1) / 2)
                ),
                "precision_1": np.where(tp + fp > 0, tp / (tp + fp), 0.0),
                "recall_1": recall_1,
                "f1_1": np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan),
                "precision_0": np.where(tn + fn > 0, tn / (tn + fn), 0.0),
                "recall_0": recall_0,
                "f1_0": np.where(tn + fp > 0, 2 * tn / (2 * tn + fp + fn), np.nan),
                "mcc": np.where(spread > 0, (tp * tn - fp * fn) / spread, 0.0),
            }
            hits, alarms = self._ranking.counts(weights)
            found["auroc"] = area_under_roc(hits, alarms)
            found["average_precision"] = _average_precision(hits, alarms)
        found["log_loss"] = surprise / total
        found["brier"] = squares / total
        found["ece"] = np.abs(sums[:, 6:]).sum(axis=1) / total
        return found


def _average_precision(hits: Weights, alarms: Weights) -> Weights:
    """Return the mean precision over all recalls, from counts of shape (m, steps); NaN without class 1."""
    everyone = hits + alarms
    precision = np.divide(hits, everyone, out=np.zeros_like(hits), where=everyone > 0)
    average: Weights = (np.diff(hits, prepend=0.0) * precision).sum(axis=1) / hits[:, -1]
    return average


def compute_metrics(labels: Labels, probabilities: Probabilities, threshold: float = 0.5) -> dict[str, float | None]:
    """Compute the metrics of a binary classifier.

    Args:
        labels: Shape (n,), 0 or 1, at least one.
        probabilities: Shape (n,), of class 1.
        threshold: Probability from which the predicted label is 1.

    Returns:
        The value of each of `METRICS`; `None` where the rows lack what it is about, see `Measure`.
    """
    found = Measure(labels, probabilities, threshold)(np.ones((1, len(labels))))
    return {name: plain(float(value[0])) for name, value in found.items()}


def confusion(labels: Labels, probabilities: Probabilities, threshold: float) -> dict[str, int]:
    """Count answers by what was right: `true_positive`, `false_positive`, `false_negative` and `true_negative`."""
    answered, positive = probabilities >= threshold, labels == 1
    return {
        "true_positive": int((answered & positive).sum()),
        "false_positive": int((answered & ~positive).sum()),
        "false_negative": int((~answered & positive).sum()),
        "true_negative": int((~answered & ~positive).sum()),
    }


def baselines(labels: Labels) -> dict[str, dict[str, float | None]]:
    """Compute the same metrics for two classifiers that ignore pictures and texts.

    Args:
        labels: Shape (n,), 0 or 1, at least one.

    Returns:
        `majority`, which is sure of the more frequent label, so that its log loss is infinite and given as `None`; and
        `prior`, which gives every row the share of class 1 and answers the more frequent label (scikit-learn's
        DummyClassifier, strategies "most_frequent" and "prior"). Both know the labels' shares of these very rows.
    """
    share = float(np.mean(labels))
    answer = float(share >= 0.5)
    majority = compute_metrics(labels, np.full(len(labels), answer))
    if 0 < share < 1:
        majority["log_loss"] = None
    # The threshold that makes a constant the majority's answer.
    prior = compute_metrics(labels, np.full(len(labels), share), threshold=0.0 if answer else 2.0)
    return {"majority": majority, "prior": prior}


def plain(value: float) -> float | None:
    """Return a number that JSON can hold: `None` for NaN."""
    return None if np.isnan(value) else value


def rounded(value: float | None, digits: int = 3) -> str:
    """Write a value for a table; "n/a" where there is none."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def interval_json(value: float | None, low: float, high: float) -> dict[str, Any]:
    """Return value, low and high by name; no bounds where there is no value."""
    known = value is not None
    return {"value": value, "low": plain(low) if known else None, "high": plain(high) if known else None}
