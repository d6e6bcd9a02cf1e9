"""How the head got better with the number of labels, what more labels would add, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from qwen_vl_classifier.classifier.calibration import fit_platt
from qwen_vl_classifier.classifier.probabilities import Float, margin_losses
from qwen_vl_classifier.labelling.live_estimate import Figure
from qwen_vl_classifier.labelling.live_head import LiveHead, fit_parts, head_inputs, label_folds
from qwen_vl_classifier.labelling.pool_features import PoolFeatures
from qwen_vl_classifier.labelling.power_law import PowerLaws, fit_power_laws
from qwen_vl_classifier.training.probe.logistic import fit_logistic
from qwen_vl_classifier.training.probe.search import PENALTIES
from qwen_vl_classifier.training.splitting import Folds, RowNumbers
from qwen_vl_classifier.training.uncertainty import resampled

METRIC = "accuracy"
MORE = 50
"""Labels whose worth is estimated."""

ENOUGH = 0.005
"""Accuracy that may be left to gain where it is time to stop."""

_SHARES = (0.25, 0.35, 0.5, 0.7, 1.0)  # of the labels, in the order in which they were given
_FEWEST_LABELS = 40
_FEWEST_RANDOM = 20  # labelled rows that were drawn at random
_FEWEST_OF_A_CLASS = 5
_FOLDS = 5
_DRAWS = 300
_TRAINING_SPREAD = 0.3  # of what a part of the labels costs, the standard deviation from one such part to another
_LEAST_SPREAD = 0.02
_LINE_RIDGE = 1e-4
_UNSEEN = 0.5  # wrong answers that may be there where none was seen
_NO_SKILL = (
    "Not yet shown to be better than always giving the more frequent answer, so what more labels would add cannot be "
    "estimated."
)
_INTERVAL = (2.5, 97.5)  # per cent
_SURE = 90.0  # per cent of the curves that may be true, for which it must be time to stop
_FIT_POINTS = 20
_FIT_REACH = 1.5  # how far beyond the present number of labels the fitted curve is given


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """How accuracy depends on the number of labels.

    Attributes:
        sentence: What it says, in plain English.
        metric: What the values are: "accuracy", from 0 to 1.
        points: Number of labels, accuracy on rows drawn at random, and the ends of its 95 % interval.
        fit: Number of labels and accuracy by the fitted power law, up to half as many labels more.
        level: The accuracy at which the curve levels off; `None` where the labels do not tell.
        gain_of_next_50: What the next 50 labels add to accuracy; likewise `None`.
        left: What any number of labels would add; likewise `None`.
        stop: Whether it is time to stop: nine in ten curves that fit leave less than half a point to gain.
    """

    sentence: str
    metric: str = METRIC
    points: list[tuple[int, float, float, float]] = field(default_factory=list)
    fit: list[tuple[float, float]] = field(default_factory=list)
    level: Figure | None = None
    gain_of_next_50: Figure | None = None
    left: Figure | None = None
    stop: bool = False


def learning_curve(
    pool: PoolFeatures,
    head: LiveHead,
    counted: npt.NDArray[np.bool_],
    *,
    start: Float | None = None,
    seed: int = 0,
) -> LearningCurve:
    """Measure the head after part of the labels, in the order in which they were given, and continue the curve.

    Each part is measured on all labelled rows that were drawn at random, a fifth of them at a time, which are left out
    of training. So the points differ by their labels alone, and not by the rows that judge them.

    Args:
        pool: Features of all rows.
        head: The present one.
        counted: Shape (n,): the rows of the pool that are a random sample of it (`RandomShare.counted`).
        start: Shape (n,), as for `fit_live_head`.
        seed: Of folds and bootstrap.
    """
    random = np.flatnonzero(counted[head.rows])
    missing = max(
        _FEWEST_LABELS - len(head.rows),
        _FEWEST_OF_A_CLASS - int(np.bincount(head.labels, minlength=2).min()),
        round((_FEWEST_RANDOM - len(random)) * len(head.rows) / max(1, len(random))),
    )
    groups = pool.groups[head.rows]
    parts = label_folds(head.labels, groups, _FOLDS, seed)
    if missing > 0 or not parts:
        return LearningCurve(f"Not enough labels to tell: give about {max(missing, 1)} more.")
    sizes, margins = _measured(pool, head, parts, start)
    if len(sizes) < 3:
        return LearningCurve("Not enough labels of both answers to tell: give some more.")
    labels = head.labels[random]
    _, own = np.unique(groups[random], return_inverse=True)
    weights = np.concatenate([np.ones((1, len(random))), *resampled(own.astype(np.int64), _DRAWS, seed=seed)])
    errors = _errors(margins[:, random], labels, weights)
    found, drawn = errors[0], errors[1:]
    training = _TRAINING_SPREAD * np.maximum(found - found.min(), _LEAST_SPREAD)
    noise = np.random.default_rng(seed).normal(size=drawn.shape) * training
    laws = fit_power_laws(sizes, drawn + noise, np.cov(drawn.T) + np.diag(training**2), seed=seed)
    now = float(len(head.rows))
    points = [
        (round(size), 1 - error, *(1 - np.percentile(line, _INTERVAL[::-1])).tolist())
        for size, error, line in zip(sizes, found, drawn.T, strict=True)
    ]
    majority = float(max(labels.mean(), 1 - labels.mean()))
    if points[-1][2] <= majority:  # what has not begun to fall cannot be continued
        return LearningCurve(_NO_SKILL, points=points)
    gain = _figure(laws.errors(now) - laws.errors(now + MORE))
    left = laws.errors(now) - laws.level
    stop = bool(np.percentile(left, _SURE) <= ENOUGH)
    return LearningCurve(
        _sentence(gain, stop),
        points=points,
        fit=_fitted(laws, float(sizes[0]), now),
        level=_figure(1 - laws.level),
        gain_of_next_50=gain,
        left=_figure(left),
        stop=stop,
    )


def _measured(pool: PoolFeatures, head: LiveHead, parts: Folds, start: Float | None) -> tuple[Float, Float]:
    """Return the mean number of labels that each part of them trains on, and out-of-fold margins, shape (parts, m)."""
    known = len(head.rows)
    weightings, sizes = [], []
    for share in _SHARES:
        first = np.arange(known) < round(share * known)
        weights = np.stack([first.astype(np.float64) for _ in parts])
        for line, (_, held) in zip(weights, parts, strict=True):
            line[held] = 0.0
        if all(len({*head.labels[line > 0].tolist()}) == 2 for line in weights):
            weightings.append(weights)
            sizes.append(float(weights.sum(axis=1).mean()))
    if not sizes:
        return np.zeros(0), np.zeros((0, known))
    if head.kind == "start":
        assert start is not None
        found = [_platt(start[head.rows], head.labels, weights, parts) for weights in weightings]
        return np.array(sizes), np.stack(found)
    inputs = head_inputs(pool, head.tap, head.rows, start if head.kind == "joined" else None)
    penalties = _penalties(head.l2)
    margins, _, _ = fit_parts(inputs, head.labels, np.concatenate(weightings), penalties)
    each = margins.reshape(len(penalties), len(sizes), len(parts), known)
    out_of_fold = np.empty((len(penalties), len(sizes), known))
    for number, (_, held) in enumerate(parts):
        out_of_fold[:, :, held] = each[:, :, number, held]
    losses = margin_losses(np.moveaxis(out_of_fold, 2, 0), head.labels.astype(np.float64))
    chosen = []
    for number, weights in enumerate(weightings):
        inside = weights.sum(axis=0) > 0
        chosen.append(out_of_fold[int(losses[inside, :, number].sum(axis=0).argmin()), number])
    return np.array(sizes), np.stack(chosen)


def _errors(margins: Float, labels: RowNumbers, weights: Float) -> Float:
    """Return the error after each part of the labels, for each weighting of the rows, shape (weightings, parts).

    How it falls is told by what calibrated answers expect of themselves, which varies far less from sample to sample
    than the number of wrong answers, whose noise would hide what some labels more are worth. How large it is, over all
    parts, is told by the wrong answers.

    Args:
        margins: Shape (parts, rows), out of fold.
        labels: Shape (rows,).
        weights: Shape (weightings, rows).
    """
    expected = np.stack([_expected_errors(line, labels, weights) for line in margins], axis=1)
    wrong = weights @ ((margins >= 0) != (labels == 1)).T / weights.sum(axis=1, keepdims=True)
    unseen = _UNSEEN / len(labels)
    scale = (wrong.mean(axis=1) + unseen) / (expected.mean(axis=1) + unseen)
    errors: Float = np.minimum(expected * scale[:, None], 1.0)
    return errors


def _expected_errors(margins: Float, labels: RowNumbers, weights: Float) -> Float:
    """Return how often the less likely class is expected, by answers with Platt's calibration and his targets.

    (1999, "Probabilistic outputs for support vector machines".) Shape (weightings,).
    """
    ones = int(labels.sum())
    targets = np.where(labels == 1, (ones + 1) / (ones + 2), 1 / (len(labels) - ones + 2))
    unit = (margins - margins.mean()) / (float(margins.std()) or 1.0)
    fit = fit_logistic(torch.from_numpy(unit)[:, None], targets, weights, np.full(len(weights), _LINE_RIDGE))
    slopes = np.maximum(fit.coefficients, 0.0)  # answers that are worse than chance say nothing
    shares = weights @ targets / weights.sum(axis=1)
    biases = np.where(slopes[:, 0] > 0, fit.intercepts, np.log(shares / (1 - shares)))
    less_likely = np.exp(-np.logaddexp(0.0, np.abs(slopes * unit + biases[:, None])))
    errors: Float = (weights * less_likely).sum(axis=1) / weights.sum(axis=1)
    return errors


def _penalties(l2: float | None) -> Sequence[float]:
    """Return the head's penalty and two stronger ones, which suit fewer labels."""
    at = PENALTIES.index(l2 or PENALTIES[0])
    return PENALTIES[max(0, at - 2) : at + 1]


def _platt(start: Float, labels: RowNumbers, weights: Float, parts: Folds) -> Float:
    found = np.empty(len(labels))
    for line, (_, held) in zip(weights, parts, strict=True):
        rows = np.flatnonzero(line)
        scale, bias = fit_platt(start[rows], labels[rows])
        found[held] = scale * start[held] + bias
    return found


def _figure(draws: Float) -> Figure:
    low, high = np.percentile(draws, _INTERVAL)
    return float(np.clip(draws.mean(), low, high)), float(low), float(high)


def _fitted(laws: PowerLaws, first: float, now: float) -> list[tuple[float, float]]:
    return [
        (float(size), float(np.mean(1 - laws.errors(size))))
        for size in np.geomspace(first, _FIT_REACH * now, _FIT_POINTS)
    ]


def _sentence(gain: Figure, stop: bool) -> str:
    value, low, high = (100 * end for end in gain)
    worth = f"{MORE} more labels would add about {value:.1f} points of accuracy ({low:.1f} to {high:.1f})."
    return f"Within half a point of where it will level off: you can stop. {worth}" if stop else worth
