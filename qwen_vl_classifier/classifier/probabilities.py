"""Logits, margins, log odds and probabilities of two classes, and how well probabilities match labels.

A margin is the logit of class 1 less that of class 0: the log odds of class 1 before any calibration.
"""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.errors import ArtifactError

Float: TypeAlias = npt.NDArray[np.float64]
AnyFloat: TypeAlias = npt.NDArray[np.floating[Any]]
Targets: TypeAlias = npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]]
"""Labels of 0 and 1, or probabilities of class 1."""

T = TypeVar("T", bound=npt.NDArray[np.floating[Any]])

NEAREST = float(np.finfo(np.float64).eps)
"""Probabilities that are nearer to 0 or to 1 than this count as this near."""

_TINY = float(np.finfo(np.float64).tiny)
_BINS = 10


def check_numbers(answers: T, *, what: str = "rows") -> T:
    """Return logits or probabilities, shape (n, ...), if all of them are numbers.

    Args:
        answers: Of a classifier.
        what: What the message calls those to whom they belong.

    Raises:
        ArtifactError: Some are NaN or infinite.
    """
    failed = np.flatnonzero(~np.isfinite(answers).all(axis=tuple(range(1, answers.ndim))))
    if len(failed):
        raise ArtifactError(
            f"the answers for {len(failed):,} of {len(answers):,} {what}, the first at position {failed[0]}, are NaN "
            f"or infinite; load the backbone in float32, or check the checkpoint"
        )
    return answers


def probabilities(logits: AnyFloat, temperature: float = 1.0) -> Float:
    """Apply a temperature and softmax.

    Args:
        logits: Shape (n, 2).
        temperature: Above 1 makes probabilities less sure, below 1 more.

    Returns:
        float64, shape (n, 2), each line summing to 1.
    """
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    # Two classes: the logistic function of the difference, written so that neither side overflows.
    with np.errstate(invalid="ignore"):  # NaN stays NaN: see `check_numbers`
        positive = np.exp(-np.logaddexp(0.0, scaled[:, 0] - scaled[:, 1]))
        negative = np.exp(-np.logaddexp(0.0, scaled[:, 1] - scaled[:, 0]))
    both: Float = np.stack([negative, positive], axis=1)
    both /= both.sum(axis=1, keepdims=True)
    return both


def one_of_probabilities(probability: AnyFloat, temperature: float = 1.0) -> Float:
    """Turn probabilities of each class against all others into probabilities of exactly one class.

    Each is raised to the power 1 / temperature, and divided by the sum of its row. At temperature 1 it is divided
    alone, as for one-against-rest classifiers since Zadrozny and Elkan (2002, "Transforming classifier scores into
    accurate multiclass probability estimates", section 5).

    Args:
        probability: Shape (n, classes), of each class against the rest.
        temperature: Above 0; above 1 makes probabilities less sure, below 1 more.

    Returns:
        float64, shape (n, classes), each line summing to 1.
    """
    # `np.maximum` keeps NaN, for `check_numbers`; where all are 0, the classes are equally likely.
    powers = np.log(np.maximum(np.asarray(probability, dtype=np.float64), _TINY)) / temperature
    shares: Float = np.exp(powers - powers.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def margins_of(logits: AnyFloat) -> Float:
    """Return the margins, float64 of shape (n,), of logits of shape (n, 2)."""
    wide = np.asarray(logits, dtype=np.float64)
    margins: Float = wide[:, 1] - wide[:, 0]
    return margins


def logits_of(margins: Float) -> Float:
    """Return logits, shape (n, 2), that have these margins, shape (n,)."""
    logits: Float = np.stack([-margins, margins], axis=1) / 2
    return logits


def log_odds(probability: AnyFloat | float) -> Float:
    """Return log(p / (1 - p)) of probabilities, in their shape; finite, also at 0 and 1."""
    p = np.clip(np.asarray(probability, dtype=np.float64), NEAREST, 1 - NEAREST)
    odds: Float = np.log(p) - np.log1p(-p)
    return odds


def margin_losses(margins: Float, targets: Float) -> Float:
    """Return the log loss of each row.

    Args:
        margins: Shape (n,) or (n, candidates).
        targets: Shape (n,), labels or probabilities of class 1.
    """
    target = targets.reshape(-1, *(1,) * (margins.ndim - 1))
    losses: Float = np.logaddexp(0.0, margins) - target * margins
    return losses


def log_loss(probability: AnyFloat, targets: Targets, *, weights: AnyFloat | None = None) -> float:
    """Return the mean log loss, natural logarithm, against labels or probabilities of class 1.

    Args:
        probability: Shape (n,), of class 1.
        targets: Shape (n,).
        weights: Shape (n,), not negative: a row of weight 2 counts as two. `None` counts every row once.
    """
    p, target = np.clip(np.asarray(probability, dtype=np.float64), NEAREST, 1 - NEAREST), np.asarray(targets)
    return float(np.average(-(target * np.log(p) + (1 - target) * np.log1p(-p)), weights=weights))


def log_loss_of_classes(shares: Float, classes: npt.NDArray[np.int64], *, weights: AnyFloat | None = None) -> float:
    """Return the mean log loss of probabilities of one of several classes.

    Args:
        shares: Shape (n, classes), each line summing to 1.
        classes: Shape (n,), the number of each row's class.
        weights: As in `log_loss`.
    """
    right = np.maximum(shares[np.arange(len(classes)), classes], NEAREST)
    return float(np.average(-np.log(right), weights=weights))


def quantile_bins(probability: AnyFloat, bins: int = _BINS) -> npt.NDArray[np.int64]:
    """Return the number of each row's bin, shape (n,): bins hold equally many rows, equal probabilities one bin.

    So the difference between the probability and the rate of class 1 is equally well known in each (Nguyen and
    O'Connor, 2015, arXiv:1508.05154, section 3).
    """
    return np.searchsorted(np.quantile(probability, np.linspace(0, 1, bins + 1)[1:-1]), probability)


def expected_calibration_error(probability: AnyFloat, targets: Targets, *, weights: AnyFloat | None = None) -> float:
    """Return the expected calibration error (Guo et al., 2017, arXiv:1706.04599, equation 3).

    In each of ten `quantile_bins`: the difference between the mean probability of class 1 and the rate of class 1,
    averaged over the rows. It is above 0 by chance alone, the more so the fewer rows there are.

    Args:
        probability: Shape (n,), of class 1.
        targets: Shape (n,).
        weights: As in `log_loss`.
    """
    return calibration_errors(probability, targets, weights=weights)[1]


def calibration_errors(
    probability: AnyFloat, targets: Targets, *, weights: AnyFloat | None = None
) -> tuple[float, float]:
    """Return `expected_calibration_error` without what chance adds to it, and as it is.

    Without chance, the variance of each bin's difference is taken off its square (Kumar, Liang and Ma, 2019,
    arXiv:1909.10155, section 5), which is nearer to the error on unlimited rows.

    Args:
        probability: Shape (n,), of class 1.
        targets: Shape (n,).
        weights: As in `log_loss`.
    """
    p = np.asarray(probability, dtype=np.float64)
    weight = np.ones(len(p)) if weights is None else np.asarray(weights, dtype=np.float64)
    number = quantile_bins(p)
    gaps = np.abs(np.bincount(number, weights=weight * (p - np.asarray(targets)), minlength=_BINS))
    chance = np.bincount(number, weights=weight**2 * p * (1 - p), minlength=_BINS)
    without_chance = np.sqrt(np.maximum(gaps**2 - chance, 0.0))
    total = weight.sum()
    return float(without_chance.sum() / total), float(gaps.sum() / total)
