"""A user's own table with columns added: whatever it holds already is copied as it is written there.

A file is read a second time for it. Numbers, dates and ids such as 007 are never parsed, quoted cells stay quoted, and
the separator, the encoding and the ends of lines stay those of the file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from qwen_vl_classifier.data.text_files import (
    BYTE_ORDER_MARK,
    UTF16_MARKS,
    LongLine,
    bounded_lines,
    row_too_long,
    unpacked,
)
from qwen_vl_classifier.data.text_rows import csv_header, csv_records, is_blank, json_values, jsonl_row, separator_of
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.files.bounded import open_regular_file
from qwen_vl_classifier.scoring.formats import escape_formula

Cells: TypeAlias = "Sequence[str | float | int | None]"
"""The values of the added columns in one row."""

_LINE_ENDS = (b"\r\n", b"\n")
_PARQUET_ROWS = 1024  # copied at a time
_UTF16 = ("utf-16-le", "utf-16-be")  # as `UTF16_MARKS`


def copy_with_columns(
    source: Path, kind: str, target: BinaryIO, names: Sequence[str], rows: Sequence[Cells], needed: Collection[str]
) -> None:
    """Copy the first rows of a data file, with columns added.

    Args:
        source: The data file.
        kind: Its format, as `format_of` names it; the copy has the same.
        target: Where the copy is written.
        names: Of the added columns.
        rows: What they hold, for as many rows as are to be copied.
        needed: The columns by which the separator of a table of text is found.

    Raises:
        DataError: The file cannot be copied, or has other rows than when it was read.
    """
    with open_regular_file(source) as file:
        if kind == "parquet":
            copied = _copy_parquet(file, target, names, rows)
        elif kind == "json":
            copied = _copy_json(json_values(unpacked(file, str(source)), str(source)), target, names, rows)
        else:
            mark, encode = _encoding(file, packed=source.name.lower().endswith(".gz"))
            target.write(mark)
            content, copied = unpacked(file, str(source)), 0
            if kind == "jsonl":
                lines = _jsonl(content, str(source), names, rows)
            else:
                lines = _table(content, str(source), kind, names, rows, needed)
            for line, is_row in lines:
                target.write(encode(line))
                copied += is_row
    if copied != len(rows):
        raise DataError(f"{source} has changed since it was read; expected the same {len(rows):,} rows; run again")


def csv_line(cells: Iterable[Any], separator: str, *, escape: bool = True) -> bytes:
    """Write cells as CSV, without the end of the line.

    Args:
        cells: Texts, numbers, or `None` for an empty cell.
        separator: What separates them.
        escape: Put ' before texts that a spreadsheet may take for a formula.
    """
    line = io.StringIO()
    written = [
        "" if cell is None else repr(cell) if not isinstance(cell, str) else escape_formula(cell) if escape else cell
        for cell in cells
    ]
    csv.writer(line, delimiter=separator, lineterminator="\n").writerow(written)
    return line.getvalue()[:-1].encode("utf-8", "replace")


def added_arrays(count: int, rows: Sequence[Cells]) -> list[Any]:
    """Return the added columns as arrays of Arrow: numbers if all values are numbers, else text.

    Args:
        count: How many columns.
        rows: Their values.
    """
    import pyarrow

    arrays = []
    for place in range(count):
        values = [row[place] for row in rows]
        kinds = {type(value) for value in values if value is not None}
        kind = pyarrow.float64() if kinds == {float} else pyarrow.int64() if kinds == {int} else pyarrow.string()
        arrays.append(pyarrow.array(values, kind))
    return arrays


def _table(
    file: BinaryIO, name: str, kind: str, names: Sequence[str], rows: Iterable[Cells], needed: Collection[str]
) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines of a table of text with cells added to each record, and whether a row ends with the line."""
    taken: list[bytes] = []  # and not yielded yet
    count, separator = 0, ""

    def lines() -> Iterator[bytes]:
        nonlocal count, separator
        for line in bounded_lines(file, name):
            if isinstance(line, LongLine):
                raise DataError(f"{name}: {row_too_long(line.size)}, which cannot be copied; take it out, or split it")
            if not separator and line.removeprefix(BYTE_ORDER_MARK).strip():
                separator = separator_of(line, kind, name, needed)
            taken.append(line)
            count += 1
            yield line

    def passed_on(cells: Iterable[Any], *, is_row: bool, escape: bool = True) -> Iterator[tuple[bytes, bool]]:
        *before, last = taken
        taken.clear()
        yield from ((line, False) for line in before)
        end = next((end for end in _LINE_ENDS if last.endswith(end)), b"")
        more = csv_line(cells, separator, escape=escape)
        yield last.removesuffix(end) + (separator.encode() + more if last.removesuffix(end) else more) + end, is_row

    records = csv_records(lines(), name, kind=kind, needed=needed)
    header = csv_header(records, name, needed=needed)
    yield from passed_on(names, is_row=False)
    for added, (number, record) in zip(rows, records, strict=False):
        if len(record) > len(header):  # what is too much goes to the last of its own columns
            end = next((end for end in _LINE_ENDS if taken[-1].endswith(end)), b"")
            fitting = [*record[: len(header) - 1], separator.join(record[len(header) - 1 :])]
            taken[number - 1 - count :] = [csv_line(fitting, separator, escape=False) + end]
        yield from passed_on([None] * (len(header) - len(record)) + [*added], is_row=True)


