"""Compute confidence intervals by bootstrap, resampling whole groups of rows that belong together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.evaluation.metrics import (
    LOWER_IS_BETTER,
    Labels,
    Measure,
    Probabilities,
    compute_metrics,
    interval_json,
    plain,
)
from qwen_vl_classifier.progress_bars import tqdm
from qwen_vl_classifier.training.uncertainty import Interval, resampled, row_scores, wilson

Draws: TypeAlias = dict[str, npt.NDArray[np.float64]]

LEVEL = 0.95

_CLOSE = 1e-12


def bootstrap(
    measures: Sequence[Callable[[npt.NDArray[np.float64]], Draws]],
    groups: npt.NDArray[np.int64],
    *,
    resamples: int,
    seed: int = 0,
    progress: bool = False,
) -> list[Draws]:
    """Compute several measures of the same rows on the same resamples, so that they can be compared pair by pair.

    Args:
        measures: Each takes weights of shape (m, n) and gives arrays of shape (m,) by name, as `Measure` does.
        groups: Shape (n,), numbers of groups.
        resamples: How many.
        seed: Of the draws.
        progress: Show a progress bar if it takes more than two seconds.

    Returns:
        For each measure its arrays of shape (resamples,), by name.
    """
    found: list[list[Draws]] = [[] for _ in measures]
    with tqdm(total=resamples, desc="bootstrap", unit="resample", delay=2, disable=not progress) as bar:
        for weights in resampled(groups, resamples, seed=seed):
            for draws, measure in zip(found, measures, strict=True):
                draws.append(measure(weights))
            bar.update(len(weights))
    return [{name: np.concatenate([some[name] for some in draws]) for name in draws[0]} for draws in found]


def bounds(draws: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the percentile interval of 95 %; resamples without the value (NaN) are left out."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def metric_intervals(
    measure: Measure,
    values: Mapping[str, float | None],
    groups: npt.NDArray[np.int64],
    *,
    resamples: int,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Put an interval beside each metric, as `intervals_of` does, from resamples that are drawn here."""
    (draws,) = bootstrap([measure], groups, resamples=resamples, seed=seed, progress=progress)
    return intervals_of(measure, values, draws, groups)


def intervals_of(
    measure: Measure, values: Mapping[str, float | None], draws: Draws, groups: npt.NDArray[np.int64]
) -> dict[str, dict[str, Any]]:
    """Put an interval beside each metric.

    Args:
        measure: Of the rows.
        values: By name, as `compute_metrics` gives them.
        draws: The metrics on resamples, as `bootstrap` gives them.
        groups: Shape (n,), numbers of groups.

    Returns:
        By name: `value`, `low` and `high`, `None` where there is no value. Two cases are not the percentile interval:
        resampling can only add to a calibration error, so that of ECE is stretched down to its value where it lies
        above; and a value at the end of its scale, as where all answers are right, has an interval that knows of
        mistakes that were not made (`_at_the_end`), since resamples cannot.
    """
    found = {}
    for name, value in values.items():
        low, high = bounds(draws[name])
        if name == "ece" and value is not None:
            low = min(low, value)
        if value is not None:
            low, high = _at_the_end(measure, name, value, groups) or (low, high)
        found[name] = interval_json(value, low, high)
    return found


