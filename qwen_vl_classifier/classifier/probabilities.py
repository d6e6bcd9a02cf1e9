"""How far probabilities are from what came true."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
Targets: TypeAlias = npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]]

_BINS = 10


def log_loss(probability: FloatArray, targets: Targets, *, weights: FloatArray | None = None) -> float:
    """Return the mean log loss, natural logarithm, against labels or probabilities of class 1.

    Args:
        probability: Shape (n,), of class 1; what is nearer to 0 or 1 than float64 can tell of 1 counts as that near.
        targets: Shape (n,): labels of 0 and 1, or probabilities of class 1.
        weights: Shape (n,), not negative: a row of weight 2 counts as two. `None` counts every row once.
    """
    tiny = np.finfo(np.float64).eps
    p, target = np.clip(np.asarray(probability, dtype=np.float64), tiny, 1 - tiny), np.asarray(targets)
    return float(np.average(-(target * np.log(p) + (1 - target) * np.log1p(-p)), weights=weights))


def expected_calibration_error(
    probability: FloatArray,
    targets: Targets,
    *,
    weights: FloatArray | None = None,
    bins: int = _BINS,
    without_chance: bool = False,
) -> float:
    """Return how far probabilities are from what came true (Guo et al., 2017, arXiv:1706.04599, equation 3).

    Of each of some bins of the probability of class 1: the difference between its mean and the share of class 1,
    averaged over the rows. Bins hold equally many rows, so that each difference is equally well known (Nguyen and
    O'Connor, 2015, arXiv:1508.05154, section 3); equal probabilities are in one bin. It is above 0 by chance alone, the
    more so the fewer rows there are; without chance, the variance of each difference is taken off its square
    (Kumar, Liang and Ma, 2019, arXiv:1909.10155, section 5), which is nearer to the error of endless rows.

    Args:
        probability: Shape (n,), of class 1.
        targets: Shape (n,): labels of 0 and 1, or probabilities of class 1.
        weights: Shape (n,), not negative: a row of weight 2 counts as two. `None` counts every row once.
        bins: Number of bins.
        without_chance: Take off what chance adds.
    """
    p = np.asarray(probability, dtype=np.float64)
    weight = np.ones(len(p)) if weights is None else np.asarray(weights, dtype=np.float64)
    place = np.searchsorted(np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1]), p)
    each = weight * (p - np.asarray(targets))
    gaps = np.abs(np.bincount(place, weights=each, minlength=bins))
    if without_chance:
        chance = np.bincount(place, weights=weight**2 * p * (1 - p), minlength=bins)
        gaps = np.sqrt(np.maximum(gaps**2 - chance, 0.0))
    return float(gaps.sum() / weight.sum())
