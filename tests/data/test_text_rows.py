"""Lines to rows from anywhere in a file: numbers and messages are those of the whole file."""

from __future__ import annotations

import pytest

from qwen_vl_classifier.data.text_rows import csv_header, csv_records, csv_row, is_blank, jsonl_row, jsonl_rows
from qwen_vl_classifier.errors import DataError


def test_jsonl_is_numbered_from_where_it_begins():
    found = [(row.number, row.values or row.problem) for row in jsonl_rows([b'{"a": 1}\n', b"\n", b"7"], first=40)]
    assert found == [(40, {"a": 1}), (42, "a JSON int, expected an object {...}")]


def test_a_mark_is_passed_over_on_the_first_line_only():
    line = b'\xef\xbb\xbf{"a": 1}'
    assert jsonl_row(1, line).values == {"a": 1}
    assert jsonl_row(2, line).problem.startswith("not JSON")
    assert (is_blank(1, b"\xef\xbb\xbf\r\n"), is_blank(2, b"\xef\xbb\xbf\r\n")) == (True, False)


def test_csv_is_numbered_from_where_it_begins():
    lines = [b'"two\r\n', b'lines",x\r\n', b"\r\n", b"a\r\n"]
    records = list(csv_records(lines, "rows", first=40))
    assert records == [(40, ["two\r\nlines", "x"]), (43, ["a"])]
    assert csv_row(*records[0], ["text", "id"]).values == {"text": "two\r\nlines", "id": "x"}
    assert csv_row(*records[1], ["text", "id"]).problem == "1 cells under a header of 2"


def test_no_line_is_asked_for_before_it_is_needed():
    taken = []
    lines = (taken.append(line) or line for line in [b"a,b\n", b'"1\n', b'",2\n', b"3,4\n"])
    records = csv_records(lines, "rows")
    assert (csv_header(records, "rows"), len(taken)) == (["a", "b"], 1)
    assert (next(records), len(taken)) == ((2, ["1\n", "2"]), 3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b"a\n", b'"b" c\n'], "rows, line 41: not CSV"),
        ([b"a\n", b"\xff\n"], "rows, line 41: not UTF-8"),
    ],
)
def test_what_makes_the_rest_unreadable_names_its_line(lines, message):
    with pytest.raises(DataError, match=message):
        list(csv_records(lines, "rows", first=40))
