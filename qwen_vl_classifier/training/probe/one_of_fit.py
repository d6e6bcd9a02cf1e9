"""One of several classes: fit the temperature of their probabilities, and estimate how good they are on new rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupKFold

from qwen_vl_classifier.classifier.calibration import fit_one_of_temperature
from qwen_vl_classifier.classifier.probabilities import NEAREST, Float, log_loss_of_classes, one_of_probabilities
from qwen_vl_classifier.training.probe.estimate import FEW_GROUPS, HELD_OUT, INFLATION, SAMPLES
from qwen_vl_classifier.training.uncertainty import effective_rows, resampled, wilson

OUT_OF_FOLD = "cross-validation"
"""The method of an estimate that was measured on out-of-fold answers."""

_FOLDS = 5
_INTERVAL = (2.5, 97.5)  # per cent

Classes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ClassRows:
    """Rows of which the class is known, with answers.

    Attributes:
        shares: Shape (n, classes): of each class against the rest, or probabilities that sum to 1.
        classes: Shape (n,), the number of each row's class.
        weights: Shape (n,), above 0.
        groups: Shape (n,): rows of one number belong together.
    """

    shares: Float
    classes: Classes
    weights: Float
    groups: Classes

    def take(self, rows: npt.NDArray[np.int64]) -> ClassRows:
        """Return some of the rows."""
        return ClassRows(self.shares[rows], self.classes[rows], self.weights[rows], self.groups[rows])

    @property
    def log_loss(self) -> float:
        """The mean log loss of probabilities that sum to 1."""
        return log_loss_of_classes(self.shares, self.classes, weights=self.weights)


def cross_fitted(rows: ClassRows, seed: int) -> ClassRows:
    """Return the probabilities of the classes, by a temperature that was fitted on other groups than each row's.

    Args:
        rows: With out-of-fold answers of each class against the rest.
        seed: Of the folds.
    """
    number = min(_FOLDS, len(np.unique(rows.groups)))
    if number == 1:
        return replace(rows, shares=one_of_probabilities(rows.shares))
    found = np.empty_like(rows.shares)
    for others, own in GroupKFold(number, shuffle=True, random_state=seed).split(rows.shares, groups=rows.groups):
        temperature = fit_one_of_temperature(rows.shares[others], rows.classes[others], weights=rows.weights[others])
        found[own] = one_of_probabilities(rows.shares[own], temperature)
    return replace(rows, shares=found)


def one_of_estimate(
    rows: ClassRows,
    names: Sequence[str],
    *,
    held_out: bool,
    seed: int,
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """Measure probabilities of one of several classes on rows that they were not fitted on.

    The interval of the accuracy is Wilson's, of as many rows as the groups are worth. Those of macro-F1, the mean F1 of
    the classes that occur, and of the log loss are percentiles of draws of whole groups; that of macro-F1 reaches at
    least as far down as that of the accuracy, since draws cannot invent a mistake that was not made. Out-of-fold
    answers vary together by more than their groups tell, for which all are widened as in `search_estimate`.

    Args:
        rows: With probabilities that sum to 1.
        names: Of the classes.
        held_out: Whether the rows had no say at all, rather than being out of fold.
        seed: Of the draws.
        samples: Number of draws.

    Returns:
        `method`, `rows`, `groups`, `few` (whether the groups are too few to say much), `majority_accuracy` and
        `majority_class`, `prior_log_loss` (of giving each class its share), and for each of accuracy, macro_f1 and
        log_loss an object of `mean`, `low` and `high`, the ends of its 95 % interval.
    """
    shares, classes, weights, groups = rows.shares, rows.classes, rows.weights, rows.groups
    inflation = 1.0 if held_out else INFLATION
    numbers = np.arange(len(names))
    chosen = shares.argmax(axis=1)
    right = (chosen == classes).astype(np.float64)
    losses = -np.log(np.clip(shares[np.arange(len(classes)), classes], NEAREST, 1.0))
    is_class, is_chosen = classes[:, None] == numbers, chosen[:, None] == numbers

    def figures(weight: Float) -> tuple[Float, Float]:
        """Return macro-F1 and log loss by weights of shape (draws, n)."""
        hits, support, answers = (weight @ one for one in (is_class & is_chosen, is_class, is_chosen))
        with np.errstate(invalid="ignore"):
            each = np.where(support > 0, 2 * hits / (support + answers), np.nan)
        return np.nanmean(each, axis=1), weight @ losses / weight.sum(axis=1)

    accuracy = float(np.average(right, weights=weights))
    worth = effective_rows(right, weights, groups) / inflation
    low, high = wilson(accuracy * worth, worth)
    (macro,), (loss,) = figures(weights[None])
    drawn = [figures(weights * lines) for lines in resampled(groups, samples, seed=seed)]
    macros, log_losses = (np.concatenate(one) for one in zip(*drawn, strict=True))
    macro_low, macro_high = _interval(macros, macro, inflation)
    loss_low, loss_high = _interval(log_losses, loss, inflation)
    parts = np.bincount(classes, weights=weights, minlength=len(names)) / weights.sum()
    count = len(np.unique(groups))
    return {
        "method": HELD_OUT if held_out else OUT_OF_FOLD,
        "rows": len(classes),
        "groups": count,
        "few": count < FEW_GROUPS,
        "majority_accuracy": float(parts.max()),
        "majority_class": names[int(parts.argmax())],
        "prior_log_loss": -sum(part * math.log(part) for part in parts.tolist() if part),
        "accuracy": {"mean": accuracy, "low": low, "high": high},
        "macro_f1": {
            "mean": float(macro),
            "low": max(0.0, min(macro_low, float(macro) - (accuracy - low))),
            "high": min(1.0, macro_high),
        },
        "log_loss": {"mean": float(loss), "low": max(0.0, loss_low), "high": loss_high},
    }


def _interval(drawn: Float, value: float, inflation: float) -> tuple[float, float]:
    """Return percentiles of draws, their distance from the value widened as standard deviations are."""
    low, high = np.percentile(drawn, _INTERVAL)
    wider = math.sqrt(inflation)
    return float(value - wider * max(0.0, value - low)), float(value + wider * max(0.0, high - value))
