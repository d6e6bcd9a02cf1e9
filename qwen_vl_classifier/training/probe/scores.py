"""Scores of out-of-fold answers, with weights of rows and errors that know of groups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.training.splitting import classes_of

Float = npt.NDArray[np.float64]


def row_losses(margins: Float, targets: Float) -> Float:
    """Return the log loss of each row.

    Args:
        margins: Shape (n,) or (n, candidates): the log odds of class 1.
        targets: Shape (n,), labels or probabilities of class 1.
    """
    target = targets.reshape(-1, *(1,) * (margins.ndim - 1))
    losses: Float = np.logaddexp(0.0, margins) - target * margins
    return losses


def logits_of(margins: Float) -> Float:
    """Return logits, shape (n, 2), that have these margins."""
    logits: Float = np.stack([-margins, margins], axis=1) / 2
    return logits


def auroc(scores: Float, classes: npt.NDArray[np.int64], weights: Float) -> float:
    """Return the area under the ROC curve, NaN where a class has no weight.

    It is the chance that a row of class 1 scores above one of class 0, ties counting half (Hanley and McNeil, 1982,
    "The meaning and use of the area under a receiver operating characteristic curve"). A bootstrap asks for it hundreds
    of times: scikit-learn's takes longer to check its arguments than this does for the answer.
    """
    _, places = np.unique(scores, return_inverse=True)
    negative, positive = (np.bincount(places, weights=weights * (classes == label)) for label in (0, 1))
    pairs = negative.sum() * positive.sum()
    below = negative.cumsum() - negative / 2
    return float(positive @ below / pairs) if pairs else math.nan


def mean_with_error(values: Float, weights: Float, groups: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Return the weighted mean of rows and its standard error, taking the groups, not the rows, as independent."""
    mean = float(np.average(values, weights=weights))
    sums = np.bincount(groups, weights=weights * (values - mean))
    number = len(np.unique(groups))
    spread = math.sqrt(float((sums**2).sum()) * number / max(1, number - 1))
    return mean, spread / float(weights.sum())


def score_row(margins: Float, targets: Float, weights: Float, groups: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return log loss and accuracy with their standard errors, and AUROC, of one candidate."""
    classes = classes_of(targets)
    log_loss, log_loss_se = mean_with_error(row_losses(margins, targets), weights, groups)
    right = ((margins >= 0) == (classes == 1)).astype(np.float64)
    accuracy, accuracy_se = mean_with_error(right, weights, groups)
    return {
        "log_loss": log_loss,
        "log_loss_se": log_loss_se,
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "auroc": auroc(margins, classes, weights),
    }
