"""Files of scores: the same columns in three formats, the same bytes each time, and errors that can be counted."""

from __future__ import annotations

import csv
import io
import json

import pyarrow.parquet as pq
import pytest

from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.scoring.formats import ScoredRow, all_columns, escape_formula, unescape_formula, write_rows
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
    if form == "jsonl":
        assert [json.loads(line)["label_name_spam"] for line in data.splitlines()] == ["spam", None, "spam", None]


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_rows_give_the_same_bytes(form):
    assert content(form) == content(form)
    assert content(form) != content(form, ROWS[:3])


FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "\uff1d1",
    "\uff0b1",
    "\uff0d1",
    "\uff201",
    "=",
    "'=1",
    "''=1",
]
PLAIN = ["", "a=1", " =1", "'", "'tis", '"=1"', "0", "1-2", "\u2212"]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_text_that_a_spreadsheet_may_run_begins_a_cell_of_csv(text):
    rows = [ScoredRow(text, 0, (NO,)), ScoredRow("x", 1, error=RowError("crashed", text))]
    written = write_rows(rows, ["spam"], "csv", [(text, "spam")], escape_formulas=True)
    _, scored, failed = csv.reader(io.StringIO(written.decode(), newline=""))
    assert scored == [f"'{text}", "0", "1e-17", "0", "no", f"'{text}", "", ""]
    assert failed[-2:] == ["crashed", f"'{text}"]
    as_they_are = write_rows(rows, ["spam"], "csv")
    assert next(csv.DictReader(io.StringIO(as_they_are.decode(), newline="")))["id"] == text


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n", '"\n', ",", "\u2028"])
def test_nothing_in_a_text_begins_a_line_or_a_cell_of_csv(end):
    rows = [ScoredRow(f"x{end}=1+1", 0, (NO,))]
    for escape in (True, False):
        written = write_rows(rows, ["spam"], "csv", escape_formulas=escape).decode()
        assert [len(row) for row in csv.reader(io.StringIO(written, newline=""))] == [7, 7]


@pytest.mark.parametrize("text", [*FORMULAS, *PLAIN])
def test_what_was_escaped_can_be_read_back(text):
    escaped = escape_formula(text)
    assert unescape_formula(escaped) == text
    assert (escaped == text) == (text in PLAIN)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_other_formats_escape_nothing(form):
    rows = [ScoredRow("=1+1", 0, (NO,))]
    assert write_rows(rows, ["spam"], form, escape_formulas=True) == write_rows(rows, ["spam"], form)
