"""Weights of rows: a column of the data, times the weight of the class."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vl_classifier import Example
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.training.weighting import row_weights


def rows(*weights: object) -> list[Example]:
    return [Example(None, "x", 0, fields={"w": weight}) for weight in weights]


def test_weights_come_from_a_column():
    assert row_weights(rows(1, "2.5", 0), np.zeros(3), column="w").tolist() == [1, 2.5, 0]
    assert row_weights(rows("no number"), np.zeros(1)).tolist() == [1]


@pytest.mark.parametrize("wrong", [-1, None, "heavy", float("nan"), float("inf"), [1]])
def test_a_weight_that_is_none_is_named(wrong):
    with pytest.raises(DataError, match=r"w is .* in row 2, 1 of 3 rows .* another weight_column"):
        row_weights(rows(1, wrong, 1), np.zeros(3), column="w")


def test_some_row_must_weigh_something():
    with pytest.raises(DataError, match="0 in all 2 rows"):
        row_weights(rows(0, 0.0), np.zeros(2), column="w")


def test_balanced_classes_weigh_the_same():
    targets, weights = np.array([0, 0, 0, 0.9, 1]), np.array([1, 2, 3, 1, 1.0])
    total = row_weights(rows(*weights), targets, column="w", class_weight="balanced")
    assert total[:3].sum() == pytest.approx(total[3:].sum()) == pytest.approx(weights.sum() / 2)


def test_weights_of_classes_are_taken_as_given():
    targets = np.array([0, 0.6, 1])
    assert row_weights(rows(1, 1, 1), targets, class_weight={0: 1.0, 1: 5.0}).tolist() == [1, 5, 5]
