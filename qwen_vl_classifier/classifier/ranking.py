"""Rank rows by their scores: counts at each score as threshold, and the area under the ROC curve."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.probabilities import Float


class Ranking:
    """Rows from the highest score to the lowest; equal scores are one step.

    Args:
        scores: Shape (n,), at least one.
        positive: Shape (n,), bool: which rows count as hits.

    Attributes:
        scores: The distinct scores, falling, shape (steps,).
    """

    def __init__(self, scores: Float, positive: npt.NDArray[np.bool_]) -> None:
        self._order = np.argsort(-scores, kind="stable")
        falling = scores[self._order]
        self._ends = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
        self._positive = positive[self._order]
        self.scores = falling[self._ends]

    def counts(self, weights: Float | None = None) -> tuple[Float, Float]:
        """Return the weight of hits and of false alarms at or above each score.

        Args:
            weights: Shape (n,) or (m, n), for m weightings at once; `None` counts every row once.

        Returns:
            Two arrays of shape (steps,) or (m, steps).
        """
        falling = np.ones(len(self._order)) if weights is None else weights[..., self._order]
        hits, alarms = (
            np.cumsum(falling * counted, axis=-1)[..., self._ends] for counted in (self._positive, ~self._positive)
        )
        return hits, alarms


def area_under_roc(hits: Float, alarms: Float) -> Float:
    """Return the area under the ROC curve, from counts of shape (..., steps); NaN where a class has no weight.

    It is the chance that a row of class 1 scores above one of class 0, ties counting half (Hanley and McNeil, 1982,
    "The meaning and use of the area under a receiver operating characteristic curve").
    """
    new_hits, new_alarms = np.diff(hits, prepend=0.0), np.diff(alarms, prepend=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Float = (new_alarms * (hits - new_hits / 2)).sum(axis=-1) / (hits[..., -1] * alarms[..., -1])
    return area


def auroc(scores: Float, classes: npt.NDArray[np.int64], weights: Float) -> float:
    """Return the area under the ROC curve of rows; NaN where a class has no weight.

    A bootstrap takes it hundreds of times: scikit-learn's takes longer to check its arguments than this for the answer.

    Args:
        scores: Shape (n,).
        classes: Shape (n,), 0 or 1.
        weights: Shape (n,), 0 or more.
    """
    area = float(area_under_roc(*Ranking(scores, classes == 1).counts(weights)))
    return area if math.isfinite(area) else math.nan
