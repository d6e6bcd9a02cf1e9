"""Parquet by position: any rows, in any order, and a digest that costs no reading."""

from __future__ import annotations

import hashlib
import io

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from qwen_vl_classifier.data.parquet import ParquetRows
from qwen_vl_classifier.errors import DataError


def written(count: int, group: int) -> io.BytesIO:
    file = io.BytesIO()
    table = pyarrow.table({"row": range(count), "text": [f"text {row}" for row in range(count)]})
    parquet.write_table(table, file, row_group_size=group)
    return file


@given(
    group=st.integers(1, 700),
    ranges=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 600)), max_size=5),
)
def test_any_rows_in_any_order(group, ranges):
    rows = ParquetRows(written(900, group), "rows")
    assert (rows.count, rows.column_names) == (900, ["row", "text"])
    for start, count in ranges:
        expected = [{"row": row, "text": f"text {row}"} for row in range(start, min(start + count, 900))]
        assert rows.rows(start, count) == expected


def test_single_columns():
    assert ParquetRows(written(5, 2), "rows", ["row"]).rows(1, 3) == [{"row": 1}, {"row": 2}, {"row": 3}]


def test_the_digest_is_of_size_and_footer():
    file = written(50, 10)
    content = file.getvalue()
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") : -8]
    expected = hashlib.sha256(len(content).to_bytes(8, "little") + footer).hexdigest()
    rows = ParquetRows(file, "rows")
    rows.rows(7, 3)
    assert rows.digest() == expected
    assert rows.rows(10, 1)[0]["row"] == 10  # looking at the end does not disturb reading
    assert ParquetRows(written(50, 11), "rows").digest() != expected


def test_an_empty_file_has_no_rows():
    rows = ParquetRows(written(0, 1), "rows")
    assert (rows.count, rows.rows(0, 5)) == (0, [])


def test_damage_in_the_middle_shows_when_it_is_read():
    content = bytearray(written(1024, 512).getvalue())
    start = parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(1).column(1).data_page_offset
    content[start : start + 40] = b"\xff" * 40
    rows = ParquetRows(io.BytesIO(content), "rows")
    assert [row["row"] for row in rows.rows(0, 256)] == list(range(256))
    with pytest.raises(DataError, match="rows cannot be read as Parquet"):
        rows.rows(512, 1)
