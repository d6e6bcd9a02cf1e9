"""The head of one label while people answer: chosen and trained again after every few answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.calibration import fit_platt
from qwen_vl_classifier.classifier.probabilities import Float, margin_losses
from qwen_vl_classifier.labelling.pool_features import PoolFeatures
from qwen_vl_classifier.training.probe.logistic import fit_logistic
from qwen_vl_classifier.training.probe.search import PENALTIES
from qwen_vl_classifier.training.probe.threads import threads_for
from qwen_vl_classifier.training.splitting import Folds, RowNumbers

Kind = Literal["linear", "start", "joined"]
"""Logistic regression on features, the calibrated margins to start from, or the first with the second as a feature."""

_GROWTH = 1.5  # of the number of labels, after which the tap is chosen again
_MANY_FOLDS, _FEW_FOLDS, _FEW_LABELS = 10, 5, 50
_CLOSE_ENOUGH = 1e-5  # to the minimum, for log losses that are compared on a few hundred rows
_SEARCHED = PENALTIES[:7:2]  # weaker ones are reached step by step, where there are labels enough
_UNCERTAIN_PENALTY = PENALTIES[2]  # where nothing can be held out to choose one
_WEAKER = 0.25  # by which the summed log loss of a penalty one step weaker has to be better
_JOINED_TAPS = 3  # best taps, at which the margins to start from are joined to the features
_START_GAIN = 8.0  # the margins to start from count as a feature this many times as large as others


@dataclass(frozen=True, slots=True)
class LiveHead:
    """A head for one label, and its answers.

    Attributes:
        tap: Where it reads.
        kind: What it is.
        l2: Penalty of logistic regression; `None` for "start".
        margins: float64, shape (n,): the log odds of class 1 of every row of the pool; the label is 1 from 0.
        rows: int64, shape (m,): numbers of the labelled rows, in the order given.
        labels: int64, shape (m,), 0 or 1.
        out_of_fold: float64, shape (m,): the log odds of class 1 of each labelled row, by heads that were trained, and
            chosen, on other groups; 0 where the others do not hold both classes.
        folds: Number of folds; 0 where none could be made.
        searched: Number of labels when the tap was chosen.
        weights: float64, shape (hidden,): of the features at the tap, as they are.
        bias: Of the margin.
        start_weight: Of the margins to start from.
    """

    tap: Tap
    kind: Kind
    l2: float | None
    margins: Float
    rows: RowNumbers
    labels: RowNumbers
    out_of_fold: Float
    folds: int
    searched: int
    weights: Float
    bias: float
    start_weight: float

    @property
    def log_loss(self) -> float:
        """The mean log loss of the out-of-fold answers."""
        return float(margin_losses(self.out_of_fold, self.labels.astype(np.float64)).mean())

    @property
    def prior_log_loss(self) -> float:
        """The mean log loss of giving every labelled row the share of class 1."""
        share = float(self.labels.mean())
        return -share * math.log(share) - (1 - share) * math.log(1 - share)

    def margins_of(self, features: npt.NDArray[np.floating], start: Float | None = None) -> Float:
        """Return the log odds of class 1 of rows that are not in the pool, shape (k,).

        Args:
            features: Shape (k, hidden), at the tap.
            start: Shape (k,), the margins to start from, where the head was given such.
        """
        margins: Float = np.asarray(features, dtype=np.float64) @ self.weights + self.bias
        return margins if start is None else margins + self.start_weight * start


@dataclass(frozen=True, slots=True)
class _Tried:
    """A candidate with its answers.

    Attributes:
        tap: Where it reads.
        kind: What it is.
        l2: Penalty of logistic regression.
        held: Shape (m,), the margins out of fold.
        coefficients: Of the inputs of the head that was trained on all labels; for "start" of its one input.
        intercept: Of that head.
    """

    tap: Tap
    kind: Kind
    l2: float | None
    held: Float
    coefficients: Float
    intercept: float


def fit_live_head(
    pool: PoolFeatures,
    rows: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    start: Float | None = None,
    before: LiveHead | None = None,
    seed: int = 0,
) -> LiveHead | None:
    """Choose a head by cross-validation and train it on all labels: the logistic regression of `train`.

    The tap is chosen again whenever the number of labels has grown by half; in between, the penalty moves by one
    step at most. Folds are whole in groups. A few labels tell little of many candidates, and the best of many looks
    good by chance: a tap other than the usual one and a weaker penalty have to be clearly better.

    Args:
        pool: Features of all rows.
        rows: Shape (m,), numbers of the labelled rows, each once.
        labels: Shape (m,), 0 or 1.
        start: Shape (n,), margins of every row from before any label, as of zero-shot or a saved classifier. They
            compete with what is learned, alone and as one more feature.
        before: The head of the previous answers.
        seed: Of the folds.

    Returns:
        `None` while only one class has a label.

    Raises:
        TrainingError: A feature is not finite.
    """
    number, label = np.asarray(rows, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    if len({*label.tolist()}) < 2:
        return None
    warm = before if before is not None and before.folds and len(number) < _GROWTH * before.searched else None
    parts = label_folds(label, pool.groups[number], _FEW_FOLDS if len(number) > _FEW_LABELS else _MANY_FOLDS, seed)
    tried: list[_Tried] = []
    l2 = _penalties(None if warm is None else warm.l2, bool(parts))
    for tap in pool.distinct if warm is None else [warm.tap]:
        tried += _linear(pool, tap, number, label, parts, l2, None)
    if start is not None:
        for tap in _leading(tried, label):
            tried += _linear(pool, tap, number, label, parts, l2, start)
        tried.append(_started(start[number], label, parts, pool.usual if warm is None else warm.tap))
    losses = margin_losses(np.stack([one.held for one in tried], axis=1), label.astype(np.float64))
    handicaps = np.array([_handicap(one, pool, warm) for one in tried])
    best = tried[int((losses.sum(axis=0) + handicaps).argmin())]
    out_of_fold = np.zeros(len(label))
    for _, held in parts:  # the winner's own margins look better than they are, since it won on these very rows
        others = losses.sum(axis=0) - losses[held].sum(axis=0) + handicaps
        out_of_fold[held] = tried[int(others.argmin())].held[held]
    weights, bias, start_weight = _on_features(best, pool, start)
    margins = np.full(len(pool), bias) if best.kind == "start" else pool.margins(best.tap, weights, bias)
    if start is not None:
        margins += start_weight * start
    return LiveHead(
        tap=best.tap,
        kind=best.kind,
        l2=best.l2,
        margins=margins,
        rows=number,
        labels=label,
        out_of_fold=out_of_fold,
        folds=len(parts),
        searched=len(number) if warm is None else warm.searched,
        weights=weights,
        bias=bias,
        start_weight=start_weight,
    )


def label_folds(labels: RowNumbers, groups: RowNumbers, count: int, seed: int) -> Folds:
    """Split labelled rows for cross-validation, stratified by class and whole in groups; every row is held out once.

    `folds` of `train` balances groups of any size one by one, which takes seconds for thousands of labels. Here groups
    are dealt out in turns, those with more of class 1 first.

    Args:
        labels: Shape (m,), 0 or 1.
        groups: Shape (m,), numbers of groups.
        count: Of folds; fewer are made where the rarer class has fewer groups.
        seed: Of the order of groups that are alike.

    Returns:
        For each fold the rows to train on, which hold both classes, and the rows held out; empty where no two such
        folds can be made.
    """
    _, own = np.unique(groups, return_inverse=True)
    sizes = np.bincount(own)
    share = np.bincount(own, weights=labels) / sizes
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(sizes)), -sizes, -share))
    scarcest = min(int((share > 0).sum()), int((share < 1).sum()))
    for number in range(min(count, scarcest, len(sizes)), 1, -1):
        turn = np.empty(len(sizes), dtype=np.int64)
        turn[order] = np.arange(len(sizes)) % number
        fold = turn[own]
        parts = [(np.flatnonzero(fold != one), np.flatnonzero(fold == one)) for one in range(number)]
        if all(len({*labels[rows].tolist()}) == 2 for rows, _ in parts):
            return parts
    return []


def fit_parts(
    inputs: torch.Tensor, labels: RowNumbers, weights: Float, penalties: Sequence[float]
) -> tuple[Float, Float, Float]:
    """Fit logistic regression with each penalty to each weighting of the rows, all at once.

    Args:
        inputs: Shape (m, hidden), standardised.
        labels: Shape (m,), 0 or 1.
        weights: Shape (weightings, m).
        penalties: What to try.

    Returns:
        Margins of all rows, shape (penalties, weightings, m); coefficients, shape (penalties, weightings, hidden); and
        intercepts, shape (penalties, weightings).
    """
    shape = len(penalties), len(weights)
    with threads_for(*inputs.shape):
        fit = fit_logistic(
            inputs,
            labels.astype(np.float64),
            np.tile(weights, (shape[0], 1)),
            np.repeat(np.asarray(penalties, dtype=np.float64), shape[1]),
            tolerance=_CLOSE_ENOUGH,
        )
    return (
        fit.margins.reshape(*shape, -1),
        fit.coefficients.reshape(*shape, -1),
        fit.intercepts.reshape(*shape),
    )


def head_inputs(pool: PoolFeatures, tap: Tap, rows: RowNumbers, start: Float | None) -> torch.Tensor:
    """Return the inputs of rows, shape (m, inputs), with the margins to start from, of shape (n,), as one more."""
    inputs = pool.inputs(tap, rows)
    if start is None:
        return inputs
    scale, shift = _start_line(start)
    extra = torch.from_numpy(scale * start[rows] + shift).float()
    return torch.cat([inputs, extra[:, None]], dim=1)


def _start_line(start: Float) -> tuple[float, float]:
    """Return scale and shift that make a feature of the margins to start from."""
    scale = _START_GAIN / (float(start.std()) or 1.0)
    return scale, -scale * float(start.mean())


def _handicap(one: _Tried, pool: PoolFeatures, warm: LiveHead | None) -> float:
    """Return by how much a candidate has to be better, in summed log loss, since the best of many is so by chance."""
    tap = math.log(len(pool.distinct)) if warm is None and one.tap != pool.usual else 0.0
    return tap + (0.0 if one.l2 is None else _WEAKER * PENALTIES.index(one.l2))


def _penalties(before: float | None, parts: bool) -> tuple[float, ...]:
    if not parts:
        return (_UNCERTAIN_PENALTY,)
    if before is None:
        return _SEARCHED
    at = PENALTIES.index(before)
    return PENALTIES[max(0, at - 1) : at + 2]


def _leading(tried: Sequence[_Tried], labels: RowNumbers) -> list[Tap]:
    """Return the taps that lead so far."""
    losses = margin_losses(np.stack([one.held for one in tried], axis=1), labels.astype(np.float64)).sum(axis=0)
    return list(dict.fromkeys(tried[number].tap for number in losses.argsort(kind="stable")))[:_JOINED_TAPS]


def _linear(
    pool: PoolFeatures,
    tap: Tap,
    rows: RowNumbers,
    labels: RowNumbers,
    parts: Folds,
    penalties: Sequence[float],
    start: Float | None,
) -> list[_Tried]:
    weights = np.ones((len(parts) + 1, len(rows)))  # the last is of all rows
    for line, (_, held) in zip(weights, parts, strict=False):
        line[held] = 0.0
    margins, coefficients, intercepts = fit_parts(head_inputs(pool, tap, rows, start), labels, weights, penalties)
    out_of_fold = np.zeros((len(penalties), len(rows)))
    for number, (_, held) in enumerate(parts):
        out_of_fold[:, held] = margins[:, number, held]
    return [
        _Tried(tap, "linear" if start is None else "joined", l2, line, each[-1], float(bias[-1]))
        for l2, line, each, bias in zip(penalties, out_of_fold, coefficients, intercepts, strict=True)
    ]


def _started(start: Float, labels: RowNumbers, parts: Folds, tap: Tap) -> _Tried:
    """Try the margins to start from alone, with a scale and a bias."""
    out_of_fold = np.zeros(len(labels))
    for rows, held in parts:
        scale, bias = fit_platt(start[rows], labels[rows])
        out_of_fold[held] = scale * start[held] + bias
    scale, bias = fit_platt(start, labels)
    return _Tried(tap, "start", None, out_of_fold, np.array([scale]), bias)


def _on_features(best: _Tried, pool: PoolFeatures, start: Float | None) -> tuple[Float, float, float]:
    """Return weights of the features as they are, the bias, and the weight of the margins to start from."""
    if best.kind == "start":
        return np.zeros(pool.hidden), best.intercept, float(best.coefficients[0])
    if best.kind == "linear":
        return *pool.unfolded(best.tap, best.coefficients, best.intercept), 0.0
    assert start is not None
    weights, bias = pool.unfolded(best.tap, best.coefficients[:-1], best.intercept)
    scale, shift = _start_line(start)
    own = float(best.coefficients[-1])
    return weights, bias + own * shift, own * scale
