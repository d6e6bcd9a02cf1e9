"""Figures of a choice of one class among several: accuracy, log loss, calibration, and which classes are confused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.probabilities import NEAREST, quantile_bins
from qwen_vl_classifier.evaluation.intervals import Draws, bounds
from qwen_vl_classifier.evaluation.metrics import Labels, Probabilities, Weights, interval_json, plain
from qwen_vl_classifier.evaluation.panels.label_figures import share_interval
from qwen_vl_classifier.training.uncertainty import shown_skill

MOST_CONFUSED = 20
"""Pairs of classes that an evaluation lists."""

MOST_ROWS = 12
"""Rows that it names of each pair."""


class ClassMeasure:
    """Accuracy, log loss and calibration error of a choice among classes, as a function of the weights of all rows.

    Args:
        classes: Shape (n,), numbers of classes, at least one; `MISSING` where the class is not known.
        probabilities: Shape (n, classes), each line summing to 1.

    Attributes:
        rows: Numbers of the rows whose class is known, shape (k,).
        classes: Their classes, shape (k,).
        answers: The likeliest class of each, shape (k,).
    """

    def __init__(self, classes: Labels, probabilities: Probabilities) -> None:
        self.rows = np.flatnonzero(classes >= 0)
        self.classes, known = classes[self.rows], probabilities[self.rows]
        self.answers = known.argmax(axis=1)
        every = np.arange(len(self.rows))
        top = known[every, self.answers]
        right = self.answers == self.classes
        numbers = quantile_bins(top)
        in_bin = numbers[:, None] == np.arange(numbers.max() + 1)
        surprise = -np.log(np.clip(known[every, self.classes], NEAREST, 1.0))
        self._sums = np.column_stack([np.ones(len(right)), right, surprise, in_bin * (top - right)[:, None]])

    def __call__(self, weights: Weights) -> Draws:
        """Compute `accuracy`, `log_loss`, and `ece`, the calibration error of the likeliest class's probability.

        The bins are those of `expected_calibration_error`. NaN where no row of a known class has weight.
        """
        sums = weights[:, self.rows] @ self._sums
        total = sums[:, 0]
        with np.errstate(invalid="ignore"):
            return {
                "accuracy": sums[:, 1] / total,
                "log_loss": sums[:, 2] / total,
                "ece": np.abs(sums[:, 3:]).sum(axis=1) / total,
            }


def class_figures(
    measure: ClassMeasure,
    draws: Draws,
    names: Sequence[str],
    groups: npt.NDArray[np.int64],
    *,
    rows: int,
    macro: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the figures of a choice among classes.

    Args:
        measure: Of the rows.
        draws: As `bootstrap` gives them.
        names: Of the classes.
        groups: Shape (n,), numbers of groups.
        rows: How many rows there are, those of no known class included.
        macro: The mean figures over classes, as `measure_labels` gives them.

    Returns:
        `metrics`: `accuracy`, `log_loss` and `ece` by `value`, `low` and `high`; `baselines`: `majority` (`class`,
        `accuracy`, `macro_f1`) and `prior` (`log_loss`); `skill` as in `shown_skill`; `confusion`: counts, a line for
        each class of the rows and a column for each answer; and `confused`: at most 20 pairs of classes, `label` and
        `answer`, the most frequent first, with `count`, `share` of the rows of that class, and `rows`, at most 12.
    """
    found = {name: plain(float(value[0])) for name, value in measure(np.ones((1, rows))).items()}
    metrics = {"accuracy": share_interval(found["accuracy"], draws["accuracy"], groups[measure.rows])}
    for name in ("log_loss", "ece"):
        low, high = bounds(draws[name])
        value = found[name]
        metrics[name] = interval_json(value, low if name != "ece" or value is None else min(low, value), high)
    count = len(names)
    table = np.zeros((count, count), dtype=np.int64)
    np.add.at(table, (measure.classes, measure.answers), 1)
    support = table.sum(axis=1)
    shares = support / support.sum()
    occur = shares[support > 0]
    largest = int(support.argmax())
    prior_loss = float(-(occur * np.log(occur)).sum())
    return {
        "rows": len(measure.rows),
        "metrics": metrics,
        "baselines": {
            "majority": {
                "class": names[largest],
                "accuracy": float(shares[largest]),
                # Of the class that is always answered 2s / (1 + s), of all others 0.
                "macro_f1": float(2 * shares[largest] / (1 + shares[largest]) / len(occur)),
            },
            "prior": {"log_loss": prior_loss},
        },
        "skill": shown_skill(
            metrics["accuracy"],
            macro["auroc"],
            found["log_loss"],
            majority=float(shares[largest]),
            prior_log_loss=prior_loss,
        ),
        "confusion": table.tolist(),
        "confused": _confused(table, support, measure, names),
    }


def _confused(
    table: npt.NDArray[np.int64], support: npt.NDArray[np.int64], measure: ClassMeasure, names: Sequence[str]
) -> list[dict[str, Any]]:
    off = table * ~np.eye(len(table), dtype=np.bool_)
    order = np.argsort(-off.ravel(), kind="stable")[:MOST_CONFUSED]
    pairs = [divmod(int(place), len(table)) for place in order if off.ravel()[place]]
    return [
        {
            "label": names[label],
            "answer": names[answer],
            "count": int(table[label, answer]),
            "share": float(table[label, answer] / support[label]),
            "rows": measure.rows[(measure.classes == label) & (measure.answers == answer)][:MOST_ROWS].tolist(),
        }
        for label, answer in pairs
    ]
