"""Intervals of figures that were measured on few rows, some of which belong together.

`resampled` draws whole groups again. But a bootstrap cannot invent a mistake: twenty rows that are all right would be a
proof of perfection. So there are 95 % intervals by formulas too, which have a width whatever the rows say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import t as student

from qwen_vl_classifier.classifier.probabilities import Float

Interval = tuple[float, float]
Skill: TypeAlias = Literal["answers", "ranking", "none"]
"""What a classifier is shown to do better than guessing: its answers, its ranking of rows alone, or neither."""

_Z = 1.959963984540054  # of 95 % of a normal distribution
_LARGEST_MARGIN = 36.0  # beyond it, a probability is 1 in float64
_CLOSE = 1e-9
_CHANCE = 0.5  # AUROC of a ranking by chance
_CELLS = 2_000_000  # weights held at once: 16 MB, of which a measure makes some five copies


def resampled(groups: npt.NDArray[np.int64], resamples: int, *, seed: int = 0) -> Iterator[Float]:
    """Draw groups with replacement, as many as there are, and give the weight that each row gets.

    Rows that share a picture are not independent; drawing them one by one would make intervals too narrow (Davison and
    Hinkley, 1997, "Bootstrap Methods and their Application", section 3.8).

    Args:
        groups: Shape (n,), numbers of groups.
        resamples: How many.
        seed: Of the draws: the same seed gives the same resamples, whatever is measured on them.

    Yields:
        Arrays of shape (some resamples, n), together `resamples` lines.
    """
    rng = np.random.default_rng(seed)
    _, numbers = np.unique(groups, return_inverse=True)
    count = int(numbers.max()) + 1
    most = max(1, _CELLS // len(numbers))
    alone = count == len(numbers) and bool((numbers == np.arange(count)).all())
    for start in range(0, resamples, most):
        lines = min(most, resamples - start)
        drawn = rng.integers(0, count, (lines, count)) + count * np.arange(lines)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=lines * count).reshape(lines, count).astype(np.float64)
        yield weights if alone else weights[:, numbers]


def wilson(right: float, rows: float) -> Interval:
    """Return the 95 % interval of a share (Wilson, 1927, "Probable inference, the law of succession").

    Args:
        right: How many rows.
        rows: Of how many, above 0.
    """
    share = right / rows
    middle = (share + _Z * _Z / (2 * rows)) / (1 + _Z * _Z / rows)
    half = _Z / (1 + _Z * _Z / rows) * math.sqrt(share * (1 - share) / rows + _Z * _Z / (4 * rows * rows))
    # Exact at the ends, where rounding would leave the share itself just outside.
    return float(middle - half) if right else 0.0, float(middle + half) if right < rows else 1.0


def shown_skill(
    accuracy: Mapping[str, float | None],
    auroc: Mapping[str, float | None],
    log_loss: float | None,
    *,
    majority: float,
    prior_log_loss: float,
) -> Skill:
    """Say what a classifier is shown to do better than guessing: one rule for `train` and `evaluate`.

    Args:
        accuracy: `low`, the lower end of its 95 % interval, and `value`.
        auroc: `low`; `None` where only one class occurs.
        log_loss: Of its probabilities.
        majority: Accuracy of always giving the more frequent answer.
        prior_log_loss: Log loss of giving every row the share of class 1.

    Returns:
        "answers" where the interval of the accuracy lies above the majority's; else "ranking" where that of AUROC lies
        above 0.5 and either accuracy or log loss is better than that of guessing, as where a rare class is found but
        a threshold for recall gives many false alarms; else "none".
    """
    if accuracy["low"] is not None and accuracy["low"] > majority:
        return "answers"
    value, ranks = accuracy["value"], auroc["low"] is not None and auroc["low"] > _CHANCE
    claims = log_loss is not None and log_loss < prior_log_loss
    return "ranking" if ranks and (claims or (value is not None and value > majority)) else "none"


def effective_rows(values: Float, weights: Float, groups: npt.NDArray[np.int64]) -> float:
    """Return how many independent rows of equal weight would say as much about a share (Korn and Graubard, 1998).

    Rows that are right or wrong together say little more than one; their design effect is estimated from the groups
    (Kish, 1965, "Survey Sampling", section 8.2). Where nothing varies, a group counts as one row. A few groups say
    little about the design effect itself, for which the number is reduced by (normal quantile / Student's) squared.

    Args:
        values: Shape (n,), from 0 to 1.
        weights: Shape (n,), above 0.
        groups: Shape (n,), numbers of groups.
    """
    total = float(weights.sum())
    by_group = np.bincount(groups, weights=weights)
    count = int((by_group > 0).sum())
    if count == 1:
        return 1.0
    share = float(weights @ values) / total
    residuals = np.bincount(groups, weights=weights * (values - share))
    variance = count / (count - 1) * float(residuals @ residuals) / total**2
    spread = share * (1 - share)
    number = total**2 / float(by_group @ by_group)
    if spread > 0 and variance > 0:
        number = min(total**2 / float(weights @ weights), spread / variance)
    return number * (_Z / _quantile(count)) ** 2


@dataclass(frozen=True, slots=True)
class RowScores:
    """How answers did, row by row; where a row was answered more than once, the mean.

    The log loss of an answer with log odds m is `floor`, log(1 + exp(-|m|)), which it costs to be right, and, where it
    is wrong, |m|, the `stake`.

    Attributes:
        right: Shape (n,), from 0 to 1.
        floor: Shape (n,).
        stake: Shape (n,).
        lost: Shape (n,), from 0 to the stake.
        weights: Shape (n,), above 0.
        groups: Shape (n,), numbers of groups.
    """

    right: Float
    floor: Float
    stake: Float
    lost: Float
    weights: Float
    groups: npt.NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """The share of rows that are right."""
        return float(np.average(self.right, weights=self.weights))

    @property
    def log_loss(self) -> float:
        """The mean log loss."""
        return float(np.average(self.floor + self.lost, weights=self.weights))

    @property
    def lost_shares(self) -> Float:
        """Of each row the share of its stake that is lost, shape (n,), from 0 to 1."""
        shares: Float = np.minimum(self.lost / np.maximum(self.stake, _CLOSE), 1.0)
        return shares

    def accuracy_interval(self, inflation: float = 1.0) -> Interval:
        """Return Wilson's interval, of as many rows as these are worth.

        Args:
            inflation: By how much the variance is larger than that of independent rows.
        """
        rows = effective_rows(self.right, self.weights, self.groups) / inflation
        return wilson(self.accuracy * rows, rows)

    def log_loss_interval(self, inflation: float = 1.0) -> Interval:
        """Return an interval that knows of mistakes that were not made.

        The share of the stakes that is lost has Wilson's interval; what else varies from row to row, Student's; both
        are put together as Newcombe puts them (2001, "Estimating the difference between differences: measurement of
        additive scale interaction for proportions", method of variance estimates recovery).

        Args:
            inflation: As for `accuracy_interval`.
        """
        total = float(self.weights.sum())
        mean = self.log_loss
        stakes = self.weights * np.maximum(self.stake, _CLOSE)
        lost_share = self.lost_shares
        stake, share = float(stakes.sum()) / total, float(np.average(lost_share, weights=stakes))
        rows = effective_rows(lost_share, stakes, self.groups) / inflation
        low, high = wilson(share * rows, rows)
        count = len(np.unique(self.groups))
        each = self.floor + share * self.stake
        residuals = np.bincount(self.groups, weights=self.weights * (each - np.average(each, weights=self.weights)))
        variance = inflation * count / max(1, count - 1) * float(residuals @ residuals) / total**2
        rest = _quantile(count) * math.sqrt(variance)
        return max(0.0, mean - math.hypot(stake * (share - low), rest)), mean + math.hypot(stake * (high - share), rest)

    def overconfidence(self, inflation: float = 1.0) -> float:
        """Return by how much the likelier class may be less, or more, often right than is claimed, at most.

        No calibration error can be less than that, and few rows on which all is well do not exclude it.

        Args:
            inflation: As for `accuracy_interval`.
        """
        right = 1 - self.lost_shares
        claimed = float(np.average(np.exp(-self.floor), weights=self.weights))
        rows = effective_rows(right, self.weights, self.groups) / inflation
        low, high = wilson(float(np.average(right, weights=self.weights)) * rows, rows)
        return max(claimed - low, high - claimed)

    def auroc_interval(self, area: float, classes: npt.NDArray[np.int64], inflation: float = 1.0) -> Interval:
        """Return Newcombe's interval of an AUROC that was measured on these rows.

        Newcombe (2006, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic. Part 2",
        Statistics in Medicine 25, method 5): Hanley and McNeil's variance (1982), at the end of the interval and not
        at its middle, so that an area of 1 has a width. Rows that are right or wrong together are taken to rank
        together.

        Args:
            area: From 0 to 1.
            classes: Shape (n,), 0 or 1, both of which occur.
            inflation: As for `accuracy_interval`.
        """
        rows = effective_rows(self.right, self.weights, self.groups) / inflation
        shares = np.bincount(classes, weights=self.weights, minlength=2) / self.weights.sum()
        negatives, positives = (max(_CLOSE, float(share)) * rows for share in shares)
        more = max(0.0, (positives + negatives) / 2 - 1)

        def outside(end: float) -> float:
            spread = end * (1 - end) * (1 + more * ((1 - end) / (2 - end) + end / (1 + end)))
            return (area - end) ** 2 - _Z * _Z * spread / (positives * negatives)

        return _end(outside, area, 0.0), _end(outside, area, 1.0)


def row_scores(
    probability: Float, threshold: float, targets: Float, weights: Float, groups: npt.NDArray[np.int64]
) -> RowScores:
    """Score one answer to each row.

    Args:
        probability: Shape (n,), of class 1.
        threshold: Probability from which the label is 1.
        targets: Shape (n,), labels or probabilities of class 1.
        weights: Shape (n,), above 0.
        groups: Shape (n,), numbers of groups.
    """
    with np.errstate(divide="ignore"):
        margins = np.log(probability) - np.log1p(-probability)
    stake = np.minimum(np.abs(margins), _LARGEST_MARGIN)
    return RowScores(
        right=((probability >= threshold) == (targets >= 0.5)).astype(np.float64),
        floor=np.logaddexp(0.0, -stake),
        stake=stake,
        lost=stake * np.where(margins > 0, 1 - targets, targets),
        weights=weights,
        groups=groups,
    )


def _quantile(groups: int) -> float:
    """Return the two-sided 95 % quantile of Student's distribution for a number of groups."""
    return float(student.ppf(0.975, max(1, groups - 1)))


def _end(outside: Callable[[float], float], inside: float, limit: float) -> float:
    """Return where an interval ends between a point inside of it and the limit of the scale."""
    if inside == limit or outside(limit) <= 0:
        return limit
    if outside(inside) >= 0:  # at the other limit, where nothing has a width
        inside += math.copysign(_CLOSE, limit - inside)
    return float(brentq(outside, inside, limit))
