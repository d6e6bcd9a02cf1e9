"""Files of scores: the same columns in three formats, the same bytes each time, and errors that can be counted."""

from __future__ import annotations

import csv
import io
import json

import pyarrow.parquet as pq
import pytest

from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.scoring.formats import ScoredRow, all_columns, errors_in, write_rows
from qwen_vl_classifier.scoring.jobs import RowError

FORMATS = ("parquet", "jsonl", "csv")
YES, NO, ABSTAIN = Prediction(1, 0.75, "yes"), Prediction(0, 1e-17, "no"), Prediction(1, 0.1 + 0.2, "abstain")
HOSTILE = 'a,"b"\n{"error_code":null,\r\u2028=1+1\ud800ü'
ROWS = [
    ScoredRow("x", 0, (YES, NO)),
    ScoredRow(HOSTILE, 1, error=RowError("image_missing", HOSTILE)),
    ScoredRow("", 2, (ABSTAIN, YES)),
    ScoredRow("z", 3, error=RowError("crashed", "gone")),
]
NAMES = ["spam", "eggs"]
COLUMNS = [
    *("id", "row", "probability_spam", "probability_eggs", "label_spam", "label_eggs"),
    *("decision_spam", "decision_eggs", "error_code", "error"),
]
WRITABLE = HOSTILE.replace("\ud800", "?")
VALUES = [
    ["x", 0, 0.75, 1e-17, 1, 0, "yes", "no", None, None],
    [WRITABLE, 1, None, None, None, None, None, None, "image_missing", WRITABLE],
    ["", 2, 0.1 + 0.2, 0.75, 1, 1, "abstain", "yes", None, None],
    ["z", 3, None, None, None, None, None, None, "crashed", "gone"],
]


def content(form: str, rows=ROWS, names=NAMES) -> bytes:
    return write_rows(rows, names, form)


def count(form: str, data: bytes, rows: int = 4, names=NAMES) -> int | None:
    return errors_in(io.BytesIO(data), rows, names, form)


def test_parquet_holds_the_documented_columns_and_values():
    table = pq.read_table(io.BytesIO(content("parquet")))
    types = {"row": "int64", "label_spam": "int64", "label_eggs": "int64"}
    types |= {"probability_spam": "double", "probability_eggs": "double"}
    assert table.schema.names == COLUMNS
    assert [str(kind) for kind in table.schema.types] == [types.get(name, "string") for name in COLUMNS]
    assert [list(row.values()) for row in table.to_pylist()] == VALUES


def test_jsonl_holds_the_same():
    lines = content("jsonl").decode().splitlines()
    assert [list(json.loads(line)) for line in lines] == [COLUMNS] * 4
    assert [list(json.loads(line).values()) for line in lines] == VALUES


def test_csv_holds_the_same_as_text():
    header, *rows = csv.reader(io.StringIO(content("csv").decode(), newline=""))
    assert header == COLUMNS
    assert rows == [["" if value is None else str(value) for value in row] for row in VALUES]
    assert [float(rows[row][2]) for row in (0, 2)] == [0.75, 0.1 + 0.2]


def test_columns_of_a_single_classifier_carry_no_name():
    assert all_columns(["spam"]) == ["id", "row", "probability", "label", "decision", "error_code", "error"]


@pytest.mark.parametrize("form", FORMATS)
def test_words_for_the_classes_have_a_column(form):
    words = [("ham", "spam"), None]
    data = write_rows(ROWS, NAMES, form, words)
    assert all_columns(NAMES, words) == [*COLUMNS[:-2], "label_name_spam", *COLUMNS[-2:]]
    assert all_columns(["one"], words[:1])[-3:] == ["label_name", "error_code", "error"]
    assert errors_in(io.BytesIO(data), 4, NAMES, form, words) == 2
    assert errors_in(io.BytesIO(data), 4, NAMES, form) is None
    if form == "jsonl":
        assert [json.loads(line)["label_name_spam"] for line in data.splitlines()] == ["spam", None, "spam", None]


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_rows_give_the_same_bytes(form):
    assert content(form) == content(form)
    assert content(form) != content(form, ROWS[:3])


@pytest.mark.parametrize("form", FORMATS)
def test_errors_are_counted_and_another_shape_is_noticed(form):
    data = content(form)
    assert count(form, data) == 2
    assert count(form, content(form, ROWS[::2]), rows=2) == 0
    assert count(form, data, rows=3) is None
    assert count(form, data, names=["spam", "ham"]) is None
    assert count(form, b"") is None
    assert count(form, b"no scores\n" * 4) is None
    assert count(form, data[:-7]) is None
    assert count(form, content(form, [])) is None


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_bytes_that_are_no_text_are_noticed(form):
    data = content(form)
    assert count(form, b"\xff" + data[1:]) is None
