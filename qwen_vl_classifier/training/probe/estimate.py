"""Estimate how good a chosen classifier will be on new rows, corrected for the choice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.calibration import Calibration, refitted
from qwen_vl_classifier.classifier.probabilities import Float, calibration_errors, logits_of, margin_losses
from qwen_vl_classifier.classifier.ranking import auroc
from qwen_vl_classifier.classifier.thresholds import choose_threshold
from qwen_vl_classifier.data.targets import classes_of
from qwen_vl_classifier.errors import TrainingError
from qwen_vl_classifier.training.uncertainty import Interval, RowScores, resampled, row_scores

Groups = npt.NDArray[np.int64]

SAMPLES = 500  # bootstrap samples
FEW_GROUPS = 30
"""With fewer groups an estimate says little, and `train` says so."""

HELD_OUT = "held-out rows"
"""The method of an estimate that was measured on rows with no say in the choice."""

_BOOTSTRAP = "bootstrap bias corrected cross-validation"
_INTERVAL = (2.5, 97.5)  # per cent
_MEASURES = ("accuracy", "log_loss", "auroc", "ece")
# Answers come from models that share rows, and the classifier that is kept is one more: rows vary together by more than
# their groups tell (Bates, Hastie and Tibshirani, 2021, "Cross-validation: what does it estimate and how well does it
# do it?"). `benchmarks/estimate_coverage.py` shows that this much holds.
INFLATION = 1.5
"""By how much the variance of out-of-fold answers is larger than that of independent rows."""


def search_estimate(
    margins: Float,
    chosen: int,
    calibration: Calibration,
    threshold: float,
    targets: Float,
    weights: Float,
    groups: Groups,
    *,
    objective: str,
    seed: int,
    samples: int = SAMPLES,
    measured: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """Estimate how good the winner of a search is, from the out-of-fold margins of all that was tried.

    Bootstrap bias corrected cross-validation (Tsamardinos, Greasidou and Borboudakis, 2018, "Bootstrapping the
    out-of-sample predictions for efficient and accurate cross-validation", Machine Learning 107): from groups drawn
    with replacement the candidate, its calibration and its threshold are chosen anew, and measured on the groups that
    were not drawn. The score of the best candidate is higher the more candidates there are; these are not.

    What is chosen from a draw is worse than what is chosen from all rows, and the winner's own score is better than it
    is in truth. The interval reaches from the end of the one to that of the other, each with a width whatever the
    rows say (`uncertainty.py`).

    Where only some rows were drawn at random, and the others were chosen because a model was unsure of them, the choice
    is made on all rows and measured on the former alone: the others are harder than new rows are.

    Args:
        margins: Shape (n, candidates), the out-of-fold log odds of class 1.
        chosen: Number of the winner.
        calibration: Of the winner: the same kind is fitted to each draw.
        threshold: Of the winner.
        targets: Shape (n,), labels or probabilities of class 1.
        weights: Shape (n,), above 0.
        groups: Shape (n,): rows of one number are drawn together.
        objective: What the threshold is for.
        seed: Of the draws.
        samples: Number of draws.
        measured: Shape (n,), true for the rows to measure on; `None` measures on all.

    Returns:
        As `_summary` has it.
    """
    measured = np.ones(len(targets), dtype=np.bool_) if measured is None else measured
    losses = margin_losses(margins, targets)
    classes = classes_of(targets)
    sums, times = np.zeros((4, len(targets))), np.zeros(len(targets))
    areas, errors, used = [], [], 0
    for drawn in _draws(groups, samples, seed):
        inside = weights * drawn
        left = np.flatnonzero((drawn == 0) & measured)
        if not (_both(classes, inside) and len(left)):
            continue
        rows = np.flatnonzero(inside)
        logits = logits_of(margins[:, int((inside @ losses).argmin())])
        fitted = refitted(calibration, logits[rows], targets[rows], weights=inside[rows])
        probability = fitted.apply(logits)[:, 1]
        try:
            limit = choose_threshold(probability[rows], classes[rows], objective, weights=inside[rows])
        except TrainingError:  # no threshold serves the objective on these rows
            continue
        scores = row_scores(probability[left], limit, targets[left], weights[left], groups[left])
        sums[:, left] += scores.right, scores.floor, scores.stake, scores.lost
        times[left] += 1
        used += 1
        areas.append(auroc(probability[left], classes[left], weights[left]))
        errors.append(calibration_errors(probability[left], targets[left], weights=weights[left]))
    kept = np.flatnonzero(times)
    if not used or not _both(classes[kept], weights[kept]):
        return _summary(_BOOTSTRAP, 0, groups[measured], targets[measured], weights[measured])
    right, floor, stake, lost = sums[:, kept] / times[kept]
    honest = RowScores(right, floor, stake, lost, weights[kept], groups[kept])
    probability = calibration.apply(logits_of(margins[measured, chosen]))[:, 1]
    targets, weights, groups, own_classes = targets[measured], weights[measured], groups[measured], classes[measured]
    flattered = row_scores(probability, threshold, targets, weights, groups)
    known = [area for area in areas if math.isfinite(area)]
    own = auroc(probability, own_classes, weights)
    area = float(np.mean(known)) if known else own
    found = {
        "accuracy": (honest.accuracy, *_widest(one.accuracy_interval(INFLATION) for one in (honest, flattered))),
        "log_loss": (honest.log_loss, *_widest(one.log_loss_interval(INFLATION) for one in (honest, flattered))),
        "auroc": (
            area,
            *_widest(
                (
                    honest.auroc_interval(area, classes[kept], INFLATION),
                    flattered.auroc_interval(own, own_classes, INFLATION),
                )
            ),
        ),
        "ece": _calibration_interval(errors, errors, [one.overconfidence(INFLATION) for one in (honest, flattered)]),
    }
    return _summary(_BOOTSTRAP, used, groups, targets, weights, found)


def held_out_estimate(
    probability: Float,
    threshold: float,
    targets: Float,
    weights: Float,
    groups: Groups,
    *,
    seed: int,
    samples: int = SAMPLES,
    inflation: float = 1.0,
) -> dict[str, Any]:
    """Measure a classifier on rows that had no say in it; the intervals are those of `uncertainty.py`.

    Args:
        probability: Shape (n,), of class 1.
        threshold: Probability from which the label is 1.
        targets: Shape (n,), labels.
        weights: Shape (n,), 0 or more.
        groups: Shape (n,): rows of one number belong together.
        seed: Of the draws from which the interval of the calibration error comes.
        samples: Number of draws.
        inflation: By how much the variance is larger than that of independent rows.

    Returns:
        As `_summary` has it.
    """
    rows = np.flatnonzero(weights)
    probability, targets, weights, groups = probability[rows], targets[rows], weights[rows], groups[rows]
    classes = classes_of(targets)
    scores = row_scores(probability, threshold, targets, weights, groups)
    area = auroc(probability, classes, weights)
    errors = []
    for drawn in _draws(groups, samples, seed):
        some = np.flatnonzero(drawn)
        errors.append(calibration_errors(probability[some], targets[some], weights=(weights * drawn)[some]))
    both = _both(classes, weights)
    found = {
        "accuracy": (scores.accuracy, *scores.accuracy_interval(inflation)),
        "log_loss": (scores.log_loss, *scores.log_loss_interval(inflation)),
        "auroc": (area, *scores.auroc_interval(area, classes, inflation)) if both else (None, None, None),
        "ece": _calibration_interval(
            [calibration_errors(probability, targets, weights=weights)], errors, [scores.overconfidence(inflation)]
        ),
    }
    return _summary(HELD_OUT, samples, groups, targets, weights, found)


def _draws(groups: Groups, samples: int, seed: int) -> Iterator[Float]:
    """Yield how often each row is drawn, whole groups at a time."""
    return itertools.chain.from_iterable(resampled(groups, samples, seed=seed))


def _both(classes: npt.NDArray[np.int64], weights: Float) -> bool:
    return bool((np.bincount(classes, weights=weights, minlength=2) > 0).all())


def _widest(intervals: Iterable[Interval]) -> Interval:
    lows, highs = zip(*intervals, strict=True)
    return min(lows), max(highs)


def _calibration_interval(
    found: Sequence[tuple[float, float]], drawn: Sequence[tuple[float, float]], most: Sequence[float]
) -> tuple[float, float, float]:
    """Return mean and ends: below, what is left without chance; above, what was measured, or may be all the same."""
    below, above = np.array(drawn).T
    mean = float(np.mean([less for less, _ in found]))
    low, high = float(np.percentile(below, _INTERVAL[0])), float(np.percentile(above, _INTERVAL[1]))
    return mean, min(low, mean), max(high, mean, *most)


def _summary(
    method: str,
    samples: int,
    groups: Groups,
    targets: Float,
    weights: Float,
    found: Mapping[str, tuple[float | None, float | None, float | None]] | None = None,
) -> dict[str, Any]:
    """Return what is known, for people and for the record.

    Returns:
        `method`, `rows`, `groups`, `few` (whether the groups are too few to say much), `samples` (those that could be
        used), `majority_accuracy`, `majority_class`, and for each of accuracy, log_loss, auroc and ece an object of
        `mean`, `low` and `high`: the ends of the 95 % interval, `None` where nothing could be measured. All are
        weighted as training is, and hold for new rows of the same kind, with the same mix of classes. `ece` is without
        what chance adds on few rows.
    """
    shares = np.bincount(classes_of(targets), weights=weights, minlength=2) / weights.sum()
    count = len(np.unique(groups))
    summary: dict[str, Any] = {
        "method": method,
        "rows": len(targets),
        "groups": count,
        "few": count < FEW_GROUPS,
        "samples": samples,
        "majority_accuracy": float(shares.max()),
        "majority_class": int(shares.argmax()),
    }
    for name in _MEASURES:
        mean, low, high = found[name] if found else (None, None, None)
        summary[name] = {"mean": mean, "low": low, "high": high}
    return summary
