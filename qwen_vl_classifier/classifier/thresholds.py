"""Choose the threshold for an objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.classifier.ranking import Ranking
from qwen_vl_classifier.errors import TrainingError
from qwen_vl_classifier.objectives import Objective

_SURE = 2.0  # standard errors


def choose_threshold(
    probability: npt.NDArray[np.floating[Any]],
    labels: npt.NDArray[np.integer[Any]],
    objective: Objective | str,
    *,
    weights: npt.NDArray[np.floating[Any]] | None = None,
) -> float:
    """Choose the probability of class 1 from which the answer is 1.

    Candidates are the midpoints between neighbouring probabilities that occur, one below them all and one above.

    `accuracy`, `balanced` and `cost` ask for the least cost, where a miss and a false alarm cost 1 and 1, 1 / (rows of
    class 1) and 1 / (rows of class 0), or what is given. Calibrated probabilities need no search: the best threshold
    is false alarm / (false alarm + miss) (Elkan, 2001, "The foundations of cost-sensitive learning", equation 2). It
    is left only for the cheapest candidate, and only where that saves more on these rows than twice the standard
    error of the paired difference, row by row: the cheapest of many candidates always looks cheaper by a row or two.

    `f1` takes the candidate with the highest F1, and of several the nearest to half of that F1, where the threshold of
    calibrated probabilities lies (Lipton, Elkan and Naryanaswamy, 2014, arXiv:1402.1892, theorem 1).

    `recall>=R` takes the highest candidate that reaches R; `precision>=P` the lowest that reaches P and answers 1 at
    least once. Both hold on these rows; on others they will be met about as often as missed.

    Args:
        probability: Shape (n,), of class 1, calibrated, of rows that the head was not trained on; at least one.
        labels: Shape (n,), 0 or 1.
        objective: What the threshold is to be good at, as an `Objective` or in its words.
        weights: Shape (n,), above 0: a row of weight 2 counts as two. `None` counts every row once.

    Returns:
        A number from 0 to 1; an example is of class 1 where its probability reaches it.

    Raises:
        ConfigError: The words are no objective.
        TrainingError: There is no row of a class that the objective asks about, or no candidate reaches the precision.
    """
    goal = Objective.parse(objective) if isinstance(objective, str) else objective
    p = np.asarray(probability, dtype=np.float64)
    positive = np.asarray(labels) == 1
    weight = np.ones(len(p)) if weights is None else np.asarray(weights, dtype=np.float64)
    _check_classes(positive, goal)
    if goal.kind in ("accuracy", "balanced", "cost"):
        return _cheapest(p, positive, weight, *_costs(positive, weight, goal))
    thresholds, hits, alarms = _candidates(p, positive, weight)
    if goal.kind == "recall":
        return float(thresholds[hits >= goal.least * hits[0]].max())
    answered = hits + alarms > 0
    thresholds, hits, alarms = thresholds[answered], hits[answered], alarms[answered]
    if goal.kind == "precision":
        precision = hits / (hits + alarms)
        if precision.max() < goal.least:
            raise TrainingError(
                f"objective {goal}: the highest precision that can be reached is {precision.max():.4g}, on {len(p)} "
                f"rows; "
                "ask for at most that, or choose another objective"
            )
        return float(thresholds[precision >= goal.least].min())
    f1 = 2 * hits / (hits + alarms + hits[0])
    best = thresholds[f1 == f1.max()]
    return float(best[np.abs(best - f1.max() / 2).argmin()])


def _check_classes(positive: npt.NDArray[np.bool_], goal: Objective) -> None:
    needed = {"balanced": (0, 1), "f1": (1,), "recall": (1,), "precision": (1,)}.get(goal.kind, ())
    for label in needed:
        if not (positive == bool(label)).any():
            raise TrainingError(
                f"objective {goal}: none of {len(positive)} rows has label {label}; give rows of both labels, or "
                f"choose accuracy"
            )


def _costs(positive: npt.NDArray[np.bool_], weight: Float, goal: Objective) -> tuple[float, float]:
    """Return what a miss and a false alarm cost."""
    if goal.kind == "balanced":
        return 1 / float(weight[positive].sum()), 1 / float(weight[~positive].sum())
    return goal.miss, goal.false_alarm


def _cheapest(p: Float, positive: npt.NDArray[np.bool_], weight: Float, miss: float, false_alarm: float) -> float:
    bayes = false_alarm / (false_alarm + miss)
    thresholds, hits, alarms = _candidates(p, positive, weight)
    costs = miss * (hits[0] - hits) + false_alarm * alarms
    cheapest = thresholds[costs == costs.min()]
    best = float(cheapest[np.abs(cheapest - bayes).argmin()])

    def costs_of_rows(threshold: float) -> Float:
        return np.where(positive, miss * (p < threshold), false_alarm * (p >= threshold))

    saved = weight * (costs_of_rows(bayes) - costs_of_rows(best))
    # The error that the sum would have if nothing were saved in truth: of rows that all agree it takes five.
    return best if saved.sum() > _SURE * np.sqrt((saved**2).sum()) else bayes


def _candidates(p: Float, positive: npt.NDArray[np.bool_], weight: Float) -> tuple[Float, Float, Float]:
    """Return thresholds, rising, and the weight of rows that each rightly and wrongly calls 1."""
    ranking = Ranking(p, positive)
    values = ranking.scores[::-1]
    hits, alarms = (counted[::-1] for counted in ranking.counts(weight))
    below = np.concatenate([[0.0], values])
    above = np.concatenate([values, [1.0]])
    middle = (below + above) / 2
    # Between neighbouring numbers, or at an end of the range, there is no middle: the upper one divides as well.
    thresholds = np.where(middle > below, middle, above)
    kept = slice(None, -1) if values[-1] == 1 else slice(None)  # where 1 occurs, no threshold is above it
    return thresholds[kept], np.append(hits, 0.0)[kept], np.append(alarms, 0.0)[kept]
