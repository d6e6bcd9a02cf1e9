"""Calibrate a classifier: from logits to probabilities by a temperature, an isotonic curve or Platt's line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.probabilities import (
    AnyFloat,
    Float,
    Targets,
    expected_calibration_error,
    log_loss,
    log_loss_of_classes,
    margin_losses,
    margins_of,
    one_of_probabilities,
    probabilities,
)

Method: TypeAlias = Literal["none", "temperature", "isotonic", "platt"]
Curve: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]

MOST_KNOTS = 1000  # of an isotonic curve: more than any data set can tell apart

_TEMPERATURES = (0.05, 20.0)
_TEMPERATURE_SPREAD = 0.5  # of the prior, in natural logarithms: two in three temperatures lie from 0.6 to 1.65
_SLOPES = (0.01, 100.0)  # of Platt's line: log odds for one standard deviation of the margin
_ISOTONIC_ROWS = 1000  # with fewer, isotonic regression learns the rows by heart (Niculescu-Mizil and Caruana, 2005)
_ROUNDING = 1e-6  # differences between float32 margins that mean nothing, as a share of their size
_FOLDS = 5


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

    def apply(self, logits: AnyFloat) -> Float:
        """Return the probabilities of both classes, float64 of shape (n, 2), from logits of shape (n, 2)."""
        both = probabilities(logits, self.temperature)
        if self.isotonic is None:
            return both
        positive = np.interp(both[:, 1], *self.isotonic)
        return np.stack([1 - positive, positive], axis=1)


def fit_temperature(
    logits: AnyFloat, targets: Targets, *, weights: AnyFloat | None = None, prior: float = 1.0
) -> float:
    """Find the temperature with the least log loss (Guo et al., 2017, arXiv:1706.04599, section 4.2).

    Targets are taken as Platt (1999, "Probabilistic outputs for support vector machines", section 2.1) takes them: with
    n rows of its class, a label is right with probability (n + 1) / (n + 2). Without that, a dozen rows that are all
    right would be proof of certainty. A log-normal prior keeps the temperature of few rows near what there was before.

    Args:
        logits: Shape (n, 2), of examples that the head was not trained on.
        targets: Shape (n,): labels of 0 and 1, or probabilities of class 1.
        weights: Shape (n,), not negative: a row of weight 2 counts as two. `None` counts every row once.
        prior: Temperature to which few rows are drawn; 1 is no calibration.
    """
    from scipy.optimize import minimize_scalar  # seconds to import, and not needed to classify

    margin, right, weight = margins_of(logits), *_platt_targets(targets, weights)
    total, before = float(weight.sum()), np.log(prior)

    def loss(log_temperature: float) -> float:
        penalty = ((log_temperature - before) / _TEMPERATURE_SPREAD) ** 2 / 2
        losses = margin_losses(margin / np.exp(log_temperature), right)
        return float(np.average(losses, weights=weight) + penalty / total)

    low, high = np.log(_TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def fit_one_of_temperature(
    scores: AnyFloat, classes: npt.NDArray[np.int64], *, weights: AnyFloat | None = None
) -> float:
    """Find the temperature with which `one_of_probabilities` has the least log loss.

    It makes up for what classifiers of one class against the rest do not know of each other. As in `fit_temperature`,
    a log-normal prior keeps the temperature of few rows near 1.

    Args:
        scores: Shape (n, classes), the calibrated probability of each class against the rest, of examples that the
            heads were not trained on.
        classes: Shape (n,), the number of each row's class.
        weights: As in `fit_temperature`.
    """
    from scipy.optimize import minimize_scalar

    weight = np.ones(len(classes)) if weights is None else np.asarray(weights, dtype=np.float64)
    total = float(weight.sum())

    def loss(log_temperature: float) -> float:
        shares = one_of_probabilities(scores, float(np.exp(log_temperature)))
        penalty = (log_temperature / _TEMPERATURE_SPREAD) ** 2 / 2
        return log_loss_of_classes(shares, classes, weights=weight) + penalty / total

    low, high = np.log(_TEMPERATURES)
    return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def fit_platt(margins: AnyFloat, targets: Targets, *, weights: AnyFloat | None = None) -> tuple[float, float]:
    """Fit Platt's line: P(class 1) = 1 / (1 + exp(-(scale * margin + bias))), by the least log loss.

    It calibrates zero-shot answers, whose margins lean to one side by habit of the language model, with two numbers
    that a few labels can tell. Targets are Platt's (1999, section 2.1), as in `fit_temperature`. The scale is above 0
    whatever the labels say, so that the order of the examples stays: answers that are worse than chance end as nearly
    one probability for all, and a question that is understood the wrong way round should be worded otherwise, not
    turned round in silence.

    Args:
        margins: Shape (n,): the logit of class 1 less that of class 0.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.

    Returns:
        Scale, above 0, and bias.
    """
    from scipy.optimize import minimize

    margin = np.asarray(margins, dtype=np.float64)
    right, weight = _platt_targets(targets, weights)
    mean = float(np.average(margin, weights=weight))
    # In units of their own spread margins of any size are equally easy.
    spread = float(np.sqrt(np.average((margin - mean) ** 2, weights=weight)))
    if spread <= _ROUNDING * abs(mean):  # they do not differ, and any scale will do
        spread = 1.0
    unit = (margin - mean) / spread

    def loss(line: Float) -> tuple[float, Float]:
        logit = line[0] * unit + line[1]
        slope = weight * (np.exp(-np.logaddexp(0.0, -logit)) - right) / weight.sum()
        value = float(np.average(margin_losses(logit, right), weights=weight))
        return value, np.array([slope @ unit, slope.sum()])

    found = minimize(loss, x0=np.array([1.0, 0.0]), jac=True, bounds=[_SLOPES, (None, None)], method="L-BFGS-B").x
    scale = float(found[0]) / spread
    return scale, float(found[1]) - scale * mean


@dataclass(frozen=True, slots=True)
class Fit:
    """A calibration and how well it fits.

    Attributes:
        calibration: What was kept.
        line: Scale and bias of Platt's line where that was kept, to be put before the calibration, else `None`.
        record: For the training record: `rows`; `method`, what was kept; `tried`, the log loss of each method; and
            `ece_before`, `ece_after`, `log_loss_before`, `log_loss_after`, all of the same rows. What follows a
            calibration is of rows that it was not fitted on, by `cross_fitted`.
    """

    calibration: Calibration
    line: tuple[float, float] | None
    record: dict[str, Any]


def fit_calibration(
    logits: AnyFloat,
    targets: Targets,
    *,
    weights: AnyFloat | None = None,
    groups: npt.NDArray[np.integer[Any]] | None = None,
    start: Calibration | None = None,
    zero_shot: bool = False,
    isotonic: bool = True,
    seed: int = 0,
) -> Fit:
    """Fit a temperature and, with many rows, an isotonic curve, or Platt's line, and keep the one that helps, or none.

    A calibration that is fitted to few rows can do harm. So one is kept only if its log loss on rows that it was not
    fitted on, in five folds, is less than without it. The curve (Zadrozny and Elkan, 2002, "Transforming classifier
    scores into accurate multiclass probability estimates") can take any rising shape, and needs many rows for it: it
    is tried with more than 1,000 rows.

    Args:
        logits: Shape (n, 2), of examples that the head was not trained on: out-of-fold, or held out.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.
        groups: Shape (n,): rows of one group are never in different folds. `None`: every row for itself.
        start: The calibration so far, which is kept if no other is better. `None`: there is none.
        zero_shot: Fit Platt's line instead: zero-shot answers lean to one side.
        isotonic: Whether a curve may be tried.
        seed: Of the folds.
    """
    start = start or Calibration()
    methods: list[Method] = []
    if _most_folds(logits, groups) > 1:  # one group says nothing of rows that a calibration has not seen
        many = isotonic and len(logits) > _ISOTONIC_ROWS
        methods = ["platt"] if zero_shot else ["temperature", "isotonic"] if many else ["temperature"]
    before = start.apply(logits)
    after: dict[Method, Float] = {"none": before}
    for method in methods:
        after[method] = cross_fitted(
            method, logits, targets, weights=weights, groups=groups, prior=start.temperature, seed=seed
        )
    losses = {method: log_loss(both[:, 1], targets, weights=weights) for method, both in after.items()}
    kept = min(losses, key=lambda method: losses[method])  # of equal ones the first
    record = calibration_record(kept, before, after[kept], targets, weights=weights) | {"tried": losses}
    if kept == "none":
        return Fit(start, None, record)
    if kept == "platt":
        return Fit(Calibration(), fit_platt(margins_of(logits), targets, weights=weights), record)
    return Fit(_FITS[kept](logits, targets, weights=weights, prior=start.temperature), None, record)


def refitted(
    calibration: Calibration, logits: AnyFloat, targets: Targets, *, weights: AnyFloat | None = None
) -> Calibration:
    """Fit the same kind of calibration to other rows: none, a temperature or an isotonic curve.

    Args:
        calibration: Which kind.
        logits: As in `fit_calibration`.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.
    """
    if calibration == Calibration():
        return calibration
    fit = _FITS["temperature" if calibration.isotonic is None else "isotonic"]
    return fit(logits, targets, weights=weights)


def fit_isotonic(
    logits: AnyFloat, targets: Targets, *, weights: AnyFloat | None = None, prior: float = 1.0
) -> Calibration:
    """Fit a temperature and an isotonic curve after it, whatever the number of rows.

    No probability comes nearer to 0 or 1 than 1 / (n + 2), with n rows, so that one surprise costs no infinite loss.

    Args:
        logits: As in `fit_calibration`.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.
        prior: As in `fit_temperature`.
    """
    from sklearn.isotonic import IsotonicRegression

    temperature = fit_temperature(logits, targets, weights=weights, prior=prior)
    margin = 1 / ((len(logits) if weights is None else float(weights.sum())) + 2)
    regression = IsotonicRegression(y_min=margin, y_max=1 - margin)
    regression.fit(probabilities(logits, temperature)[:, 1], np.asarray(targets, dtype=np.float64), weights)
    knots = len(regression.X_thresholds_)
    kept = np.linspace(0, knots - 1, min(knots, MOST_KNOTS)).round().astype(np.int64)
    curve = (tuple(regression.X_thresholds_[kept].tolist()), tuple(regression.y_thresholds_[kept].tolist()))
    return Calibration(temperature, curve)


def cross_fitted(
    method: Method,
    logits: AnyFloat,
    targets: Targets,
    *,
    weights: AnyFloat | None = None,
    groups: npt.NDArray[np.integer[Any]] | None = None,
    prior: float = 1.0,
    seed: int = 0,
) -> Float:
    """Return each row's probabilities, shape (n, 2), by a calibration that was fitted without its group.

    With these, and not with rows that it was fitted on, it is known what a calibration is worth. Five folds, fewer
    where there are fewer groups; a single group cannot be split, and its rows are calibrated by themselves.

    Args:
        method: What to fit: a temperature, a temperature and an isotonic curve, Platt's line, or nothing.
        logits: As in `fit_calibration`.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.
        groups: As in `fit_calibration`.
        prior: As in `fit_temperature`.
        seed: Of the folds.
    """
    fit: Callable[..., Calibration | _Line] = _fit_line if method == "platt" else _FITS[method]
    folds = _most_folds(logits, groups)
    if folds == 1:
        return fit(logits, targets, weights=weights, prior=prior).apply(logits)
    from sklearn.model_selection import GroupKFold

    groups = np.arange(len(logits)) if groups is None else groups
    both = np.empty((len(logits), 2))
    for seen, unseen in GroupKFold(folds, shuffle=True, random_state=seed).split(logits, groups=groups):
        fitted = fit(logits[seen], targets[seen], weights=None if weights is None else weights[seen], prior=prior)
        both[unseen] = fitted.apply(logits[unseen])
    return both


def calibration_record(
    method: Method,
    before: Float,
    after: Float,
    targets: Targets,
    *,
    weights: AnyFloat | None = None,
) -> dict[str, Any]:
    """Describe how much a calibration helps, for the training record.

    Args:
        method: What was kept.
        before: The probabilities without it, shape (n, 2), of rows that the head was not trained on.
        after: Those with it, shape (n, 2), of the same rows, by a calibration that was not fitted on them.
        targets: As in `fit_temperature`.
        weights: As in `fit_temperature`.

    Returns:
        As `Fit.record` has it, but for `tried`.
    """
    record: dict[str, Any] = {"rows": len(before), "method": method}
    for name, both in (("before", before), ("after", after)):
        record[f"ece_{name}"] = expected_calibration_error(both[:, 1], targets, weights=weights)
        record[f"log_loss_{name}"] = log_loss(both[:, 1], targets, weights=weights)
    return record


@dataclass(frozen=True, slots=True)
class _Line:
    """Platt's line, applied as a calibration is."""

    scale: float
    bias: float

    def apply(self, logits: AnyFloat) -> Float:
        line = self.scale * margins_of(logits) + self.bias
        return probabilities(np.stack([np.zeros_like(line), line], axis=1))


def _fit_line(logits: AnyFloat, targets: Targets, *, weights: AnyFloat | None, prior: float) -> _Line:
    return _Line(*fit_platt(margins_of(logits), targets, weights=weights))


_FITS: dict[Method, Callable[..., Calibration]] = {
    "none": lambda *_, **__: Calibration(),
    "temperature": lambda *rows, **given: Calibration(fit_temperature(*rows, **given)),
    "isotonic": fit_isotonic,
}


def _most_folds(logits: AnyFloat, groups: npt.NDArray[np.integer[Any]] | None) -> int:
    return min(_FOLDS, len(logits) if groups is None else len(np.unique(groups)))


def _platt_targets(targets: Targets, weights: AnyFloat | None) -> tuple[Float, Float]:
    """Return targets that the number of rows allows to believe in, and weights, both of shape (n,)."""
    target = np.asarray(targets, dtype=np.float64)
    weight = np.ones(len(target)) if weights is None else np.asarray(weights, dtype=np.float64)
    positives, negatives = float(weight @ target), float(weight @ (1 - target))
    return target * (positives + 1) / (positives + 2) + (1 - target) / (negatives + 2), weight