def paired_metrics(
    labels: Labels,
    a: Probabilities,
    b: Probabilities,
    thresholds: tuple[float, float],
    groups: npt.NDArray[np.int64],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Compare every metric of two sets of probabilities of the same rows, on the same resamples.

    Args:
        labels: Shape (n,), 0 or 1.
        a: Shape (n,), of class 1.
        b: Shape (n,), of class 1.
        thresholds: Of a and b.
        groups: Shape (n,), numbers of groups.
        resamples: How many.
        seed: Of the resamples.

    Returns:
        As `differences` does.
    """
    measures = [Measure(labels, side, at) for side, at in zip((a, b), thresholds, strict=True)]
    draws = bootstrap(measures, groups, resamples=resamples, seed=seed)
    values = [compute_metrics(labels, side, at) for side, at in zip((a, b), thresholds, strict=True)]
    return differences((values[0], values[1]), (draws[0], draws[1]))


def differences(
    values: tuple[Mapping[str, float | None], Mapping[str, float | None]], draws: tuple[Draws, Draws]
) -> dict[str, dict[str, Any]]:
    """Subtract every metric of b from that of a, with the interval of the difference.

    Args:
        values: Of a and b, by name, as `compute_metrics` gives them.
        draws: Of a and b on the same resamples, as `bootstrap` gives them.

    Returns:
        For each metric `a`, `b`, `difference` (a less b), its 95 % interval `low` and `high`, and `better`: "a", "b",
        or `None` where the interval holds 0. All but `a` and `b` are `None` where one of them is.
    """
    found = {}
    for name, own in values[0].items():
        other = values[1][name]
        entry: dict[str, Any] = {"a": own, "b": other, "difference": None, "low": None, "high": None, "better": None}
        if own is not None and other is not None:
            low, high = bounds(draws[0][name] - draws[1][name])
            entry |= {"difference": own - other, "low": plain(low), "high": plain(high)}
            if low > 0 or high < 0:
                entry["better"] = "a" if (low > 0) != (name in LOWER_IS_BETTER) else "b"
        found[name] = entry
    return found


def _at_the_end(measure: Measure, name: str, value: float, groups: npt.NDArray[np.int64]) -> Interval | None:
    """Return the interval of a value at the end of its scale, where no resample differs; `None` for any other.

    Shares have Wilson's, with groups as rows. So has tp / (tp + fp + fn), of which F1 is a function, and average
    precision, a mean over the rows of class 1. Balanced accuracy and MCC, functions of two recalls, put Wilson's of
    both together as Newcombe does (`RowScores.log_loss_interval`); AUROC has Newcombe's own.
    """
    ends = {"mcc": (-1.0, 1.0), "average_precision": (1.0,)}.get(name, (0.0, 1.0))
    end = next((one for one in ends if math.isclose(value, one, abs_tol=_CLOSE)), None)
    if end is None:
        return None
    positive, answered = measure.positive, measure.answered
    share = max(end, 0.0)

    def counted(rows: npt.NDArray[np.bool_]) -> Interval:
        number = len(np.unique(groups[rows]))
        return wilson(share * number, number) if number else (math.nan, math.nan)

    if name in measure.shares:
        return counted(measure.shares[name])
    if name == "average_precision":
        return counted(positive)
    if name in ("f1_1", "f1_0"):
        low, high = counted(positive | answered if name == "f1_1" else ~(positive & answered))
        return 2 * low / (1 + low), 2 * high / (1 + high)
    if name == "auroc":
        classes, numbered = positive.astype(np.int64), np.unique(groups, return_inverse=True)[1]
        ones = np.ones(len(classes))
        scores = row_scores(measure.probabilities, measure.threshold, classes.astype(np.float64), ones, numbered)
        return scores.auroc_interval(end, classes)
    if name not in ("balanced_accuracy", "mcc"):
        return None
    of_recalls = _balanced if name == "balanced_accuracy" else _mcc
    mix = float(positive.mean())
    far = [counted(rows)[0 if share else 1] for rows in (positive, ~positive)]
    moved = [abs(end - of_recalls(*recalls, mix)) for recalls in ((far[0], share), (share, far[1]))]
    reach = math.hypot(*(one for one in moved if not math.isnan(one)))
    return (max(ends[0], end - reach), end) if share else (end, min(ends[1], end + reach))


def _balanced(recall_1: float, recall_0: float, mix: float) -> float:
    return (recall_1 if mix == 1 else recall_0) if mix in (0, 1) else (recall_1 + recall_0) / 2


def _mcc(recall_1: float, recall_0: float, mix: float) -> float:
    """Return Matthews' correlation of given recalls where class 1 has a share `mix` of the rows."""
    answered = mix * recall_1 + (1 - mix) * (1 - recall_0)
    return (recall_1 + recall_0 - 1) * math.sqrt(mix * (1 - mix) / (answered * (1 - answered)))
