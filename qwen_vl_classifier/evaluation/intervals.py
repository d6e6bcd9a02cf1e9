"""How sure a number is: bootstrap intervals, resampling whole groups of rows that belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.evaluation.metrics import Measure, interval_json
from qwen_vl_classifier.training.bounds import wilson

Draws: TypeAlias = dict[str, npt.NDArray[np.float64]]

LEVEL = 0.95

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
        above; and where all rows of a share are right, or all wrong, resamples cannot differ, and its interval is
        Wilson's with groups as rows.
    """
    (draws,) = bootstrap([measure], groups, resamples=resamples, seed=seed)
    found = {}
    for name, value in values.items():
        low, high = bounds(draws[name])
        if name == "ece" and value is not None:
            low = min(low, value)
        if name in measure.shares and value in (0.0, 1.0):
            counted = len(np.unique(groups[measure.shares[name]]))
            low, high = wilson(value * counted, counted) if counted else (float("nan"), float("nan"))
        found[name] = interval_json(value, low, high)
    return found
