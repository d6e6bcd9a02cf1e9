"""From logits to probabilities that mean what they say, and how far they are from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, minimize_scalar
from sklearn.isotonic import IsotonicRegression
from sklearn.model_selection import GroupKFold

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
Targets: TypeAlias = npt.NDArray[np.floating[Any]] | npt.NDArray[np.integer[Any]]
Probability: TypeAlias = npt.NDArray[np.float64]
Method: TypeAlias = Literal["temperature", "isotonic", "platt"]
Curve: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]

MOST_KNOTS = 1000  # of an isotonic curve: more than any data set can tell apart

_TEMPERATURES = (0.05, 20.0)
_SLOPES = (0.01, 100.0)  # of Platt's line: log odds for one standard deviation of the margin
_ISOTONIC_ROWS = 1000  # with fewer, isotonic regression learns the rows by heart (Niculescu-Mizil and Caruana, 2005)
_ROUNDING = 1e-6  # differences between float32 margins that mean nothing, as a share of their size
_FOLDS = 5
_BINS = 10


def probabilities(logits: FloatArray, temperature: float = 1.0) -> Probability:
    """Apply a temperature and softmax.

    Args:
        logits: Shape (n, 2).
        temperature: Above 1 makes probabilities less sure, below 1 more.

    Returns:
        float64, shape (n, 2), each line summing to 1.
    """
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    # Two classes: the logistic function of the difference, written so that neither side overflows.
    positive = np.exp(-np.logaddexp(0.0, scaled[:, 0] - scaled[:, 1]))
    negative = np.exp(-np.logaddexp(0.0, scaled[:, 1] - scaled[:, 0]))
    both: Probability = np.stack([negative, positive], axis=1)
    both /= both.sum(axis=1, keepdims=True)
    return both


@dataclass(frozen=True, slots=True)
class Calibration:
    """What turns a head's logits into probabilities.

    Attributes:
        temperature: Divides the logits before softmax.
        isotonic: Rising knots, probability in and probability out, of a piecewise linear curve through which the
            probability of class 1 then goes; it is flat beyond its ends. `None` for no curve.
    """

    temperature: float = 1.0
    isotonic: Curve | None = None

    def apply(self, logits: FloatArray) -> Probability:
        """Return the probabilities of both classes, float64 of shape (n, 2), from logits of shape (n, 2)."""
        both = probabilities(logits, self.temperature)
        if self.isotonic is None:
            return both
        positive = np.interp(both[:, 1], *self.isotonic)
        return np.stack([1 - positive, positive], axis=1)


def margins_of(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Return the logit of class 1 less that of class 0, float64 of shape (n,), from logits of shape (n, 2)."""
    wide = np.asarray(logits, dtype=np.float64)
    margins: npt.NDArray[np.float64] = wide[:, 1] - wide[:, 0]
    return margins


