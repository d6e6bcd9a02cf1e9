"""How much each row counts: weights of examples times weights of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.targets import classes_of
from qwen_vl_classifier.errors import DataError


def row_weights(
    examples: Sequence[Example],
    targets: npt.NDArray[np.float64],
    *,
    column: str = "",
    class_weight: str | Mapping[int, float] | None = None,
) -> npt.NDArray[np.float64]:
    """Return how much each row counts, shape (n,): its own weight times that of its class.

    Args:
        examples: Whose `fields` hold the column.
        targets: Shape (n,), the probability of class 1; rows from 0.5 are of class 1.
        column: Name of the column of weights; empty for weights of 1.
        class_weight: `None`, "balanced" (both classes weigh the same in all), or the weight of each class.

    Raises:
        DataError: A weight is missing, not a number, negative or infinite, or all are 0.
    """
    weights = _weights_in(examples, column) if column else np.ones(len(examples))
    if class_weight is None:
        return weights
    classes = classes_of(targets)
    if isinstance(class_weight, str):
        totals = np.bincount(classes, weights=weights, minlength=2)
        each = weights.sum() / (2 * np.maximum(totals, np.finfo(np.float64).tiny))
    else:
        each = np.array([class_weight[0], class_weight[1]], dtype=np.float64)
    weighted: npt.NDArray[np.float64] = weights * each[classes]
    return weighted


def _weights_in(examples: Sequence[Example], column: str) -> npt.NDArray[np.float64]:
    weights = np.array([_number(example.fields.get(column)) for example in examples])
    wrong = np.flatnonzero(~((weights >= 0) & (weights < math.inf)))
    if len(wrong):
        value = examples[wrong[0]].fields.get(column)
        raise DataError(
            f"{column} is {str(value)[:80]!r} in row {wrong[0] + 1}, {len(wrong)} of {len(examples)} rows have no "
            f"weight; give a number from 0 in every row, or another {spelled('weight_column')}"
        )
    if not weights.any():
        raise DataError(f"{column} is 0 in all {len(examples)} rows; give some rows a weight above 0")
    return weights


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, (str, int, float)) else math.nan
    except ValueError:
        return math.nan
