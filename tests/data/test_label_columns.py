"""Rows with several labels, and rows with one of several classes: missing cells, words, and what cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Example, load_examples
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.targets import check_label_columns, class_words, label_matrix
from qwen_vl_classifier.errors import DataError


def rows_of(*fields: dict) -> list[Example]:
    return [Example(None, "x", fields=one) for one in fields]


def test_cells_are_read_by_one_rule():
    rows = rows_of(
        {"defect": 1, "dirty": "no", "other": "x"},
        {"defect": "0", "dirty": " yes "},
        {"defect": True, "dirty": 0.0},
        {"defect": "FALSE", "dirty": None},
        {"defect": np.int64(1), "dirty": " "},
        {"dirty": float("nan")},
    )
    expected = [[1, 0], [0, 1], [1, 0], [0, -1], [1, -1], [-1, -1]]
    assert label_matrix(rows, ["defect", "dirty"]).tolist() == expected
    assert label_matrix(rows, ["DEFECT "])[:, 0].tolist() == [1, 0, 1, 0, 1, -1]


def test_a_table_keeps_its_label_columns(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("image,text,label,dirty\n,one,1,\n,two,,0\n")
    rows = load_examples(table, read_labels=False)
    assert label_matrix(rows, ["label", "dirty"]).tolist() == [[1, -1], [-1, 0]]


def test_cells_that_are_no_labels_are_listed_by_row():
    rows = rows_of({"defect": 1}, {"defect": "maybe"}, {"defect": 0.3}, {"defect": [1]})
    with pytest.raises(DataError, match="3 of 4 rows cannot be used") as caught:
        label_matrix(rows, ["defect"])
    assert "row 2: defect is 'maybe', expected 'no' or 'yes' (or 0 or 1)" in str(caught.value)
    bad = BadRows("100%")
    assert label_matrix(rows, ["defect"], bad=bad)[:, 0].tolist() == [1, -1, -1, -1]
    assert [row.position for row in bad] == [1, 2, 3]


def test_a_misspelled_column_is_named():
    rows = rows_of({"defect": 1, "scratch": 0})
    for read in (label_matrix, check_label_columns):
        with pytest.raises(DataError, match=r"no row has a column 'scrach'; .* did you mean 'scratch'\?"):
            read(rows, ["defect", "scrach"])
    with pytest.raises(DataError, match="no rows"):
        label_matrix([], ["defect"])


def test_exactly_one_of_several_columns():
    rows = rows_of({"cat": 1, "dog": None}, {"cat": 0, "dog": 1}, {"cat": 0, "dog": None}, {"cat": None, "dog": None})
    assert label_matrix(rows, ["cat", "dog"], one_of=True).tolist() == [[1, 0], [0, 1], [0, -1], [-1, -1]]
    wrong = rows_of({"cat": 1, "dog": 0}, {"cat": 1, "dog": 1}, {"cat": 0, "dog": 0})
    with pytest.raises(DataError) as caught:
        label_matrix(wrong, ["cat", "dog"], one_of=True)
    assert "row 2: 'cat' and 'dog' are both 1; expected exactly one" in str(caught.value)
    assert "row 3: all labels are 0" in str(caught.value)
    assert label_matrix(wrong, ["cat", "dog"]).tolist() == [[1, 0], [1, 1], [0, 0]]


def test_words_name_the_class():
    rows = rows_of({"label": "dog"}, {"label": " cat"}, {"label": None}, {"label": ""}, {"label": "dog"})
    assert class_words(rows) == ["cat", "dog"]
    assert label_matrix(rows, ["cat", "dog"], one_of=True).tolist() == [[0, 1], [1, 0], [-1, -1], [-1, -1], [0, 1]]
    with pytest.raises(DataError, match=r"row 1: label is 'dog', expected one of 'cat', 'dogs'; did you mean 'dogs'\?"):
        label_matrix(rows, ["cat", "dogs"], one_of=True)
    with pytest.raises(DataError, match=r"no row has a word in a column 'kind'"):
        class_words(rows, "kind")
    with pytest.raises(DataError, match=r"all rows have the class 'dog' \(1 row\)"):
        class_words(rows[:1])
    with pytest.raises(DataError, match="'dog' and 'Dog' differ only in case"):
        class_words([*rows, *rows_of({"label": "Dog"})])


def test_classes_that_are_numbers_are_in_their_order():
    rows = rows_of(*({"grade": number} for number in (10, 2, 1.0)))
    assert class_words(rows, "grade") == ["1", "2", "10"]
    assert label_matrix(rows, ["1", "2", "10"], one_of=True, label_column="grade").argmax(axis=1).tolist() == [2, 1, 0]


def test_examples_may_have_their_class_as_label():
    rows = [Example(None, "x", 1, label_text="dog"), Example(None, "x", 0, label_text="cat")]
    assert class_words(rows) == ["cat", "dog"]


def test_folders_name_the_class(tmp_path):
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "one.png")
    rows = load_examples(tmp_path, text="Which animal is it?", one_of=True, require_labels=True)
    assert [row.label for row in rows] == [None, None, None]
    assert class_words(rows) == ["cat", "dog", "owl"]
    assert label_matrix(rows, ["cat", "dog", "owl"], one_of=True).tolist() == np.eye(3).tolist()


def test_a_column_that_has_the_name_of_a_class_does_not_change_words():
    rows = rows_of({"label": "cat", "cat": "Felis"}, {"label": "dog", "cat": ""})
    assert label_matrix(rows, ["cat", "dog"], one_of=True).tolist() == [[1, 0], [0, 1]]
