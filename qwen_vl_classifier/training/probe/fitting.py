"""From rows of features to a head with its calibration and threshold: all of `train` that needs no backbone."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import GroupKFold
from torch import nn

from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.calibration import (
    Calibration,
    calibration_record,
    fit_calibration,
    fit_platt,
)
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.head import HeadSpec, fold_line
from qwen_vl_classifier.classifier.probabilities import Float, logits_of, margin_losses, margins_of
from qwen_vl_classifier.classifier.thresholds import choose_threshold
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.targets import classes_of
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.training.overlap import Contents, Novelty
from qwen_vl_classifier.training.probe.candidates import Candidate
from qwen_vl_classifier.training.probe.estimate import held_out_estimate, search_estimate
from qwen_vl_classifier.training.probe.heads import Standardised, linear_head, linear_margins, mlp_head, validate_mlp
from qwen_vl_classifier.training.probe.search import ZERO_SHOT_TAP, Search, search
from qwen_vl_classifier.training.probe.threads import threads_for
from qwen_vl_classifier.training.splitting import Folds, folds, grouping_of

_log = logging.getLogger(__name__)

_CHOICES = 10  # folds, for each of which a candidate is chosen on the others


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Rows with all that training needs of them.

    Attributes:
        taps: Where the features were read.
        features: Shape (n, taps, hidden).
        targets: Shape (n,), the probability of class 1.
        weights: Shape (n,).
        groups: Shape (n,).
        across: Shape (n,): other groups, of which no fold shares any either; `None` where there are none.
        measured: Shape (n,), true for rows on which the estimate is made; `None` makes it on all rows.
    """

    taps: Sequence[Tap]
    features: npt.NDArray[np.float32]
    targets: Float
    weights: Float
    groups: npt.NDArray[np.int64]
    across: npt.NDArray[np.int64] | None = None
    measured: npt.NDArray[np.bool_] | None = None

    def at(self, tap: Tap) -> npt.NDArray[np.float32]:
        """Return the features of one tap, shape (n, hidden)."""
        return self.features[:, self.taps.index(tap)]

    def take(self, rows: npt.NDArray[np.int64]) -> FeatureRows:
        """Return some of the rows."""
        if len(rows) == len(self.targets):  # features may fill much of the memory: they are not copied
            return self
        across = None if self.across is None else self.across[rows]
        measured = None if self.measured is None else self.measured[rows]
        return FeatureRows(
            self.taps, self.features[rows], self.targets[rows], self.weights[rows], self.groups[rows], across, measured
        )


@dataclass(frozen=True, slots=True)
class Fitted:
    """A head with what turns its logits into answers.

    Attributes:
        search: What was tried, and the chosen one.
        head: The chosen head, trained on all rows.
        spec: Its shape.
        calibration: Fitted on out-of-fold answers.
        threshold: Chosen on out-of-fold answers.
        record: Of the calibration, for the training record.
        unrestricted: What is found where taps and heads need not be exportable; `None` where they need not be anyway.
    """

    search: Search
    head: nn.Module
    spec: HeadSpec
    calibration: Calibration
    threshold: float
    record: dict[str, Any]
    unrestricted: Search | None = None

    @property
    def scores(self) -> Float:
        """Calibrated probabilities of class 1, out of fold, shape (n,)."""
        return self.calibration.apply(logits_of(self.search.best.margins))[:, 1]

    def estimate(self, rows: FeatureRows, config: TrainConfig) -> dict[str, Any]:
        """Estimate how good it will be on new rows, from the rows that it was chosen on; see `search_estimate`."""
        return search_estimate(
            _margins(self.search),
            next(number for number, one in enumerate(self.search.candidates) if one is self.search.best),
            self.calibration,
            self.threshold,
            rows.targets,
            rows.weights,
            rows.groups,
            objective=config.objective,
            seed=config.seed,
            measured=rows.measured,
        )


def fit_rows(
    rows: FeatureRows,
    taps: Sequence[Tap],
    config: TrainConfig,
    *,
    baseline: Classifier | None = None,
    progress: bool = False,
) -> Fitted:
    """Choose tap and head by cross-validation, train the chosen one on all rows, calibrate it and set its threshold.

    Args:
        rows: Rows of both classes, weights above 0.
        taps: What to try: the first taps of the rows, in their order. The others are tried where it is to be known
            what being exportable costs.
        config: Options.
        baseline: The zero-shot classifier, if it is tried.
        progress: Show progress bars on what takes more than two seconds.

    Raises:
        DataError: Too few rows or groups for cross-validation.
        TrainingError: A head reached no finite loss, or the objective is out of reach.
    """
    zero_shot = margins_of(baseline.logits_of(rows.at(ZERO_SHOT_TAP))) if baseline else None

    def search_at(taps: Sequence[Tap], config: TrainConfig) -> Search:
        return search(
            rows.features[:, : len(taps)],
            rows.targets,
            rows.groups,
            taps,
            config,
            weights=rows.weights,
            across=rows.across,
            zero_shot=zero_shot,
            progress=progress,
        )

    began = time.perf_counter()
    found = search_at(taps, config)
    _log.debug("compared %d candidates in %.1f s", len(found.table), time.perf_counter() - began)
    unrestricted = search_at(rows.taps, replace(config, heads="auto", exportable=False)) if config.exportable else None
    head, spec = _refit(found.best, rows, zero_shot, baseline, config)
    return Fitted(found, head, spec, *_calibrate(found, rows, zero_shot, config), unrestricted)