def _jsonl(file: BinaryIO, name: str, names: Sequence[str], rows: Sequence[Cells]) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines of a file of JSONL with values added to each object, and whether each is a row."""
    remaining = iter(rows)
    for number, line in enumerate(bounded_lines(file, name), start=1):
        if is_blank(number, line):
            yield line, False
            continue
        if (added := next(remaining, None)) is None:
            return
        row = jsonl_row(number, line)
        more = json.dumps(dict(zip(names, added, strict=True)), ensure_ascii=False).encode("utf-8", "replace")
        if row.problem:
            text = row.problem if isinstance(line, LongLine) else line.decode("utf-8", "replace").strip()
            yield b'{"row": ' + json.dumps(text).encode() + b", " + more[1:] + b"\n", True
            continue
        own = line.rstrip()
        yield own[:-1].rstrip() + (b", " if row.values else b"") + more[1:] + line[len(own) :], True


def _copy_json(values: Sequence[Any], target: BinaryIO, names: Sequence[str], rows: Sequence[Cells]) -> int:
    """Write an array of JSON with values added to each object; return how many there are."""
    lines = []
    for value, added in zip(values, rows, strict=False):
        own = value if isinstance(value, Mapping) else {"row": value}
        lines.append(json.dumps({**own, **dict(zip(names, added, strict=True))}, ensure_ascii=False))
    target.write(("[\n" + ",\n".join(lines) + "\n]\n").encode("utf-8", "replace"))
    return len(lines)


def _copy_parquet(file: BinaryIO, target: BinaryIO, names: Sequence[str], rows: Sequence[Cells]) -> int:
    """Copy the first rows of a Parquet file, types and metadata included; return how many there are."""
    import pyarrow
    from pyarrow import parquet

    added = pyarrow.table(added_arrays(len(names), rows), names=list(names))
    table = parquet.ParquetFile(file)
    schema = table.schema_arrow
    for one in added.schema:
        schema = schema.append(one)
    copied = 0
    with parquet.ParquetWriter(target, schema) as writer:
        for batch in table.iter_batches(_PARQUET_ROWS):
            part = batch.slice(0, len(rows) - copied)
            if not len(part):
                break
            more = added.slice(copied, len(part)).combine_chunks()
            arrays = [*part.columns, *(column.combine_chunks() for column in more.columns)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            copied += len(part)
    return copied


def _encoding(file: BinaryIO, *, packed: bool) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Return the mark at the start of a file of UTF-16, nothing for UTF-8, and what encodes a line likewise."""
    start = (cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file).read(2)
    file.seek(0)
    if start not in UTF16_MARKS:
        return b"", bytes
    encoding = _UTF16[UTF16_MARKS.index(start)]
    return start, lambda line: line.decode().encode(encoding)
