"""Splits: both classes on both sides, and no picture or group on both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.training.splitting import check_grouping, folds, grouping_of, groups_of, holdout

ALTERNATING = [Example(f"{number}.png", "text", number % 2) for number in range(40)]


def grouped(*examples: Example) -> list[int]:
    return groups_of(examples).tolist()


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
    ) == [0, 1, 0, 2, 2, 2, 3, 3]


def test_sharing_one_of_several_pictures_is_enough():
    assert grouped(
        Example(("a", "b"), "x"),
        Example(("c", "d"), "x"),
        Example("e", "x"),
        Example(("d", "b"), "x"),
        Example("c", "x"),
    ) == [0, 0, 1, 0, 0]


def test_a_group_column_and_pictures_join_rows_alike():
    assert grouped(
        Example("a", "x", fields={"group": 1}),
        Example("b", "x", fields={"group": 1}),
        Example("b", "x", fields={"group": 2}),
        Example("c", "x", fields={"group": 3}),
        Example("c", "x"),
        Example("d", "x", fields={"group": None}),
        Example(None, "x", fields={"group": 2}),
        Example(None, "x"),
    ) == [0, 0, 0, 1, 1, 2, 0, 3]


MISSING = [None, float("nan"), np.float64("nan"), "", "  ", np.str_("")]


def test_a_missing_group_joins_nothing():
    rows = [Example(f"{number}.png", "x", fields={"group": cell}) for number, cell in enumerate(MISSING)]
    assert grouped(*rows, Example("last.png", "x")) == [*range(len(MISSING) + 1)]
    pandas = pytest.importorskip("pandas")
    rows = [Example(f"{cell}.png", "x", fields={"group": cell}) for cell in (pandas.NA, pandas.NaT)]
    assert grouped(*rows) == [0, 1]


def test_groups_are_equal_by_value_and_a_number_is_no_text():
    cells = [1, np.int64(1), 1.0, np.float32(1), "1", " 1 ", np.str_("1"), 2, "one", True, np.True_, ("a", 1), ("a", 1)]
    rows = [Example(f"{number}.png", "x", fields={"group": cell}) for number, cell in enumerate(cells)]
    assert grouped(*rows) == [0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 4, 5, 5]


CROSSED = [Example(f"{number % 6}.png", f"text {number // 6}", (number + number // 6) % 2) for number in range(36)]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("image", [0, 0, 1, 2, 3]),
        ("text", [0, 1, 1, 2, 0]),
        ("both", [0, 0, 0, 1, 0]),
        ("patient", [0, 0, 1, 1, 2]),
    ],
)
def test_rows_are_grouped_by_what_is_asked_for(by, expected):
    rows = [
        Example("a", "x", fields={"group": 1, "patient": "p"}),
        Example("a", "y ", fields={"group": 2}),
        Example("b", "y", fields={"patient": "q"}),
        Example("c", "z", fields={"patient": " q"}),
        Example("d", "x", fields={"patient": ""}),
    ]
    assert groups_of(rows, by).tolist() == expected


def test_a_grouping_that_rows_do_not_have_is_refused():
    rows = [Example("a", "x", fields={"patient": None, "ward": 1}), Example("b", "x")]
    with pytest.raises(DataError, match=r"group_by='patient': no row has a value .* data: patient, ward"):
        check_grouping(rows, "patient")
    with pytest.raises(DataError, match="all 2 rows have the same text"):
        check_grouping(rows, "text")
    for by in ("ward", "image", "both"):
        check_grouping(rows, by)


def test_texts_that_come_with_every_picture_are_crossed_with_them():
    groups, across = grouping_of(CROSSED, "both")
    assert across is not None
    parts = folds(np.array([row.label for row in CROSSED]), groups, 5, 0, across=across)
    assert sorted(row for _, held in parts for row in held) == list(range(len(CROSSED)))
    for rows, held in parts:
        for what in ("image", "text"):
            assert {getattr(CROSSED[row], what) for row in rows}.isdisjoint(getattr(CROSSED[row], what) for row in held)
        assert {CROSSED[row].label for row in rows} == {0, 1}


def test_texts_that_come_with_few_pictures_are_joined_with_them():
    rows = [Example(f"{number // 2}.png", f"text {number // 4}", number % 2) for number in range(40)]
    groups, across = grouping_of(rows, "both")
    assert across is None
    assert groups.tolist() == [number // 4 for number in range(40)]


@pytest.mark.parametrize("by", ["text", "both"])
def test_rows_held_out_share_no_text_where_asked(by):
    rows = [Example(f"{number // 2}.png", f"text {number // 4}", number % 2) for number in range(80)]
    train, validation = holdout(rows, 0.2, 0, by=by)
    assert {rows[row].text for row in train}.isdisjoint(rows[row].text for row in validation)


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


@given(
    groups=st.lists(st.integers(0, 12), min_size=4, max_size=60),
    count=st.integers(2, 6),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_folds_hold_every_row_out_once_and_no_group_on_both_sides(groups, count, seed, data):
    classes = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(groups), max_size=len(groups))))
    numbers = np.array(groups)
    try:
        parts = folds(classes, numbers, count, seed)
    except DataError:  # tested below
        return
    assert 2 <= len(parts) <= count
    assert sorted(row for _, held in parts for row in held) == list(range(len(groups)))
    for rows, held in parts:
        assert len(held)
        assert sorted([*rows, *held]) == list(range(len(groups)))
        assert set(numbers[rows]).isdisjoint(numbers[held])
        assert set(classes[rows]) == {0, 1}


def test_folds_are_stratified_and_fewer_where_a_class_is_rare():
    classes = np.arange(100) % 2
    for _, held in folds(classes, np.arange(100), 5, 0):
        assert (len(held), classes[held].sum()) == (20, 10)
    assert len(folds((np.arange(100) < 3).astype(int), np.arange(100), 5, 0)) == 3
    assert len(folds(classes, np.arange(100) // 25, 5, 0)) == 4


@pytest.mark.parametrize(
    ("classes", "groups"),
    [([0, 0, 0, 1], [0, 1, 2, 3]), ([0, 1, 0, 1], [0, 0, 0, 0]), ([0, 0, 1, 1], [0, 1, 2, 2])],
    ids=["one of a class", "one group", "a class in one group"],
)
def test_folds_that_cannot_be_made_say_what_to_do(classes, groups):
    with pytest.raises(DataError, match=r"4 training examples .* too few for cross-validation; give more"):
        folds(np.array(classes), np.array(groups), 5, 0)