def fit_temperature(logits: FloatArray, targets: Targets, *, weights: FloatArray | None = None) -> float:
    """Find the temperature with the least log loss (Guo et al., 2017, arXiv:1706.04599, section 4.2).

    Targets are taken as Platt (1999, "Probabilistic outputs for support vector machines", section 2.1) takes them: with
    n rows of its class, a label is right with probability (n + 1) / (n + 2). Without that, a dozen rows that are all
    right would be proof of certainty.

    Args:
        logits: Shape (n, 2), of examples that the head was not trained on.
        targets: Shape (n,): labels of 0 and 1, or probabilities of class 1.
        weights: Shape (n,), not negative: a row of weight 2 counts as two. `None` counts every row once.
    """
    margin, right, weight = margins_of(logits), *_platt_targets(targets, weights)

    def loss(log_temperature: float) -> float:
        return _logistic_loss(margin / np.exp(log_temperature), right, weight)

    low, high = np.log(_TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def fit_platt(margins: FloatArray, targets: Targets, *, weights: FloatArray | None = None) -> tuple[float, float]:
    """Fit Platt's line: P(class 1) = 1 / (1 + exp(-(scale * margin + bias))), by the least log loss.

    It calibrates zero-shot answers, whose margins lean to one side by habit of the language model, with two numbers
    that a few labels can tell. Targets are Platt's (1999, section 2.1), as in `fit_temperature`. The scale is above 0
    whatever the labels say, so that the order of the examples stays: answers that are worse than chance end as nearly
    one probability for all, and a question that is understood the wrong way round is to be asked otherwise, not
    turned round in silence.

    Args:
        margins: Shape (n,): the logit of class 1 less that of class 0.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.

    Returns:
        Scale, above 0, and bias.
    """
    margin = np.asarray(margins, dtype=np.float64)
    right, weight = _platt_targets(targets, weights)
    mean = float(np.average(margin, weights=weight))
    # In units of their own spread margins of any size are equally easy.
    spread = float(np.sqrt(np.average((margin - mean) ** 2, weights=weight)))
    if spread <= _ROUNDING * abs(mean):  # they do not differ, and any scale will do
        spread = 1.0
    unit = (margin - mean) / spread

    def loss(line: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        logit = line[0] * unit + line[1]
        slope = weight * (np.exp(-np.logaddexp(0.0, -logit)) - right) / weight.sum()
        return _logistic_loss(logit, right, weight), np.array([slope @ unit, slope.sum()])

    found = minimize(loss, x0=np.array([1.0, 0.0]), jac=True, bounds=[_SLOPES, (None, None)], method="L-BFGS-B").x
    scale = float(found[0]) / spread
    return scale, float(found[1]) - scale * mean


def fit_calibration(
    logits: FloatArray,
    targets: Targets,
    *,
    weights: FloatArray | None = None,
    groups: npt.NDArray[np.integer[Any]] | None = None,
    seed: int = 0,
) -> Calibration:
    """Fit a temperature and, where it pays, an isotonic curve after it.

    The curve (Zadrozny and Elkan, 2002, "Transforming classifier scores into accurate multiclass probability
    estimates") can take any rising shape, and needs many rows for it: it is kept with more than 1,000 rows and only
    if its log loss on rows that it did not see, in five folds, is less than that of the temperature alone.

    Args:
        logits: Shape (n, 2), of examples that the head was not trained on: out-of-fold, or held out.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.
        groups: Shape (n,): rows of one group are never in different folds. `None`: every row for itself.
        seed: Of the folds.
    """
    groups = _each_alone(logits) if groups is None else groups

    def unseen_loss(method: Method) -> float:
        probability = cross_fitted(method, logits, targets, weights=weights, groups=groups, seed=seed)
        return log_loss(probability[:, 1], targets, weights=weights)

    enough = len(logits) > _ISOTONIC_ROWS and len(np.unique(groups)) > 1
    if enough and unseen_loss("isotonic") < unseen_loss("temperature"):
        return fit_isotonic(logits, targets, weights=weights)
    return Calibration(fit_temperature(logits, targets, weights=weights))


def fit_isotonic(logits: FloatArray, targets: Targets, *, weights: FloatArray | None = None) -> Calibration:
    """Fit a temperature and an isotonic curve after it, whatever the number of rows.

    No probability comes nearer to 0 or 1 than 1 / (n + 2), with n rows, so that one surprise costs no infinite loss.

    Args:
        logits: As in `fit_calibration`.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.
    """
    temperature = fit_temperature(logits, targets, weights=weights)
    margin = 1 / ((len(logits) if weights is None else float(weights.sum())) + 2)
    regression = IsotonicRegression(y_min=margin, y_max=1 - margin)
    regression.fit(probabilities(logits, temperature)[:, 1], np.asarray(targets, dtype=np.float64), weights)
    knots = len(regression.X_thresholds_)
    kept = np.linspace(0, knots - 1, min(knots, MOST_KNOTS)).round().astype(np.int64)
    curve = (tuple(regression.X_thresholds_[kept].tolist()), tuple(regression.y_thresholds_[kept].tolist()))
    return Calibration(temperature, curve)


def cross_fitted(
    method: Method,
    logits: FloatArray,
    targets: Targets,
    *,
    weights: FloatArray | None = None,
    groups: npt.NDArray[np.integer[Any]] | None = None,
    seed: int = 0,
) -> Probability:
    """Return each row's probabilities, shape (n, 2), by a calibration that was fitted without its group.

    With these, and not with rows that it was fitted on, it is known what a calibration is worth. Five folds, fewer
    where there are fewer groups; a single group cannot be split, and its rows are calibrated by themselves.

    Args:
        method: What to fit: a temperature, a temperature and an isotonic curve, or Platt's line.
        logits: As in `fit_calibration`.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.
        groups: As in `fit_calibration`.
        seed: Of the folds.
    """
    groups = _each_alone(logits) if groups is None else groups
    fit = _FITS[method]
    folds = min(_FOLDS, len(np.unique(groups)))
    if folds < 2:
        return fit(logits, targets, weights)(logits)
    both = np.empty((len(logits), 2))
    for seen, unseen in GroupKFold(folds, shuffle=True, random_state=seed).split(logits, groups=groups):
        apply = fit(logits[seen], targets[seen], None if weights is None else weights[seen])
        both[unseen] = apply(logits[unseen])
    return both


def calibration_record(
    method: Method,
    before: Probability,
    logits: FloatArray,
    targets: Targets,
    *,
    weights: FloatArray | None = None,
    groups: npt.NDArray[np.integer[Any]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Say what a calibration is worth, for the training record.

    Args:
        method: As in `cross_fitted`.
        before: The probabilities without it, shape (n, 2).
        logits: As in `fit_calibration`.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.
        groups: As in `fit_calibration`.
        seed: Of the folds.

    Returns:
        `rows`, `method`, and `ece_before`, `ece_after`, `log_loss_before`, `log_loss_after`: those after it are of
        rows that it was not fitted on, by `cross_fitted`.
    """
    after = cross_fitted(method, logits, targets, weights=weights, groups=groups, seed=seed)
    return {
        "rows": len(logits),
        "method": method,
        "ece_before": expected_calibration_error(before[:, 1], targets, weights=weights),
        "ece_after": expected_calibration_error(after[:, 1], targets, weights=weights),
        "log_loss_before": log_loss(before[:, 1], targets, weights=weights),
        "log_loss_after": log_loss(after[:, 1], targets, weights=weights),
    }


def log_loss(probability: FloatArray, targets: Targets, *, weights: FloatArray | None = None) -> float:
    """Return the mean log loss, natural logarithm, against labels or probabilities of class 1.

    Args:
        probability: Shape (n,), of class 1; what is nearer to 0 or 1 than float64 can tell of 1 counts as that near.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.
    """
    tiny = np.finfo(np.float64).eps
    p, target = np.clip(np.asarray(probability, dtype=np.float64), tiny, 1 - tiny), np.asarray(targets)
    return float(np.average(-(target * np.log(p) + (1 - target) * np.log1p(-p)), weights=weights))


def expected_calibration_error(
    probability: FloatArray, targets: Targets, *, weights: FloatArray | None = None, bins: int = _BINS
) -> float:
    """Return how far probabilities are from what came true (Guo et al., 2017, arXiv:1706.04599, equation 3).

    Of each of some bins of the probability of class 1: the difference between its mean and the share of class 1,
    averaged over the rows. Bins hold equally many rows, so that each difference is equally well known (Nguyen and
    O'Connor, 2015, arXiv:1508.05154, section 3); equal probabilities are in one bin. It is above 0 by chance alone, the
    more so the fewer rows there are.

    Args:
        probability: Shape (n,), of class 1.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.
        bins: Number of bins.
    """
    p = np.asarray(probability, dtype=np.float64)
    weight = np.ones(len(p)) if weights is None else np.asarray(weights, dtype=np.float64)
    place = np.searchsorted(np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1]), p)
    gaps = np.bincount(place, weights=weight * (p - np.asarray(targets)), minlength=bins)
    return float(np.abs(gaps).sum() / weight.sum())


def _apply_temperature(logits: FloatArray, targets: Targets, weights: FloatArray | None) -> _Apply:
    return Calibration(fit_temperature(logits, targets, weights=weights)).apply


def _apply_isotonic(logits: FloatArray, targets: Targets, weights: FloatArray | None) -> _Apply:
    return fit_isotonic(logits, targets, weights=weights).apply


def _apply_platt(logits: FloatArray, targets: Targets, weights: FloatArray | None) -> _Apply:
    scale, bias = fit_platt(margins_of(logits), targets, weights=weights)

    def apply(unseen: FloatArray) -> Probability:
        line = scale * margins_of(unseen) + bias
        return probabilities(np.stack([np.zeros_like(line), line], axis=1))

    return apply


_Apply: TypeAlias = Callable[[FloatArray], Probability]
_FITS: dict[Method, Callable[[FloatArray, Targets, FloatArray | None], _Apply]] = {
    "temperature": _apply_temperature,
    "isotonic": _apply_isotonic,
    "platt": _apply_platt,
}


def _each_alone(logits: FloatArray) -> npt.NDArray[np.int64]:
    return np.arange(len(logits))


def _platt_targets(
    targets: Targets, weights: FloatArray | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return targets that the number of rows allows to believe in, and weights, both of shape (n,)."""
    target = np.asarray(targets, dtype=np.float64)
    weight = np.ones(len(target)) if weights is None else np.asarray(weights, dtype=np.float64)
    positives, negatives = float(weight @ target), float(weight @ (1 - target))
    return target * (positives + 1) / (positives + 2) + (1 - target) / (negatives + 2), weight


def _logistic_loss(
    logit: npt.NDArray[np.float64], target: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]
) -> float:
    losses = target * np.logaddexp(0.0, -logit) + (1 - target) * np.logaddexp(0.0, logit)
    return float(np.average(losses, weights=weight))
