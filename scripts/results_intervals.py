"""Scores of several seeds on the same rows, with 95 % intervals by the bootstrap.

A draw takes groups of rows with replacement, whole, for rows that share a picture are not independent, and seeds with
replacement, for another seed would have given another classifier (the cluster bootstrap; Davison and Hinkley,
"Bootstrap Methods and their Application", 1997, section 3.8). All methods on a set are scored on the same draws, so
that their differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

DRAWS = 2000
BINS = 15
METRICS = ("accuracy", "auroc", "ece")
_CENTRAL = (2.5, 97.5)


@dataclass(frozen=True, slots=True)
class Scored:
    """What one method said of the rows of a set.

    Attributes:
        probabilities: Of class 1, float64, shape (seeds, rows).
        thresholds: From which each seed's classifier says 1, shape (seeds,).
    """

    probabilities: Floats
    thresholds: Floats


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score and how sure it is.

    Attributes:
        value: The mean over seeds on all rows.
        low: Lower end of its 95 % interval.
        high: Upper end.
        error: Its standard error: the deviation of the draws.
    """

    value: float
    low: float
    high: float
    error: float


class Bootstrap:
    """The draws for one set: how often each row and each seed is in each of them.

    Args:
        labels: 0 or 1, shape (rows,); both occur.
        groups: The number of each row's group, from 0, shape (rows,).
        draws: How many.
        seed: Of the draws.
    """

    def __init__(self, labels: Integers, groups: Integers, *, draws: int = DRAWS, seed: int = 0) -> None:
        self._labels = labels
        self._draws = draws
        self._seed = seed
        counts = _times_drawn(int(groups.max()) + 1, draws, np.random.default_rng([seed, 0]))
        counts = counts[:, groups]
        held = (counts @ labels > 0) & (counts @ (1 - labels) > 0)  # a draw of one class alone has no AUROC
        self._counts = counts[held]
        self._held = held

    @property
    def rows(self) -> int:
        """How many rows the set has."""
        return len(self._labels)

    def value(self, name: str, method: Scored) -> float:
        """Return one of `METRICS` on all rows, the mean over seeds."""
        everything = np.ones((1, self.rows))
        rows = zip(method.probabilities, method.thresholds, strict=True)
        return float(np.mean([_SCORES[name](self._labels, *row, everything) for row in rows]))

    def estimate(self, method: Scored) -> dict[str, Estimate]:
        """Return each of `METRICS` for a method."""
        return {name: self._summary(*self._values(name, method)) for name in METRICS}

    def difference(self, method: Scored, other: Scored) -> dict[str, Estimate]:
        """Return for each of `METRICS` how much a method is above another, on the same rows and seeds.

        Args:
            method: One method.
            other: Another, with as many seeds: both of the same seed stand in the same place.
        """
        differences = {}
        for name in METRICS:
            (value, draws), (other_value, other_draws) = (self._values(name, one) for one in (method, other))
            differences[name] = self._summary(value - other_value, draws - other_draws, lowest=-1)
        return differences

    def _values(self, name: str, method: Scored) -> tuple[float, Floats]:
        """Return a metric on all rows and in each draw, as means over seeds."""
        rows = zip(method.probabilities, method.thresholds, strict=True)
        drawn = np.stack([_SCORES[name](self._labels, *row, self._counts) for row in rows], axis=1)
        seeds = _times_drawn(drawn.shape[1], self._draws, np.random.default_rng([self._seed, 1]))[self._held]
        return self.value(name, method), (seeds * drawn).sum(axis=1) / drawn.shape[1]

    def _summary(self, value: float, draws: Floats, *, lowest: float = 0) -> Estimate:
        """Take percentiles, moved by as much as the draws are off the value on average.

        That is of consequence for the calibration error alone: drawing rows adds noise to each bin, which raises it.
        """
        low, high = np.clip(np.percentile(draws, _CENTRAL) - (draws.mean() - value), lowest, 1)
        return Estimate(value, float(low), float(high), float(draws.std(ddof=1)))


def _times_drawn(things: int, draws: int, rng: np.random.Generator) -> Floats:
    """Return how often each of some things is drawn in as many drawings with replacement: shape (draws, things)."""
    return rng.multinomial(things, np.full(things, 1 / things), size=draws).astype(np.float64)


def accuracy(labels: Integers, probabilities: Floats, threshold: float, weights: Floats) -> Floats:
    """Return the share of right answers.

    Args:
        labels: 0 or 1, shape (rows,).
        probabilities: Of class 1, shape (rows,).
        threshold: The answer is 1 from this probability on.
        weights: How often each row counts, shape (draws, rows).

    Returns:
        Shape (draws,).
    """
    right = (probabilities >= threshold) == (labels == 1)
    return weights @ right / weights.sum(axis=1)


def auroc(labels: Integers, probabilities: Floats, threshold: float, weights: Floats) -> Floats:
    """Return the chance that a row of class 1 has a higher probability than one of class 0, equal ones as half.

    Args and the shape returned are those of `accuracy`; the threshold has no part in it.
    """
    del threshold
    order = np.argsort(probabilities, kind="stable")
    _, starts = np.unique(probabilities[order], return_index=True)
    positive, negative = (np.add.reduceat((weights * (labels == label))[:, order], starts, axis=1) for label in (1, 0))
    below = np.cumsum(negative, axis=1) - negative / 2
    return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def expected_calibration_error(labels: Integers, probabilities: Floats, threshold: float, weights: Floats) -> Floats:
    """Return how far the probability of class 1 is from its frequency, on average over rows, in bins.

    Bins hold equally many rows, and equal probabilities are in one bin (Nguyen and O'Connor, 2015, arXiv:1508.05154).
    Args and the shape returned are those of `accuracy`; the threshold has no part in it.
    """
    del threshold
    inner_edges = np.quantile(probabilities, np.linspace(0, 1, BINS + 1)[1:-1])
    member = np.searchsorted(inner_edges, probabilities)[:, None] == np.arange(BINS)
    gaps = weights @ (member * (probabilities - labels)[:, None])
    return np.abs(gaps).sum(axis=1) / weights.sum(axis=1)


_SCORES: dict[str, Callable[[Integers, Floats, float, Floats], Floats]] = {
    "accuracy": accuracy,
    "auroc": auroc,
    "ece": expected_calibration_error,
}
