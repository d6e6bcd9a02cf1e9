"""A user's own table comes back as it was, but for the columns that were added."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from datetime import date
from decimal import Decimal

import pyarrow
import pytest
from pyarrow import parquet

from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.scoring.tables.table_formats import write_table

NAMES = ["probability", "note"]
ADDED = [[0.125, "fine"], [None, "=1+1"]]
NEEDED = Columns().needed


def copy(path, content: bytes, rows=ADDED, out="") -> bytes:
    """Write a file, copy it with columns added, and return what was written."""
    source, target = path / out.replace("out", "in"), path / out
    source.write_bytes(content)
    write_table(target, NAMES, rows, own_rows=(), copied=source, needed=NEEDED)
    return target.read_bytes()


TABLES = {
    "plain": (b"image,text\na,b\nc,d\n", b"image,text,probability,note\na,b,0.125,fine\nc,d,,'=1+1\n"),
    "quoted": (
        b'\xef\xbb\xbf"id";"Image ";text\r\n"007";"a;b";"say ""no"""\r\n1.10;c;x',
        b'\xef\xbb\xbf"id";"Image ";text;probability;note\r\n"007";"a;b";"say ""no""";0.125;fine\r\n1.10;c;x;;\'=1+1',
    ),
    "lines in cells": (
        b'image,text\na,"two\nlines"\n,,\n\nc,"d\n"\n',
        b'image,text,probability,note\na,"two\nlines",0.125,fine\n,,\n\nc,"d\n",,\'=1+1\n',
    ),
    "declared": (
        b"sep=;\r\nimage;text\r\na;b\r\nc;d\r\n",
        b"sep=;\r\nimage;text;probability;note\r\na;b;0.125;fine\r\nc;d;;'=1+1\r\n",
    ),
    "too few and too many": (
        b"image,text,more\na,b\nc,Hello, world, and more\n",
        b'image,text,more,probability,note\na,b,,0.125,fine\nc,Hello," world, and more",,\'=1+1\n',
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_all_that_a_table_holds_is_kept(tmp_path, name):
    before, after = TABLES[name]
    assert copy(tmp_path, before, out="out.csv") == after


def test_a_packed_table_is_packed_again(tmp_path):
    before, after = TABLES["quoted"]
    assert gzip.decompress(copy(tmp_path, gzip.compress(before), out="out.csv.gz")) == after


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_stays_utf_16(tmp_path, encoding):
    mark = codecs.BOM_UTF16_LE if encoding == "utf-16-le" else codecs.BOM_UTF16_BE
    before = mark + "image\ttext\r\nä\t007\r\nc\tgrün\r\n".encode(encoding)
    after = mark + "image\ttext\tprobability\tnote\r\nä\t007\t0.125\tfine\r\nc\tgrün\t\t'=1+1\r\n".encode(encoding)
    assert copy(tmp_path, before, out="out.csv") == after


def test_jsonl_keeps_numbers_escapes_and_blank_lines(tmp_path):
    before = b'{"id": 1.10, "text": "\\u00e9", "big": 123456789012345678901234567890}\r\n\n  {}\nnot JSON\n'
    lines = copy(tmp_path, before, [[0.5, "a"], [0.5, "b"], [None, "bad"]], "out.jsonl").split(b"\n")
    assert lines[0] == before.split(b"}")[0] + b', "probability": 0.5, "note": "a"}\r'
    assert lines[1:] == [
        b"",
        b'  {"probability": 0.5, "note": "b"}',
        b'{"row": "not JSON", "probability": null, "note": "bad"}',
        b"",
    ]
    assert json.loads(lines[0])["big"] == 123456789012345678901234567890


def test_an_array_of_json_keeps_its_values(tmp_path):
    before = [{"id": "007", "big": 10**30, "parts": [1, {"a": None}]}, 7]
    after = json.loads(copy(tmp_path, json.dumps(before).encode(), out="out.json"))
    assert after[0] == {**before[0], "probability": 0.125, "note": "fine"}
    assert after[1] == {"row": 7, "probability": None, "note": "=1+1"}


def test_parquet_keeps_types_and_metadata(tmp_path):
    table = pyarrow.table(
        {
            "id": pyarrow.array(["007", None, "x"]).dictionary_encode(),
            "day": [date(2026, 1, 2)] * 3,
            "price": pyarrow.array([Decimal("1.10")] * 3),
            "image": [{"bytes": b"png", "path": None}] * 3,
        }
    ).replace_schema_metadata({"about": "me"})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, row_group_size=2)
    copy(tmp_path, buffer.getvalue(), [[0.5, None], [0.25, "a"]], "out.parquet")
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found.select(table.column_names).equals(table.slice(0, 2))
    assert found.schema.metadata[b"about"] == b"me"
    assert found.schema.field("id").type == table.schema.field("id").type
    assert found["probability"].to_pylist() == [0.5, 0.25]
    assert found["note"].to_pylist() == [None, "a"]


def test_only_the_first_rows_are_copied_where_there_are_fewer(tmp_path):
    assert copy(tmp_path, TABLES["plain"][0], ADDED[:1], "out.csv") == b"image,text,probability,note\na,b,0.125,fine\n"


def test_a_file_that_has_changed_is_an_error_and_nothing_is_written(tmp_path):
    with pytest.raises(DataError, match="has changed"):
        copy(tmp_path, TABLES["plain"][0], ADDED * 2, "out.csv")
    assert not (tmp_path / "out.csv").exists()


OWN = [{"id": "007", "text": 'a,\n"b"', "n": 1, "day": date(2026, 1, 2), "list": [1, "x"]}, {"text": None, "n": 2.5}]


def test_other_formats_hold_the_same_values(tmp_path):
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.json"):
        write_table(tmp_path / name, NAMES, ADDED, own_rows=OWN)
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        header, first, second = csv.reader((tmp_path / name).read_text().splitlines(True), delimiter=separator)
        assert header == ["id", "text", "n", "day", "list", *NAMES]
        assert first == ["007", 'a,\n"b"', "1", "2026-01-02", '[1, "x"]', "0.125", "fine"]
        assert second == ["", "", "2.5", "", "", "", "'=1+1"]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == json.loads((tmp_path / "a.json").read_text())
    assert lines[0] == {**OWN[0], "day": "2026-01-02", "probability": 0.125, "note": "fine"}
    own = [{"id": "007", "n": 1}, {"id": None, "n": 2}]
    write_table(tmp_path / "a.parquet", NAMES, ADDED, own_rows=own)
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist()[0] == {**own[0], "probability": 0.125, "note": "fine"}


@pytest.mark.parametrize(
    ("name", "own", "error", "message"),
    [
        ("a.csv", [{"image": {"bytes": b"x"}}], DataError, "holds the bytes of pictures.*parquet"),
        ("a.parquet", [{"a": 1}, {"a": "x"}], DataError, "values of several types.*jsonl"),
        ("a.xlsx", [], ConfigError, "expected a name that ends in"),
        ("no/such/a.csv", [], ConfigError, "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_told(tmp_path, name, own, error, message):
    with pytest.raises(error, match=message):
        write_table(tmp_path / name, NAMES, ADDED[: len(own)], own_rows=own)
    assert not (tmp_path / name).exists()
