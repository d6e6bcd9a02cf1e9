"""Parse text into rows: JSONL, JSON, CSV (RFC 4180) and TSV, from any row of a file on."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from qwen_vl_classifier.data.labels import folded
from qwen_vl_classifier.data.table import Row, check_names
from qwen_vl_classifier.data.text_files import (
    BYTE_ORDER_MARK,
    MAX_ROW_BYTES,
    LongLine,
    bounded_lines,
    encoding_of,
    refusing_damage,
    row_too_long,
    size_of,
)
from qwen_vl_classifier.errors import DataError

_MAX_JSON = 1 << 28  # bytes of a JSON array, which is read whole
_MAX_VALUES = 10_000_000  # in it: one that takes two bytes there takes a hundred in memory
_DECLARED = re.compile(rb"sep=([,;\t|])[\r\n]*", re.IGNORECASE)  # a line that Excel writes before the names of columns
_QUOTED = re.compile(rb'"[^"]*"')
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}

# The module's own limit of 131,072 is less than a web page in a cell. `_Lines` bounds whole records. It applies to the
# whole process: it is raised here once, and never lowered.
csv.field_size_limit(max(csv.field_size_limit(), 2 * MAX_ROW_BYTES + 2))


def text_rows(
    file: BinaryIO, name: str, kind: str, *, needed: Collection[str] = (), start: int = 0, first: int = 1
) -> Iterator[Row]:
    """Read the rows of a text file, from one of them on.

    Args:
        file: The content, as `unpacked` returns it.
        name: The file, for messages.
        kind: "jsonl", "json", "csv" or "tsv".
        needed: Columns that a table may not have twice.
        start: Where the first row begins, in bytes, or its index in a JSON array; 0 for all rows.
        first: Number of the first row.

    Yields:
        The rows; none if no line begins at `start`.

    Raises:
        DataError: The file cannot be read any further.
    """
    if kind == "json":
        yield from (object_row(number, value) for number, value in enumerate(json_values(file, name)[start:], first))
        return
    records, header, separator = None, [], ""
    if kind != "jsonl":
        blank, line, lines = _first_line(bounded_lines(file, name))
        separator = separator_of(line, kind, name, needed)
        records = csv_records(itertools.chain(blank, lines), name, separator=separator)
        header = csv_header(records, name, needed=needed)
    if start:
        file.seek(start - 1)
        if file.read(1) != b"\n":
            return
        records = None
    if kind == "jsonl":
        yield from jsonl_rows(bounded_lines(file, name), first)
        return
    if records is None:
        records = csv_records(bounded_lines(file, name), name, first, separator=separator)
    yield from (csv_row(number, cells, header) for number, cells in records)


def json_values(file: BinaryIO, name: str) -> list[Any]:
    """Read a JSON array, or JSONL of objects in a file that is named `.json`, as some programs write it.

    Raises:
        DataError: It is neither, or too large.
    """
    with refusing_damage(name):
        content = file.read(_MAX_JSON + 1)
    if len(content) > _MAX_JSON:
        raise DataError(f"{name} has more than {_MAX_JSON:,} bytes; expected a smaller array; write it as JSONL")
    if sum(map(content.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise DataError(f"{name} has more than {_MAX_VALUES:,} values; expected a smaller array; write it as JSONL")
    try:
        text = content.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is {encoding_of(content, error.start)}; expected UTF-8; save it so") from None
    del content
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = text.splitlines()
        first = next((line for line in lines if line.strip()), "")
        try:
            if isinstance(json.loads(first), dict):
                return [json.loads(line) for line in lines if line.strip()]
        except (ValueError, RecursionError):
            pass
        raise DataError(
            f"{name} is not JSON ({str(error).splitlines()[0][:100]}); expected an array of objects [{{...}}, ...]; "
            "correct it, or name JSON lines .jsonl"
        ) from None
    if isinstance(values, dict) and not any(isinstance(value, (dict, list)) for value in values.values()):
        return [values]  # JSONL of a single row
    if not isinstance(values, list):
        keys = f" with {', '.join(map(repr, list(values)[:5]))}" if isinstance(values, dict) else ""
        raise DataError(
            f"{name} holds a JSON {type(values).__name__}{keys}; expected an array of objects [{{...}}, ...]; "
            "write the rows so, or as JSONL"
        )
    return values


def object_row(number: int, value: Any) -> Row:
    """Make a row of a JSON value, which must be an object."""
    if not isinstance(value, dict):
        return Row(number, problem=f"a JSON {type(value).__name__}, expected an object {{...}}")
    return Row(number, value)


def is_blank(number: int, line: bytes) -> bool:
    """Tell whether a line of JSONL holds no row.

    Args:
        number: Number of the line, from 1: some programs write a byte order mark before the first.
        line: All of it.
    """
    if isinstance(line, LongLine):
        return False
    return not line.strip() or (number == 1 and not line.removeprefix(BYTE_ORDER_MARK).strip())


def jsonl_row(number: int, line: bytes) -> Row:
    """Read one line of JSONL; a line that cannot be read becomes a row with a problem."""
    if isinstance(line, LongLine):
        return Row(number, problem=row_too_long(line.size))
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        return object_row(number, json.loads(line.decode("utf-8").rstrip()))
    except UnicodeDecodeError:
        return Row(number, problem="not UTF-8")
    except json.JSONDecodeError as error:
        return Row(number, problem=f"not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError):  # a number of thousands of digits, or brackets nested as deep
        return Row(number, problem="JSON beyond what can be read")


def jsonl_rows(lines: Iterable[bytes], first: int = 1) -> Iterator[Row]:
    """Yield a row for each line that is not blank.

    Args:
        lines: The lines, from any row on.
        first: Number of the first of them.
    """
    for number, line in enumerate(lines, start=first):
        if not is_blank(number, line):
            yield jsonl_row(number, line)


def csv_records(
    lines: Iterable[bytes],
    name: str,
    first: int = 1,
    *,
    kind: str = "csv",
    separator: str = "",
    needed: Collection[str] = (),
) -> Iterator[tuple[int, list[str]]]:
    """Yield each record that is not blank, header included, with the number of its first line.

    A record of empty cells, as spreadsheets leave them below a table, is blank. No line is taken beyond those of the
    records that were yielded.

    Args:
        lines: The lines, from any record on.
        name: The file, for messages.
        first: Number of the first line.
        kind: "csv" or "tsv".
        separator: What separates cells; by default the first line decides.
        needed: Columns that a table may have, by which its separator is found.

    Raises:
        DataError: The text is not UTF-8 or not CSV, so the rest cannot be read.
    """
    lines = iter(lines)
    if not separator:
        blank, line, lines = _first_line(lines)
        separator = separator_of(line, kind, name, needed)
        lines = itertools.chain(blank, lines)
    source = _Lines(lines, name, first)
    reader = csv.reader(source, strict=True, delimiter=separator)
    number = first
    try:
        while True:
            number = first + reader.line_num  # a quoted cell may span lines: this is the first line of the record
            source.held = 0
            cells = next(reader, None)
            if cells is None:
                return
            if source.held > MAX_ROW_BYTES:
                yield number, LongRecord(source.held)
            elif any(cell.strip() for cell in cells):
                yield number, cells
    except csv.Error as error:
        if "new-line character" in str(error):
            raise DataError(
                f"{name}, line {first - 1 + reader.line_num}: a line end of a carriage return alone, as old Macintosh "
                "files have; expected line feeds; save it as CSV UTF-8"
            ) from None
        if source.held > MAX_ROW_BYTES:
            raise DataError(
                f"{name}, line {number}: not CSV (a quote is opened and not closed, so that all lines after it are one "
                "cell); expected a quote at both ends of a cell; correct the file"
            ) from None
        called = _SEPARATORS[separator]
        raise DataError(
            f"{name}, line {first - 1 + reader.line_num}: not CSV ({error}); expected {called}-separated cells, quoted "
            f"where they hold a {called}, a quote or a line break; correct the file"
        ) from None


def csv_header(records: Iterator[tuple[int, list[str]]], name: str, *, needed: Collection[str] = ()) -> list[str]:
    """Take the header from the records of a file; the header of an empty file is empty.

    Args:
        records: The records of the file, from the first on.
        name: The file, for messages.
        needed: Columns that may not be there twice; of others the last counts.

    Raises:
        DataError: It names a needed column twice.
    """
    _, header = next(records, (1, []))
    if len(header) == 2 and header[0].lower() == "sep=" and not header[1]:
        _, header = next(records, (1, []))
    header = [column if column.strip() else "" for column in header]
    check_names(header, needed, name)
    return header


def csv_row(number: int, cells: Sequence[str], header: Sequence[str]) -> Row:
    """Make a row of a record; an empty cell is null."""
    if isinstance(cells, LongRecord):
        return Row(number, problem=row_too_long(cells.size))
    if len(cells) != len(header):
        return Row(number, problem=f"{len(cells)} cells under a header of {len(header)}")
    return Row(number, {name: cell or None for name, cell in zip(header, cells, strict=True) if name or cell})


def _first_line(lines: Iterator[bytes]) -> tuple[list[bytes], bytes, Iterator[bytes]]:
    """Return the blank lines at the start, the first other line (empty without one), and that line and the rest."""
    blank: list[bytes] = []
    for line in lines:
        if line.removeprefix(BYTE_ORDER_MARK).strip():
            return blank, line, itertools.chain([line], lines)
        blank.append(line)
    return blank, b"", lines


def separator_of(line: bytes, kind: str, name: str, needed: Collection[str] = ()) -> str:
    """Return what separates the cells of a table, by its first line: the names of the columns, or Excel's "sep=;".

    It is the character that gives most of the columns that are needed, and then most columns. A file named `.tsv` is
    separated by tabs if its first line has one.

    Args:
        line: The first line that is not blank.
        kind: "csv" or "tsv".
        name: The file, for messages.
        needed: Columns that the table may have, in any case.

    Raises:
        DataError: Two characters are equally likely.
    """
    line = line.removeprefix(BYTE_ORDER_MARK)
    if kind == "tsv" and b"\t" in line:
        return "\t"
    if declared := _DECLARED.fullmatch(line):
        return declared[1].decode()
    known = {*map(folded, needed)}
    likely: dict[str, tuple[int, int]] = {}
    for mark in _SEPARATORS:
        names = _QUOTED.sub(lambda quoted: quoted[0].replace(mark.encode(), b" "), line)  # noqa: B023  # called at once
        cells = [cell.strip().strip('"') for cell in names.decode("utf-8", "replace").split(mark)]
        likely[mark] = (sum(folded(cell) in known for cell in cells), len(cells))
    best = max(likely, key=lambda mark: likely[mark])
    rivals = [mark for mark in likely if likely[mark] == likely[best]]
    if len(rivals) > 1 and min(likely[best]) > 0 and likely[best][1] > 1:
        called = " or ".join(_SEPARATORS[mark] for mark in rivals)
        raise DataError(
            f"{name}, line 1: its columns may be separated by {called}; expected one of them; write "
            f"sep={rivals[0]} (or the other) on a line above the names of the columns"
        )
    return best


class LongRecord(list[str]):
    """Stands for the cells of a record of more than `MAX_ROW_BYTES`.

    Attributes:
        size: Bytes of its lines.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


class _Lines:
    """The lines of a file as text, for a reader of CSV; of a record that is too long, its quotes alone.

    Attributes:
        held: Bytes of the lines that were read since this was set to 0.
    """

    def __init__(self, lines: Iterable[bytes], name: str, first: int) -> None:
        self._lines = enumerate(lines, start=first)
        self._name = name
        self.held = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self._lines)
        self.held += size_of(line)
        if self.held > MAX_ROW_BYTES:  # a quote more or less decides where the record ends
            return '"' * (line.count(b'"') % 2) + "\n"
        try:
            return (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._name}, line {number}: {encoding_of(line, error.start)}; expected UTF-8 text; save it as UTF-8"
            ) from None
