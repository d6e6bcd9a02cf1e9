"""How good a chosen classifier will be on new rows, with the choice paid for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.calibration import Calibration, fit_isotonic, fit_temperature, log_loss
from qwen_vl_classifier.classifier.thresholds import choose_threshold
from qwen_vl_classifier.errors import TrainingError
from qwen_vl_classifier.training.scores import Float, auroc, logits_of, row_losses
from qwen_vl_classifier.training.splitting import classes_of

Groups = npt.NDArray[np.int64]

SAMPLES = 500  # bootstrap samples

_INTERVAL = (2.5, 97.5)  # per cent
_MEASURES = ("accuracy", "log_loss", "auroc")


def search_estimate(
    margins: Float,
    targets: Float,
    weights: Float,
    groups: Groups,
    *,
    objective: str,
    isotonic: bool,
    seed: int,
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """Estimate how good the winner of a search is, from the out-of-fold margins of all that was tried.

    Bootstrap bias corrected cross-validation (Tsamardinos, Greasidou and Borboudakis, 2018, "Bootstrapping the
    out-of-sample predictions for efficient and accurate cross-validation", Machine Learning 107): from groups drawn
    with replacement the candidate, its calibration and its threshold are chosen anew, and measured on the groups that
    were not drawn. The score of the best candidate is higher the more candidates there are; these are not.

    Args:
        margins: Shape (n, candidates), the out-of-fold log odds of class 1.
        targets: Shape (n,), labels or probabilities of class 1.
        weights: Shape (n,), 0 or more.
        groups: Shape (n,): rows of one number are drawn together.
        objective: What the threshold is for.
        isotonic: Whether the calibration is an isotonic curve, else a temperature.
        seed: Of the draws.
        samples: Number of draws.

    Returns:
        As `_summary` has it.
    """
    losses = row_losses(margins, targets)
    classes = classes_of(targets)
    found = []
    for drawn in _draws(groups, samples, seed):
        inside = weights * drawn
        outside = np.where(drawn == 0, weights, 0.0)
        if not (_both(classes, inside) and outside.any()):
            continue
        best = int((inside @ losses).argmin())
        rows = np.flatnonzero(inside)
        logits = logits_of(margins[:, best])
        calibration = _calibrate(logits[rows], targets[rows], inside[rows], isotonic)
        probability = calibration.apply(logits)[:, 1]
        try:
            threshold = choose_threshold(probability[rows], classes[rows], objective, weights=inside[rows])
        except TrainingError:  # no threshold serves the objective on these rows
            continue
        found.append(_measure(probability, threshold, targets, outside))
    return _summary("bootstrap bias corrected cross-validation", found, groups, targets, weights)


def held_out_estimate(
    probability: Float,
    threshold: float,
    targets: Float,
    weights: Float,
    groups: Groups,
    *,
    seed: int,
    samples: int = SAMPLES,
) -> dict[str, Any]:
    """Measure a classifier on rows that had no say in it; the interval is that of groups drawn with replacement.

    Args:
        probability: Shape (n,), of class 1.
        threshold: Probability from which the label is 1.
        targets: Shape (n,), labels.
        weights: Shape (n,), 0 or more.
        groups: Shape (n,): rows of one number are drawn together.
        seed: Of the draws.
        samples: Number of draws.

    Returns:
        As `_summary` has it.
    """
    classes = classes_of(targets)
    found = [
        _measure(probability, threshold, targets, weights * drawn)
        for drawn in _draws(groups, samples, seed)
        if _both(classes, weights * drawn)
    ]
    measured = _measure(probability, threshold, targets, weights)
    return _summary("held-out rows", found, groups, targets, weights, measured)


def _draws(groups: Groups, samples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield how often each row is drawn, whole groups at a time."""
    rng = np.random.default_rng(seed)
    _, places = np.unique(groups, return_inverse=True)
    number = int(places.max()) + 1
    for _ in range(samples):
        yield np.bincount(rng.integers(number, size=number), minlength=number)[places]


def _both(classes: npt.NDArray[np.int64], weights: Float) -> bool:
    return bool((np.bincount(classes, weights=weights, minlength=2) > 0).all())


def _calibrate(logits: Float, targets: Float, weights: Float, isotonic: bool) -> Calibration:
    if isotonic:
        return fit_isotonic(logits, targets, weights=weights)
    return Calibration(fit_temperature(logits, targets, weights=weights))


def _measure(probability: Float, threshold: float, targets: Float, weights: Float) -> dict[str, float]:
    rows = np.flatnonzero(weights)
    classes = classes_of(targets)
    right = (probability >= threshold) == (classes == 1)
    return {
        "accuracy": float(np.average(right[rows], weights=weights[rows])),
        "log_loss": log_loss(probability[rows], targets[rows], weights=weights[rows]),
        "auroc": auroc(probability, classes, weights),
    }


def _summary(
    method: str,
    found: Sequence[dict[str, float]],
    groups: Groups,
    targets: Float,
    weights: Float,
    measured: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Return what is known, for people and for the record.

    Returns:
        `method`, `rows`, `groups`, `samples` (those that could be used), `majority_accuracy`, and for each of
        accuracy, log_loss and auroc an object of `mean`, `low` and `high`: the ends of the 95 % interval, `None`
        where nothing could be measured. All are weighted as training is.
    """
    shares = np.bincount(classes_of(targets), weights=weights, minlength=2) / weights.sum()
    summary: dict[str, Any] = {
        "method": method,
        "rows": len(targets),
        "groups": len(np.unique(groups)),
        "samples": len(found),
        "majority_accuracy": float(shares.max()),
    }
    for name in _MEASURES:
        values = np.array([one[name] for one in found if math.isfinite(one[name])])
        low, high = np.percentile(values, _INTERVAL).tolist() if len(values) else (None, None)
        mean = float(values.mean()) if len(values) else None
        summary[name] = {"mean": mean if measured is None else measured[name], "low": low, "high": high}
    return summary
