"""Splits: both classes on both sides, and no picture or group on both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.training.splitting import groups_of, holdout, labels_of

ALTERNATING = [Example(f"{number}.png", "text", number % 2) for number in range(40)]


def grouped(*examples: Example) -> list[int]:
    return groups_of(examples).tolist()


def test_labels_come_out_as_numbers():
    labels = labels_of(ALTERNATING[:3], what="training")
    assert labels.tolist() == [0, 1, 0]
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no validation examples: give at least 2"),
        ([0, None, 1, None], "2 of 4 validation examples have no label; give 0 or 1"),
        ([1, 1, 1], "all 3 validation examples have label 1; give examples of both"),
        ([0, 0], "all 2 validation examples have label 0"),
        ([0, 1, 2], "label 2 among the validation examples; give 0 or 1"),
        ([0, 1, -1], "label -1"),
        ([0, 1, 0.7], "label 0.7"),
        ([0, 1, "1"], "label '1'"),
    ],
)
def test_labels_that_cannot_be_learned_from(labels, message):
    with pytest.raises(DataError, match=message) as caught:
        labels_of([Example(None, str(number), label) for number, label in enumerate(labels)], what="validation")
    assert "\n" not in str(caught.value)


def test_examples_of_one_picture_are_one_group():
    picture = Image.new("RGB", (4, 4))
    assert grouped(
        Example("a.png", "x"),
        Example("b.png", "x"),
        Example("a.png", "y"),
        Example(picture, "x"),
        Example(picture.copy(), "x"),
        Example(picture, "y"),
        Example(b"bytes", "x"),
        Example(bytes(bytearray(b"bytes")), "y"),
    ) == [0, 1, 0, 2, 3, 2, 4, 4]


def test_sharing_one_of_several_pictures_is_enough():
    assert grouped(
        Example(("a", "b"), "x"),
        Example(("c", "d"), "x"),
        Example("e", "x"),
        Example(("d", "b"), "x"),
        Example("c", "x"),
    ) == [0, 0, 1, 0, 0]


def test_a_group_column_decides_where_there_is_one():
    assert grouped(
        Example("a", "x", fields={"group": 1}),
        Example("a", "x", fields={"group": 2}),
        Example("b", "x", fields={"group": 1}),
        Example("a", "x", fields={"group": None}),
        Example("a", "x"),
    ) == [0, 1, 0, 2, 2]


def test_without_a_picture_the_text_is_the_group():
    assert grouped(Example(None, "x"), Example(None, "y"), Example((), "x")) == [0, 1, 0]


@given(
    pictures=st.lists(st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=2), min_size=6, max_size=30),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_nothing_is_on_both_sides(pictures, share, seed, data):
    labels = data.draw(st.lists(st.integers(0, 1), min_size=len(pictures), max_size=len(pictures)))
    assume(len(set(labels)) == 2)
    rows = [Example(tuple(names), "text", label) for names, label in zip(pictures, labels, strict=True)]
    try:
        train, validation = holdout(rows, share, seed)
    except DataError:  # too little to split: tested below
        return
    assert sorted([*train, *validation]) == list(range(len(rows)))
    assert {name for row in train for name in pictures[row]}.isdisjoint(
        name for row in validation for name in pictures[row]
    )
    for part in (train, validation):
        assert {labels[row] for row in part} == {0, 1}


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_share_is_kept_and_stratified(share):
    train, validation = holdout(ALTERNATING, share, 0)
    assert len(validation) == pytest.approx(40 * share, abs=2)
    for part in (train, validation):
        assert np.mean([ALTERNATING[row].label for row in part]) == pytest.approx(0.5, abs=0.1)


def test_the_seed_decides():
    same = [holdout(ALTERNATING, 0.2, 3)[1].tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != holdout(ALTERNATING, 0.2, 4)[1].tolist()


@pytest.mark.parametrize(
    "rows",
    [
        ALTERNATING[:2],
        [Example("one.png", str(number), number % 2) for number in range(20)],
        [Example(f"{number}.png", "x", int(number == 0)) for number in range(20)],
    ],
    ids=["two rows", "one picture", "one of a class"],
)
def test_too_little_to_split_says_what_to_do(rows):
    with pytest.raises(DataError, match=r"too few to hold some out .* give more examples, or a validation file"):
        holdout(rows, 0.2, 0)
