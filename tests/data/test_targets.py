"""Labels as numbers, and those that are none."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_vl_classifier import Example
from qwen_vl_classifier.data.targets import classes_of, labels_of, targets_of
from qwen_vl_classifier.errors import DataError


def test_labels_come_out_as_numbers():
    labels = labels_of([Example(None, "x", label) for label in (0, 1, 0)], what="training")
    assert labels.tolist() == [0, 1, 0]
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no validation examples: give at least two"),
        ([0, None, 1, None], "2 of 4 validation examples have no label, the first is row 1; give 0 or 1"),
        ([1, 1, 1], "all 3 validation examples have label 1; give examples of both"),
        ([0, 0], "all 2 validation examples have label 0"),
        ([0, 1, 2], "label 2 among the validation examples, in row 2; give 0 or 1"),
        ([0, 1, -1], "label -1"),
        ([0, 1, 0.7], "label 0.7"),
        ([0, 1, "1"], "label '1'"),
    ],
)
def test_labels_that_cannot_be_learned_from(labels, message):
    with pytest.raises(DataError, match=message) as caught:
        labels_of([Example(None, str(number), label) for number, label in enumerate(labels)], what="validation")
    assert "\n" not in str(caught.value)


def test_soft_labels_are_taken_where_they_are_asked_for():
    rows = [Example(None, str(number), label) for number, label in enumerate([0, 0.25, 0.5, 1.0])]
    targets = targets_of(rows, what="training")
    assert targets.tolist() == [0, 0.25, 0.5, 1]
    assert classes_of(targets).tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match=r"label 0.25 among the training examples, in row 1; .* training only"):
        labels_of(rows, what="training")
    with pytest.raises(DataError, match=r"label 1.5 .* a number from 0 to 1"):
        targets_of([*rows, Example(None, "x", 1.5)], what="training")
    with pytest.raises(DataError, match="give examples of both classes"):
        targets_of(rows[:2], what="training")


def test_one_class_is_enough_where_nothing_is_learned_from_labels():
    assert labels_of([Example(None, "x", 1)] * 2, what="evaluation", both=False).tolist() == [1, 1]
