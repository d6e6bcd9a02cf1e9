"""How sure a number is: bootstrap intervals, resampling whole groups of rows that belong together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.evaluation.metrics import Measure, interval_json
from qwen_vl_classifier.training.uncertainty import Interval, row_scores, wilson

Draws: TypeAlias = dict[str, npt.NDArray[np.float64]]

LEVEL = 0.95

_CLOSE = 1e-12
_CELLS = 2_000_000  # weights held at once: 16 MB, of which a measure makes some five copies


def resampled(groups: npt.NDArray[np.int64], resamples: int, *, seed: int = 0) -> Iterator[npt.NDArray[np.float64]]:
    """Draw groups with replacement, as many as there are, and give the weight that each row gets.

    Rows that share a picture are not independent; drawing them one by one would make intervals too narrow (Davison and
    Hinkley, 1997, "Bootstrap Methods and their Application", section 3.8).

    Args:
        groups: Shape (n,), numbers of groups: 0, 1, ... without gaps.
        resamples: How many.
        seed: Of the draws: the same seed gives the same resamples, whatever is measured on them.

    Yields:
        Arrays of shape (some resamples, n), together `resamples` lines.
    """
    rng = np.random.default_rng(seed)
    count = int(groups.max()) + 1
    piece = max(1, _CELLS // max(len(groups), count))
    alone = count == len(groups) and bool((groups == np.arange(count)).all())
    for start in range(0, resamples, piece):
        lines = min(piece, resamples - start)
        drawn = rng.integers(0, count, (lines, count)) + count * np.arange(lines)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=lines * count).reshape(lines, count).astype(np.float64)
        yield weights if alone else weights[:, groups]


def bootstrap(
    measures: Sequence[Callable[[npt.NDArray[np.float64]], Draws]],
    groups: npt.NDArray[np.int64],
    *,
    resamples: int,
    seed: int = 0,
) -> list[Draws]:
    """Compute several measures of the same rows on the same resamples, so that they can be compared pair by pair.

    Args:
        measures: Each takes weights of shape (m, n) and gives arrays of shape (m,) by name, as `Measure` does.
        groups: Shape (n,), numbers of groups.
        resamples: How many.
        seed: Of the draws.

    Returns:
        For each measure its arrays of shape (resamples,), by name.
    """
    numbered = np.unique(groups, return_inverse=True)[1]
    pieces: list[list[Draws]] = [[] for _ in measures]
    for weights in resampled(numbered, resamples, seed=seed):
        for kept, measure in zip(pieces, measures, strict=True):
            kept.append(measure(weights))
    return [{name: np.concatenate([piece[name] for piece in kept]) for name in kept[0]} for kept in pieces]


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
) -> dict[str, dict[str, Any]]:
    """Put an interval beside each metric.

    Args:
        measure: Of the rows.
        values: By name, as `compute_metrics` gives them.
        groups: Shape (n,), numbers of groups.
        resamples: How many.
        seed: Of the draws.

    Returns:
        By name: `value`, `low` and `high`, `None` where there is no value. Two cases are not the percentile interval:
        resampling can only add to a calibration error, so that of ECE is stretched down to its value where it lies
        above; and a value at the end of its scale, as where all answers are right, has an interval that knows of
        mistakes that were not made (`_at_the_end`), since resamples cannot.
    """
    (draws,) = bootstrap([measure], groups, resamples=resamples, seed=seed)
    found = {}
    for name, value in values.items():
        low, high = bounds(draws[name])
        if name == "ece" and value is not None:
            low = min(low, value)
        if value is not None:
            low, high = _at_the_end(measure, name, value, groups) or (low, high)
        found[name] = interval_json(value, low, high)
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
    positive = measure.positive
    answered = measure.probabilities >= measure.threshold
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
