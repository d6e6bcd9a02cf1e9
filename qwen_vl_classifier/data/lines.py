"""Lines to rows: JSONL, CSV by RFC 4180 and TSV. All may begin anywhere in a file, at the first line of a row."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from qwen_vl_classifier.data.table import Row
from qwen_vl_classifier.data.text_files import encoding_of
from qwen_vl_classifier.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DECLARED = re.compile(rb"sep=([,;\t])[\r\n]*", re.IGNORECASE)  # a line that Excel writes before the names of columns
_QUOTED = re.compile(rb'"[^"]*"')

# The module's own limit of 131,072 is less than a web page in a cell. Without any, a quote that is never closed would
# take the rest of a file for one cell. It holds for the whole process: it is raised here once, and never lowered.
csv.field_size_limit(max(csv.field_size_limit(), 1 << 24))


def is_blank(number: int, line: bytes) -> bool:
    """Tell whether a line of JSONL is no row.

    Args:
        number: Which line, from 1: some programs write a byte order mark before the first.
        line: All of it.
    """
    return not line.strip() or (number == 1 and not line.removeprefix(_BYTE_ORDER_MARK).strip())


def jsonl_row(number: int, line: bytes) -> Row:
    """Read one line of JSONL, or say what is wrong with it."""
    if number == 1:
        line = line.removeprefix(_BYTE_ORDER_MARK)
    try:
        values = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError:
        return Row(number, problem="not UTF-8")
    except json.JSONDecodeError as error:
        return Row(number, problem=f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError):  # a number of thousands of digits, or brackets nested as deep
        return Row(number, problem="JSON beyond what can be read")
    if not isinstance(values, dict):
        return Row(number, problem=f"a JSON {type(values).__name__}, wanted an object {{...}}")
    return Row(number, values)


def jsonl_rows(lines: Iterable[bytes], first: int = 1) -> Iterator[Row]:
    """Yield a row for each line that is not blank.

    Args:
        lines: The file's, from a row on.
        first: Number of the first of them.
    """
    for number, line in enumerate(lines, start=first):
        if not is_blank(number, line):
            yield jsonl_row(number, line)


def delimiter_of(line: bytes, kind: str = "csv") -> str:
    """Return what separates the cells of a table: of CSV a comma, or what its first line has more of outside quotes.

    Args:
        line: The first line that is not blank: the names of the columns, or Excel's "sep=;".
        kind: "csv" or "tsv".
    """
    if kind == "tsv":
        return "\t"
    if declared := _DECLARED.fullmatch(line.removeprefix(_BYTE_ORDER_MARK)):
        return declared[1].decode()
    plain = _QUOTED.sub(b"", line)
    return max(",;\t", key=lambda mark: plain.count(mark.encode()))  # the first of those that are equally frequent


def first_line(lines: Iterator[bytes]) -> tuple[list[bytes], bytes]:
    """Take lines up to the first that is not blank; return those before it, and it, which is empty at the end."""
    before: list[bytes] = []
    for line in lines:
        if line.removeprefix(_BYTE_ORDER_MARK).strip():
            return before, line
        before.append(line)
    return before, b""


def csv_records(
    lines: Iterable[bytes], name: str, first: int = 1, *, kind: str = "csv", delimiter: str = ""
) -> Iterator[tuple[int, list[str]]]:
    """Yield each record that is not blank, header included, with the number of its first line.

    A record of empty cells, as spreadsheets leave them below a table, is blank. No line is asked for beyond those that
    the records given so far take.

    Args:
        lines: The file's, from a record on.
        name: The file, for messages.
        first: Number of the first line.
        kind: "csv" or "tsv".
        delimiter: What separates cells; without, the first line tells.

    Raises:
        DataError: The text is not UTF-8 or not CSV, so nothing after it can be read.
    """
    lines = iter(lines)
    if not delimiter:
        blank, line = first_line(lines)
        delimiter = delimiter_of(line, kind)
        lines = itertools.chain(blank, [line], lines)
    table = csv.reader(_decoded(lines, name, first), strict=True, delimiter=delimiter)
    try:
        while True:
            number = first + table.line_num  # a quoted cell may span lines: this is the record's first
            cells = next(table, None)
            if cells is None:
                return
            if any(cell.strip() for cell in cells):
                yield number, cells
    except csv.Error as error:
        if "new-line character" in str(error):
            raise DataError(
                f"{name}, line {first - 1 + table.line_num}: a line end of a carriage return alone, as old Macintosh "
                "files have; expected line feeds; save it as CSV UTF-8"
            ) from None
        separated = {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]
        raise DataError(
            f"{name}, line {first - 1 + table.line_num}: not CSV ({error}); wanted {separated}-separated cells, quoted "
            f"where they hold a {separated}, a quote or a line break; correct the file"
        ) from None


def csv_header(records: Iterator[tuple[int, list[str]]], name: str, *, needed: Collection[str] = ()) -> list[str]:
    """Take the header from the records of a file; an empty file has an empty one.

    Args:
        records: The file's, from the first on.
        name: The file, for messages.
        needed: Columns that may not be there twice; of others the last counts.

    Raises:
        DataError: It names a needed column twice.
    """
    _, header = next(records, (1, []))
    if len(header) == 2 and header[0].lower() == "sep=" and not header[1]:
        _, header = next(records, (1, []))
    header = [name if name.strip() else "" for name in header]
    if twice := [column for column in needed if header.count(column) > 1]:
        raise DataError(f"{name} names column {twice[0]!r} twice: {header}; expected each name once; rename one")
    return header


def csv_row(number: int, cells: Sequence[str], header: Sequence[str]) -> Row:
    """Make a row of a record; an empty cell is null."""
    if len(cells) != len(header):
        return Row(number, problem=f"{len(cells)} cells under a header of {len(header)}")
    return Row(number, {name: cell or None for name, cell in zip(header, cells, strict=True) if name or cell})


def _decoded(lines: Iterable[bytes], name: str, first: int) -> Iterator[str]:
    for number, line in enumerate(lines, start=first):
        try:
            yield (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}, line {number}: {encoding_of(line, error.start)}; wanted UTF-8 text; save it as UTF-8"
            ) from None
