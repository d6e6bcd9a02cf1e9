"""Figures of each of several labels and their means over labels, with intervals from the same resamples.

Labels are measured on the rows that have a value of them. Resamples draw groups of all rows, so that a mean over labels
varies as its labels do together: a picture that is hard for one label is often hard for others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.data.targets import MISSING
from qwen_vl_classifier.evaluation.intervals import Draws, bootstrap, bounds, intervals_of
from qwen_vl_classifier.evaluation.metrics import (
    LOWER_IS_BETTER,
    METRICS,
    Labels,
    Measure,
    Probabilities,
    Weights,
    baselines,
    interval_json,
    plain,
)
from qwen_vl_classifier.evaluation.verdict import skill_of
from qwen_vl_classifier.training.uncertainty import wilson


class LabelMeasure:
    """The metrics of one label, as a function of the weights of all rows.

    Args:
        labels: Shape (n,): 0, 1 or `MISSING`; at least one is known.
        probabilities: Shape (n,), of class 1.
        threshold: Probability from which the answer is 1.
        answered: Shape (n,), which rows are answered with 1, where that does not follow from the threshold.

    Attributes:
        rows: Numbers of the rows with a label, shape (k,).
        measure: Of these rows.
    """

    def __init__(
        self,
        labels: Labels,
        probabilities: Probabilities,
        threshold: float,
        answered: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self.rows = np.flatnonzero(labels != MISSING)
        own = None if answered is None else answered[self.rows]
        self.measure = Measure(labels[self.rows], probabilities[self.rows], threshold, own)
        self._all = len(self.rows) == len(labels)

    def __call__(self, weights: Weights) -> Draws:
        """Compute all metrics, as `Measure` does; NaN where no row with a label has weight."""
        own = weights if self._all else weights[:, self.rows]
        with np.errstate(invalid="ignore", divide="ignore"):
            found = self.measure(own)
        if not self._all and (empty := ~own.any(axis=1)).any():
            found = {name: np.where(empty, np.nan, values) for name, values in found.items()}
        return found


class SharesRight:
    """Shares of answers that are right, as a function of the weights of all rows.

    Args:
        right: Shape (n, labels), whether each answer is right.
        known: Shape (n, labels), whether the label is known.

    Attributes:
        complete: Which rows have all labels, shape (n,).
    """

    def __init__(self, right: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_]) -> None:
        self.complete = known.all(axis=1)
        columns = [(right & known).sum(axis=1), known.sum(axis=1), (right.all(axis=1)) & self.complete, self.complete]
        self._sums = np.column_stack(columns).astype(np.float64)

    def __call__(self, weights: Weights) -> Draws:
        """Return `micro_accuracy`, of all answers, and `exact_match`, of rows with all labels; NaN where none count."""
        right, answers, matched, complete = (weights @ self._sums).T
        with np.errstate(invalid="ignore"):
            return {"micro_accuracy": right / answers, "exact_match": matched / complete}

    @property
    def counts(self) -> dict[str, int]:
        """How many answers and how many rows with all labels there are."""
        return {"micro_accuracy": int(self._sums[:, 1].sum()), "exact_match": int(self.complete.sum())}


@dataclass(frozen=True, slots=True)
class LabelFigures:
    """What was measured.

    Attributes:
        labels: For each label `rows` (`labelled`, `positives`, `negatives`, `groups`), `metrics` and `baselines` as in
            an evaluation, `confusion`, and `skill`: "answers", "ranking", "none", or `None` where no row has the label.
        macro: `metrics`, by name the mean over labels (`value`, `low`, `high`, and `labels`: over how many), and
            `baselines`, the same means of guessing.
        shares: `micro_accuracy` and `exact_match`: `value`, `low`, `high`, `count` of answers or rows, and `majority`:
            the same share of always giving each label's more frequent answer.
        draws: Of further measures, as `bootstrap` gives them.
    """

    labels: list[dict[str, Any]]
    macro: dict[str, Any]
    shares: dict[str, Any]
    draws: list[Draws]


def measure_labels(
    labels: Labels,
    probabilities: Probabilities,
    thresholds: Sequence[float],
    groups: npt.NDArray[np.int64],
    *,
    answered: npt.NDArray[np.bool_] | None = None,
    further: Sequence[Any] = (),
    resamples: int,
    seed: int = 0,
    progress: bool = False,
) -> LabelFigures:
    """Measure all labels on the same resamples.

    Args:
        labels: Shape (n, labels): 0, 1 or `MISSING`.
        probabilities: Shape (n, labels), of class 1.
        thresholds: Of each label.
        groups: Shape (n,), numbers of groups.
        answered: Shape (n, labels), which labels are answered with 1, where that does not follow from thresholds.
        further: Measures of the same rows, such as that of classes.
        resamples: How many.
        seed: Of the draws.
        progress: Show a progress bar if it takes more than two seconds.
    """
    answers = probabilities >= np.asarray(thresholds) if answered is None else answered
    known = labels != MISSING
    used = [column for column in range(labels.shape[1]) if known[:, column].any()]
    measures = [
        LabelMeasure(
            labels[:, column],
            probabilities[:, column],
            thresholds[column],
            None if answered is None else answered[:, column],
        )
        for column in used
    ]
    shares = SharesRight(answers == (labels == 1), known)
    every = bootstrap([*measures, shares, *further], groups, resamples=resamples, seed=seed, progress=progress)
    draws = dict(zip(used, every, strict=False))
    entries = [
        _label_entry(measures[used.index(column)], draws[column], answers[:, column], labels[:, column], groups)
        if column in draws
        else _without_rows()
        for column in range(labels.shape[1])
    ]
    return LabelFigures(
        entries,
        _macro([entries[column] for column in used], [draws[column] for column in used]),
        _shares(shares, every[len(used)], labels, known, groups),
        every[len(used) + 1 :],
    )


def _label_entry(
    measure: LabelMeasure,
    draws: Draws,
    answers: npt.NDArray[np.bool_],
    labels: Labels,
    groups: npt.NDArray[np.int64],
) -> dict[str, Any]:
    rows = measure.rows
    own, answered = labels[rows], answers[rows]
    with np.errstate(invalid="ignore", divide="ignore"):
        values = {name: plain(float(value[0])) for name, value in measure.measure(np.ones((1, len(rows)))).items()}
    metrics = intervals_of(measure.measure, values, draws, groups[rows])
    guesses = baselines(own)
    return {
        "rows": {
            "labelled": len(rows),
            "positives": int(own.sum()),
            "negatives": int(len(own) - own.sum()),
            "groups": len(np.unique(groups[rows])),
        },
        "metrics": metrics,
        "baselines": guesses,
        "confusion": {
            "true_positive": int((answered & (own == 1)).sum()),
            "false_positive": int((answered & (own == 0)).sum()),
            "false_negative": int((~answered & (own == 1)).sum()),
            "true_negative": int((~answered & (own == 0)).sum()),
        },
        "skill": skill_of(metrics, guesses),
    }


def _without_rows() -> dict[str, Any]:
    nothing: dict[str, None] = dict.fromkeys(METRICS)
    return {
        "rows": {"labelled": 0, "positives": 0, "negatives": 0, "groups": 0},
        "metrics": {name: interval_json(None, math.nan, math.nan) for name in METRICS},
        "baselines": {"majority": nothing, "prior": nothing},
        "confusion": dict.fromkeys(("true_positive", "false_positive", "false_negative", "true_negative"), 0),
        "skill": None,
    }


def _macro(entries: Sequence[Mapping[str, Any]], draws: Sequence[Draws]) -> dict[str, Any]:
    """Average each metric over the labels that have it."""
    metrics = {}
    for name in METRICS:
        have = [number for number, entry in enumerate(entries) if entry["metrics"][name]["value"] is not None]
        found = [entries[number]["metrics"][name] for number in have]
        drawn = [draws[number][name] for number in have]
        metrics[name] = _mean_interval(name, found, drawn) | {"labels": len(have)}
    return {
        "metrics": metrics,
        "baselines": {
            guess: {name: _mean([entry["baselines"][guess][name] for entry in entries]) for name in METRICS}
            for guess in ("majority", "prior")
        },
    }


def _mean_interval(name: str, found: Sequence[Mapping[str, Any]], draws: Sequence[Weights]) -> dict[str, Any]:
    """Return a mean of metrics and its interval.

    A label whose value is at the end of its scale does not vary from resample to resample. Its own interval knows of
    mistakes that were not made (`intervals_of`); as much of it as it contributes to the mean widens that of the mean,
    as if all such labels were wrong together (Newcombe's way of putting intervals together, as in `RowScores`).
    """
    if not found:
        return interval_json(None, math.nan, math.nan)
    value = float(np.mean([one["value"] for one in found]))
    low, high = bounds(mean_known(draws))
    if name == "ece":
        low = min(low, value)
    if name in LOWER_IS_BETTER:
        return interval_json(value, low, high)
    still = [
        one
        for one, drawn in zip(found, draws, strict=True)
        if one["low"] is not None and len(np.unique(drawn[~np.isnan(drawn)])) < 2
    ]
    down = sum(one["value"] - one["low"] for one in still) / len(found)
    up = sum(one["high"] - one["value"] for one in still) / len(found)
    return interval_json(value, value - math.hypot(value - low, down), value + math.hypot(high - value, up))


def mean_known(draws: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Average arrays of one shape, each entry over those that are numbers there; NaN where none is."""
    if not draws:
        return np.zeros(0)
    every = np.stack(draws)
    known = ~np.isnan(every)
    with np.errstate(invalid="ignore"):
        average: npt.NDArray[np.float64] = np.where(known, every, 0.0).sum(axis=0) / known.sum(axis=0)
    return average


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _shares(
    shares: SharesRight, draws: Draws, labels: Labels, known: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Put intervals beside both shares, and what guessing would get."""
    ones = np.where(known, labels, 0).sum(axis=0)
    guess = SharesRight(labels == (2 * ones >= known.sum(axis=0)), known)
    every = np.ones((1, len(labels)))
    rows = {"micro_accuracy": known.any(axis=1), "exact_match": shares.complete}
    found, guessed = shares(every), guess(every)
    return {
        name: share_interval(plain(float(found[name][0])), draws[name], groups[rows[name]])
        | {"count": shares.counts[name], "majority": plain(float(guessed[name][0]))}
        for name in rows
    }


def share_interval(
    value: float | None, draws: npt.NDArray[np.float64], groups: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Put an interval beside a share of rows.

    Args:
        value: From 0 to 1, or `None` where there are no rows.
        draws: The share on resamples.
        groups: Numbers of the groups of these rows: at the ends of the scale, the interval is Wilson's, with groups as
            rows.
    """
    low, high = bounds(draws)
    if value in (0.0, 1.0):
        number = len(np.unique(groups))
        low, high = wilson(value * number, number)
    return interval_json(value, low, high)
