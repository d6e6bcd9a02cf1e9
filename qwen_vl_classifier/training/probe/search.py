"""Choosing a tap and a head by cross-validation, on features that were read once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.classifier.calibration import fit_platt
from qwen_vl_classifier.classifier.probabilities import Float, margin_losses
from qwen_vl_classifier.classifier.ranking import auroc
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.targets import classes_of
from qwen_vl_classifier.errors import TrainingError
from qwen_vl_classifier.progress_bars import tqdm
from qwen_vl_classifier.training.probe.candidates import Candidate, distinct_taps
from qwen_vl_classifier.training.probe.heads import Standardised, linear_margins, validate_mlp
from qwen_vl_classifier.training.probe.threads import side_by_side, threads_for
from qwen_vl_classifier.training.splitting import Folds, folds

PENALTIES = tuple(float(penalty) for penalty in np.logspace(1, -3.5, 10))
"""L2 penalties of logistic regression on standardised features, the strongest first."""

ZERO_SHOT_TAP = Tap(LAST_NORM, "last")
ORIGINAL_TAP = Tap(LAST_NORM, "mean")  # of the original API: its recipe is always among those tried

_MLP_TAPS = 2  # best taps by logistic regression, at which the mlp head is tried too
_DECIMALS = 4  # of log losses that count as equal, as many as are printed


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found.

    Attributes:
        candidates: All that was tried, every penalty for itself.
        best: The chosen one.
        table: One row for each tap and head, best first: tap, head, log_loss, log_loss_se, accuracy, accuracy_se,
            auroc, l2 and epochs (`None` where they do not apply). Of several penalties the best.
        folds: Number of folds.
        parts: Rows to train on and rows held out, of each fold.
    """

    candidates: list[Candidate]
    best: Candidate
    table: list[dict[str, Any]]
    folds: int
    parts: Folds


def search(
    features: npt.NDArray[np.float32],
    targets: Float,
    groups: npt.NDArray[np.int64],
    taps: Sequence[Tap],
    config: TrainConfig,
    *,
    weights: Float | None = None,
    across: npt.NDArray[np.int64] | None = None,
    zero_shot: Float | None = None,
    progress: bool = False,
) -> Search:
    """Compare heads at taps by cross-validation.

    Logistic regression is tried at every tap with a grid of penalties. The mlp head is tried where logistic regression
    leads and at `mean:-1`, the tap of the original API; without logistic regression, at every tap. The
    least log loss wins; of those that agree in four decimals, the earlier layer, then the simpler head.

    Args:
        features: Shape (n, taps, hidden).
        targets: Shape (n,), labels or probabilities of class 1.
        groups: Shape (n,): rows of one number are never in different folds.
        taps: In the order of the features.
        config: Options.
        weights: Shape (n,), above 0; they count in training and in the score. `None` weighs all rows alike.
        across: Shape (n,): other groups, of which no fold shares any either; see `folds`.
        zero_shot: Shape (n,), the margins of zero-shot, where the backbone has a language head.
        progress: Show a progress bar if it takes more than two seconds.

    Raises:
        DataError: Too few rows or groups for cross-validation.
        TrainingError: A feature or a head's answer is not finite, or there is nothing to try.
    """
    weights = np.ones(len(targets)) if weights is None else weights
    parts = folds(classes_of(targets), groups, config.folds, config.seed, across=across)
    names = config.head_names
    candidates: list[Candidate] = []
    if zero_shot is not None:
        candidates += _baselines(zero_shot, targets, weights, parts, names)
    numbers = distinct_taps(features, taps)
    with threads_for(len(targets), features.shape[2]) as at_once:
        if "linear" in names:

            def linear(number: int) -> Float:
                data = _standardised(features[:, number], taps[number])
                return linear_margins(data, targets, weights, parts, PENALTIES)

            fits = side_by_side(linear, numbers, at_once)
            bar = tqdm(fits, desc="linear heads", unit="tap", total=len(numbers), delay=2, disable=not progress)
            for number, margins in zip(numbers, bar, strict=True):
                candidates += [
                    Candidate(taps[number], "linear", line, l2=l2) for l2, line in zip(PENALTIES, margins, strict=True)
                ]
        if "mlp" in names:
            chosen = _mlp_taps(candidates, [taps[number] for number in numbers], targets, weights)
            for tap in tqdm(chosen, desc="mlp heads", unit="tap", delay=2, disable=not progress):
                data = _standardised(features[:, taps.index(tap)], tap)
                found = validate_mlp(data, targets, weights, parts, config)
                _check_finite(found.margins, tap)
                candidates.append(Candidate(tap, "mlp", found.margins, epochs=found.epochs))
    if not candidates:
        raise TrainingError(f"heads {config.heads}: none of them works with this backbone; add linear or mlp")
    ranked = _ranked(candidates, targets, weights)
    firsts: dict[tuple[Tap, str], Candidate] = {}
    for candidate in ranked:
        firsts.setdefault((candidate.tap, candidate.head), candidate)
    table = [_table_row(candidate, targets, weights, groups) for candidate in firsts.values()]
    return Search(candidates, ranked[0], table, len(parts), parts)


