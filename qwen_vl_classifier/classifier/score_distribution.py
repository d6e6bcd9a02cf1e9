"""The distribution of a classifier's scores on data like its training data, and how far other scores differ.

A score is a calibrated probability of class 1.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from qwen_vl_classifier.classifier.probabilities import AnyFloat
from qwen_vl_classifier.config.fields import is_number

RECORDED = "score_distribution"
"""Where a training record holds it."""

MODERATE, LARGE = 0.1, 0.25
"""From these values of the index on, a change counts as moderate or large (Siddiqi, 2006, "Credit risk scorecards")."""

_MOST_BINS = 10
_ROWS_OF_BIN = 25  # with fewer, chance alone makes changes look moderate
_MOST_ROWS = 1e15
_LEAST = 0.5  # rows of an empty bin
# What chi-squared variables of 1 to 9 degrees of freedom exceed once in a thousand times.
_RARE = (10.828, 13.816, 16.266, 18.467, 20.515, 22.458, 24.322, 26.124, 27.877)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScoreDistribution:
    """How many scores fall into each of up to ten bins.

    Attributes:
        edges: Ends of the bins but the last, strictly rising: bin b holds scores above the edge before it, up to and
            with `edges[b]`.
        counts: Rows of each bin, one more than edges, above 0. Rows of different weights count by their weights, and
            all together as the rows of equal weight that would say as much (Kish, 1965, "Survey sampling").
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]

    @classmethod
    def of(cls, scores: AnyFloat, weights: AnyFloat | None = None) -> ScoreDistribution | None:
        """Count scores in bins that hold equally many, as far as equal scores allow.

        There is a bin for every 25 rows, so that chance alone rarely looks like a change. Edges lie in the middle
        between neighbouring scores: rounding moves none into another bin.

        Args:
            scores: Shape (n,), from 0 to 1.
            weights: Shape (n,), not negative. `None` counts every row once.

        Returns:
            `None` where there are too few rows, or too few distinct scores, for two bins.
        """
        p = np.asarray(scores, dtype=np.float64)
        weight = np.ones(len(p)) if weights is None else np.asarray(weights, dtype=np.float64)
        values, number = np.unique(p[weight > 0], return_inverse=True)
        total = float(weight.sum())
        rows = total**2 / float((weight**2).sum()) if total else 0.0
        bins = min(_MOST_BINS, int(rows / _ROWS_OF_BIN + 1e-9))
        if bins < 2 or len(values) < 2:
            return None
        below = np.cumsum(np.bincount(number, weights=weight[weight > 0]))
        ends = np.searchsorted(below, total * (np.arange(1, bins) / bins - 1e-9))  # the last value of each bin
        ends = np.unique(np.minimum(ends, len(values) - 2))
        middle = (values[ends] + values[ends + 1]) / 2
        edges = np.where(middle < values[ends + 1], middle, values[ends])  # neighbouring numbers have no middle
        counts = np.diff(below[ends], prepend=0.0, append=below[-1]) * (rows / total)
        return cls(tuple(edges.tolist()), tuple(counts.tolist()))

    @classmethod
    def from_json(cls, value: Any) -> ScoreDistribution:
        """Check what a training record holds.

        Raises:
            ValueError: It is no such distribution; the message says why, without the value.
        """
        if not isinstance(value, dict) or value.keys() != {"edges", "counts"}:
            raise ValueError("expected an object of edges and counts")
        edges, counts = value["edges"], value["counts"]
        if not (isinstance(edges, list) and isinstance(counts, list) and 1 <= len(edges) < _MOST_BINS):
            raise ValueError(f"expected a list of 1 to {_MOST_BINS - 1} edges, and a list of counts")
        if len(counts) != len(edges) + 1:
            raise ValueError("expected one count more than edges")
        if not all(is_number(edge, 0, 1) for edge in edges) or not all(low < high for low, high in pairwise(edges)):
            raise ValueError("expected edges from 0 to 1, each above the one before")
        if not all(is_number(count, 0, _MOST_ROWS) and count > 0 for count in counts):
            raise ValueError("expected counts above 0")
        return cls(tuple(map(float, edges)), tuple(map(float, counts)))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return {"edges": list(self.edges), "counts": list(self.counts)}

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the rows in each bin."""
        total = sum(self.counts)
        return tuple(count / total for count in self.counts)

    def bin_of(self, score: float) -> int:
        """Return the number of a score's bin, from 0."""
        return bisect_left(self.edges, score)

    def counts_of(self, scores: AnyFloat) -> list[float]:
        """Return how many of some scores, shape (n,), fall into each bin."""
        numbers = np.searchsorted(self.edges, np.asarray(scores, dtype=np.float64))
        counts: list[float] = np.bincount(numbers, minlength=len(self.counts)).astype(np.float64).tolist()
        return counts

    def compare(self, counts: Sequence[float]) -> tuple[float, float]:
        """Return the `stability_index` of other scores against these, and their `index_by_chance`.

        Args:
            counts: Of the other scores, by bin; not all 0.
        """
        return stability_index(self.counts, counts), index_by_chance(len(counts), sum(self.counts), sum(counts))


def distribution_record(scores: AnyFloat, weights: AnyFloat | None = None) -> dict[str, Any]:
    """Return what a training record holds of some scores, by name; nothing where `ScoreDistribution.of` has none."""
    found = ScoreDistribution.of(scores, weights)
    return {} if found is None else {RECORDED: found.to_json()}


def recorded_distribution(training: Mapping[str, Any], *, name: str) -> ScoreDistribution | None:
    """Return the distribution in a training record; a malformed one is logged and left aside.

    Args:
        training: The record.
        name: What the log calls the classifier.

    Returns:
        `None` where there is none: older versions wrote none, and few rows or no labels make none.
    """
    if RECORDED not in training:
        return None
    try:
        return ScoreDistribution.from_json(training[RECORDED])
    except ValueError as error:
        _log.warning("%r: the %s of its training record is ignored: %s", name, RECORDED, error)
        return None


def stability_index(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the population stability index (PSI) of two samples: the sum of (p - q) ln(p / q) over bins.

    p and q are a bin's shares in both. The index is 0 for equal shares, the same for samples exchanged, and never
    negative: it is Jeffreys' divergence. A bin that is empty in one sample counts as half a row there, as is usual
    for log odds (Haldane, 1956, "The estimation and significance of the logarithm of a ratio of frequencies"): its
    logarithm would be infinite.

    Args:
        first: Counts by bin, not all 0.
        second: Counts by the same bins, not all 0.
    """
    p, q = (np.maximum(np.asarray(counts, dtype=np.float64), _LEAST) / sum(counts) for counts in (first, second))
    return float(((p - q) * np.log(p / q)).sum())


def index_by_chance(bins: int, first: float, second: float) -> float:
    """Return the value that the index exceeds by chance once in 1,000 pairs of samples of one population.

    With B bins and n and m independent rows, the index divided by 1/n + 1/m is distributed nearly as chi-squared with
    B - 1 degrees of freedom, so its mean is (B - 1)(1/n + 1/m) (Yurdakul, 2018, "Statistical properties of population
    stability index", dissertation, Western Michigan University).

    Args:
        bins: 2 to 10.
        first: Rows of one sample.
        second: Rows of the other.
    """
    return _RARE[bins - 2] * (1 / first + 1 / second)
