"""One row at a time: an example, or all that is wrong with the row."""

from __future__ import annotations

from decimal import Decimal

import pytest

from qwen_vl_classifier.data.readers import read_table
from qwen_vl_classifier.data.rows import RowParser
from qwen_vl_classifier.data.table import Columns, LoadOptions, suggested_column
from qwen_vl_classifier.errors import ConfigError, DataError


def parse(*rows: dict, **options: object):
    table = read_table(list(rows), LoadOptions(**options))
    parser = RowParser(table, LoadOptions(**options))
    return [parser.parse(row) for row in table.rows]


def test_a_good_row_is_an_example_with_its_other_columns():
    (row,) = parse({"image": None, "text": "a claim", "label": 1, "id": 7, "kind": "x"})
    assert row.problems == ()
    assert (row.example.text, row.example.label, row.example.id, row.id) == ("a claim", 1, "7", "7")
    assert row.example.fields == {"kind": "x"}


def test_every_problem_of_a_row_is_named_and_its_id_kept():
    (row,) = parse({"image": "gone.png", "text": " ", "label": 5, "id": "b"})
    assert row.example is None
    assert row.id == "b"
    assert [problem.split()[0] for problem in row.problems] == ["image", "text", "label"]


def test_labels_may_be_left_unread():
    (row,) = parse({"image": None, "text": "a claim", "label": "rubbish"}, read_labels=False)
    assert row.example.label is None
    assert row.example.fields == {"label": "rubbish"}


def test_one_text_for_all_rows():
    rows = parse({"image": None, "text": "other"}, {"image": None}, text="the claim")
    assert [row.example.text for row in rows] == ["the claim", "the claim"]
    with pytest.raises(ConfigError, match="blank"):
        parse({"image": None}, text="  ")


def test_a_column_that_no_row_has_is_a_wrong_name():
    table = read_table([{"image": None, "caption": "a claim"}], LoadOptions())
    with pytest.raises(DataError, match=r"no column 'text'; its columns are 'image', 'caption'; use text_column='cap"):
        RowParser(table, LoadOptions()).check_columns(list(table.rows))


def test_columns_are_found_in_any_case_and_with_blanks():
    (row,) = parse({"Image": None, " TEXT ": "a claim", "Label": 1, "Other": 3})
    assert (row.example.text, row.example.label, row.example.fields) == ("a claim", 1, {"Other": 3})
    (row,) = parse({"image": None, "text": "exact", "Text": "another"})
    assert (row.example.text, row.example.fields) == ("exact", {"Text": "another"})


def test_a_column_is_taken_as_ids_only_by_its_name():
    """`ID` may be the number of a customer, which several rows have."""
    rows = [{"image": None, "text": "a claim", "ID": 7}, {"image": None, "text": "another", "ID": 7}]
    assert [row.id for row in parse(*rows)] == [None, None]
    (row,) = parse({"image": None, "text": "a claim", "number": 7}, columns=Columns(id="Number"))
    assert row.id == "7"


def test_two_columns_that_are_alike_are_not_chosen_from():
    (row,) = parse({"image": None, "Text": "one", "TEXT": "two"})
    assert row.problems == ("no column 'text'",)


@pytest.mark.parametrize(
    ("what", "names", "suggested"),
    [
        ("image", ("photo", "words"), "photo"),
        ("image", ("words", "Image path"), "Image path"),
        ("text", ("image", "texts"), "texts"),
        ("label", ("my_class", "classes"), "my_class"),
        ("image", ("a", "b"), ""),
    ],
)
def test_a_column_is_suggested(what, names, suggested):
    assert suggested_column(what, what, names) == suggested


def test_ids_are_whole_numbers_of_any_type():
    rows = parse(*({"image": None, "text": "a", "id": value} for value in (7, 7.0, Decimal(7), Decimal("7.00"))))
    assert [row.id for row in rows] == ["7"] * 4
    assert parse({"image": None, "text": "a", "id": Decimal("7.5")})[0].problems