def estimate_on_new_texts(
    best: Candidate,
    calibration: Calibration,
    threshold: float,
    rows: FeatureRows,
    examples: Sequence[Example],
    contents: Contents,
    config: TrainConfig,
) -> dict[str, Any] | None:
    """Estimate how good a chosen head is where texts are new too, by folds that are whole in texts and pictures.

    The head is trained again for these folds, on fewer rows than the one that is kept; tap, kind of head, calibration
    and threshold stay.

    Args:
        best: What was chosen.
        calibration: Of its answers.
        threshold: From which the label is 1.
        rows: All rows.
        examples: What the rows are of.
        contents: What the examples hold.
        config: Options.

    Returns:
        As `held_out_estimate` has it; `None` where such folds cannot be made.
    """
    groups, across = grouping_of(examples, "both", pictures=contents.pictures)
    try:
        parts = folds(classes_of(rows.targets), groups, config.folds, config.seed, across=across)
    except DataError:
        return None
    probability = calibration.apply(logits_of(_margins_on(parts, best, rows, config)))[:, 1]
    on = slice(None) if rows.measured is None else rows.measured
    found = held_out_estimate(
        probability[on], threshold, rows.targets[on], rows.weights[on], groups[on], seed=config.seed
    )
    return {**found, "method": "cross-validation", "stands_for": str(Novelty.of(contents, parts))}


def _margins_on(parts: Folds, best: Candidate, rows: FeatureRows, config: TrainConfig) -> Float:
    if best.head in ("zero-shot", "calibrated"):  # which learn nothing of a text
        return best.margins
    data = Standardised.of(rows.at(best.tap))
    with threads_for(*data.inputs.shape):
        if best.l2 is None:
            return validate_mlp(data, rows.targets, rows.weights, parts, config).margins
        margins: Float = linear_margins(data, rows.targets, rows.weights, parts, [best.l2])[0]
    return margins


def _refit(
    best: Candidate, rows: FeatureRows, zero_shot: Float | None, baseline: Classifier | None, config: TrainConfig
) -> tuple[nn.Module, HeadSpec]:
    """Train the chosen head on all rows."""
    if best.head in ("zero-shot", "calibrated"):
        assert baseline is not None
        assert zero_shot is not None
        head = copy.deepcopy(baseline.head)  # the baseline of further labels too
        if best.head == "calibrated":
            fold_line(head, *fit_platt(zero_shot, rows.targets, weights=rows.weights))
        return head, baseline.spec
    data = Standardised.of(rows.at(best.tap))
    with threads_for(*data.inputs.shape):
        if best.l2 is not None:
            return linear_head(data, rows.targets, rows.weights, best.l2)
        return mlp_head(data, rows.targets, rows.weights, best.epochs or 1, config)


def _calibrate(
    found: Search, rows: FeatureRows, zero_shot: Float | None, config: TrainConfig
) -> tuple[Calibration, float, dict[str, Any]]:
    """Fit calibration and threshold on out-of-fold answers; return both and the record of the calibration."""
    logits = logits_of(found.best.margins)
    if found.best.head == "calibrated":  # its line is its calibration, and in its head
        assert zero_shot is not None
        fitted = Calibration()
        before, after = (fitted.apply(both) for both in (logits_of(zero_shot), logits))
        record = calibration_record("platt", before, after, rows.targets, weights=rows.weights)
    else:
        honest = logits_of(_chosen_by_others(_margins(found), rows, config.seed))
        fit = fit_calibration(
            honest,
            rows.targets,
            weights=rows.weights,
            groups=rows.groups,
            isotonic=not config.exportable,
            seed=config.seed,
        )
        fitted, record = fit.calibration, fit.record
    threshold = choose_threshold(
        fitted.apply(logits)[:, 1], classes_of(rows.targets), config.objective, weights=rows.weights
    )
    return fitted, threshold, record


def _margins(found: Search) -> Float:
    return np.stack([candidate.margins for candidate in found.candidates], axis=1)


def _chosen_by_others(margins: Float, rows: FeatureRows, seed: int) -> Float:
    """Return for each row the out-of-fold margin of the candidate that is best on other groups, shape (n,).

    The winner's own margins look better than they are, since it won on these very rows: what is calibrated on them
    would be too sure.
    """
    losses = rows.weights[:, None] * margin_losses(margins, rows.targets)
    chosen = np.empty(len(margins))
    number = min(_CHOICES, len(np.unique(rows.groups)))
    for others, own in GroupKFold(number, shuffle=True, random_state=seed).split(margins, groups=rows.groups):
        chosen[own] = margins[own, int(losses[others].sum(axis=0).argmin())]
    return chosen