def _baselines(
    margins: Float,
    targets: Float,
    weights: Float,
    parts: Folds,
    names: Sequence[str],
) -> list[Candidate]:
    found = [Candidate(ZERO_SHOT_TAP, "zero-shot", margins)] if "zero-shot" in names else []
    if "calibrated" in names:
        calibrated = np.empty(len(margins))
        for rows, held in parts:
            scale, bias = fit_platt(margins[rows], targets[rows], weights=weights[rows])
            calibrated[held] = scale * margins[held] + bias
        found.append(Candidate(ZERO_SHOT_TAP, "calibrated", calibrated))
    return found


def _standardised(features: npt.NDArray[np.float32], tap: Tap) -> Standardised:
    if not np.isfinite(features).all():
        raise TrainingError(f"features at tap {tap} hold NaN or infinity; look for broken features or broken weights")
    return Standardised.of(features)


def _check_finite(margins: Float, tap: Tap) -> None:
    if not np.isfinite(margins).all():
        raise TrainingError(f"the mlp head at tap {tap} gives NaN or infinity; lower learning_rate")


def _mlp_taps(candidates: Sequence[Candidate], taps: Sequence[Tap], targets: Float, weights: Float) -> list[Tap]:
    """Return the taps for the mlp head: those that lead so far, and that of the original API."""
    linear = [candidate for candidate in candidates if candidate.head == "linear"]
    if not linear:
        return list(taps)
    leading = list(dict.fromkeys(candidate.tap for candidate in _ranked(linear, targets, weights)))[:_MLP_TAPS]
    return leading + [tap for tap in taps if tap == ORIGINAL_TAP and tap not in leading]


def _ranked(candidates: Sequence[Candidate], targets: Float, weights: Float) -> list[Candidate]:
    margins = np.stack([candidate.margins for candidate in candidates], axis=1)
    losses = np.average(margin_losses(margins, targets), axis=0, weights=weights)
    # Of the penalties of one head that agree, the strongest is first already, and sorting keeps their order.
    order = sorted(
        range(len(candidates)), key=lambda one: (round(float(losses[one]), _DECIMALS), candidates[one].cost())
    )
    return [candidates[one] for one in order]


def _mean_with_error(values: Float, weights: Float, groups: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return the weighted mean of rows and its standard error, taking the groups, not the rows, as independent."""
    mean = float(np.average(values, weights=weights))
    sums = np.bincount(groups, weights=weights * (values - mean))
    number = len(np.unique(groups))
    spread = math.sqrt(float((sums**2).sum()) * number / max(1, number - 1))
    return mean, spread / float(weights.sum())


def _table_row(candidate: Candidate, targets: Float, weights: Float, groups: npt.NDArray[np.int64]) -> dict[str, Any]:
    margins, classes = candidate.margins, classes_of(targets)
    log_loss, log_loss_se = _mean_with_error(margin_losses(margins, targets), weights, groups)
    right = ((margins >= 0) == (classes == 1)).astype(np.float64)
    accuracy, accuracy_se = _mean_with_error(right, weights, groups)
    return {
        "tap": str(candidate.tap),
        "head": candidate.head,
        "log_loss": log_loss,
        "log_loss_se": log_loss_se,
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "auroc": auroc(margins, classes, weights),
        "l2": candidate.l2,
        "epochs": candidate.epochs,
    }
