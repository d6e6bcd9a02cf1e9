"""Formats to rows: JSONL, CSV, Parquet, a labelled folder, a Hugging Face data set, or any iterable of rows.

A reader knows little of what a column means. It numbers the rows as a person who looks for one would count
them: by line in a text file, else by position, both from 1. A row that cannot be read is handed on with what
is wrong with it, so that `loading` reports every bad row at once; only what makes the rest unreadable raises.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.images import is_url
from qwen_vl_classifier.errors import DataError

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, slots=True)
class Row:
    """One row, as read.

    Attributes:
        number: Line (JSONL, CSV) or position in the table, both from 1.
        values: Column name to value.
        problem: What is wrong with the row where it could not be read, else "".
    """

    number: int
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Columns:
    """The names under which the parts of an example are found."""

    image: str
    text: str
    label: str
    id: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows to come, and how to speak of them.

    Attributes:
        name: The source, for messages.
        unit: What a row's number counts: "line" or "row".
        rows: The rows, read as they are asked for.
        folder: Where relative image paths begin, and may not leave; `None` for rows given in Python.
    """

    name: str
    unit: str
    rows: Iterator[Row]
    folder: Path | None = None


def read_table(source: object, columns: Columns, *, label_names: bool = False) -> Table:
    """Choose the reader that fits `source`.

    Args:
        source: Path of a data file or labelled folder, Hugging Face data set, or iterable of rows.
        columns: Names of the columns.
        label_names: Give a Hugging Face `ClassLabel` by its name rather than by its number.

    Raises:
        DataError: If `source` is missing or of no known kind.
    """
    if isinstance(source, (str, os.PathLike)):
        return _path_table(os.fspath(source), columns)
    datasets = sys.modules.get("datasets")  # whoever holds a data set has imported it
    if datasets is not None and isinstance(source, datasets.Dataset):
        return Table("the data set", "row", _dataset_rows(source, columns.label, label_names=label_names))
    if isinstance(source, Mapping):
        kind, seen = type(source).__name__, ", ".join(map(repr, itertools.islice(source, 10)))
        raise DataError(f"got a {kind} of {seen}; wanted a list of rows or one data set; pick one split, or use a list")
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        kind = type(source).__name__
        raise DataError(f"got a {kind}; wanted a path, a data set or a list of rows; put one row in a list")
    return Table(f"the {type(source).__name__}", "row", _iterable_rows(source, columns))


def _path_table(path: str, columns: Columns) -> Table:
    if is_url(path):
        raise DataError(f"{path[:300]!r} is a URL; wanted a local file or folder, as URLs are off; download it first")
    place = Path(path)
    readers = {
        ".jsonl": (_jsonl_rows, "line"),
        ".ndjson": (_jsonl_rows, "line"),
        ".csv": (_csv_rows, "line"),
        ".parquet": (_parquet_rows, "row"),
    }
    wanted = f"wanted one of {', '.join(readers)}, or a folder with subfolders 0 and 1"
    try:
        mode = place.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or "the path is not valid"
        raise DataError(f"{path[:300]!r} cannot be opened ({reason}); {wanted}; check the path") from None
    if stat.S_ISDIR(mode):
        return Table(str(place), "picture", _folder_rows(place, columns), place)
    if not stat.S_ISREG(mode):
        raise DataError(f"{path!r} is a pipe, socket or device; {wanted}; copy it to a file")
    if place.suffix.lower() not in readers:
        raise DataError(f"{path!r} ends in {place.suffix!r}; {wanted}; convert or rename it")
    reader, unit = readers[place.suffix.lower()]
    return Table(str(place), unit, reader(place), place.parent)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8").rstrip())
        except UnicodeDecodeError:
            yield Row(number, problem="not UTF-8")
        except json.JSONDecodeError as error:
            yield Row(number, problem=f"not JSON ({error.msg} at column {error.colno})")
        except (ValueError, RecursionError):  # a number of thousands of digits, or brackets nested as deep
            yield Row(number, problem="JSON beyond what can be read")
        else:
            if isinstance(values, dict):
                yield Row(number, values)
            else:
                yield Row(number, problem=f"a JSON {type(values).__name__}, wanted an object {{...}}")


def _csv_rows(path: Path) -> Iterator[Row]:
    """Read comma-separated values with a header (RFC 4180); an empty cell is null."""
    table = csv.reader(_decoded_lines(path), strict=True)
    try:
        header = next(table, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path} names a column twice: {header}; wanted each name once; rename one")
        while True:
            number = table.line_num + 1  # a quoted cell may span lines: this is the row's first
            cells = next(table, None)
            if cells is None:
                return
            if cells and len(cells) != len(header):
                yield Row(number, problem=f"{len(cells)} cells under a header of {len(header)}")
            elif cells:
                yield Row(number, {name: cell or None for name, cell in zip(header, cells, strict=True)})
    except csv.Error as error:
        raise DataError(
            f"{path}, line {table.line_num}: not CSV ({error}); wanted comma-separated cells, quoted where "
            "they hold a comma, a quote or a line break; correct the file"
        ) from None


def _decoded_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path}, line {number}: not UTF-8; wanted UTF-8 text; save it so") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each line with its number, without the byte order mark that some programs put first."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); wanted a text file; check it") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for column in file.schema_arrow:
                # Extension types run code of their own; plain columns hold all that an example needs.
                if isinstance(column.type, pyarrow.BaseExtensionType):
                    raise DataError(
                        f"{path} has column {column.name!r} of extension type {column.type.extension_name}; "
                        "wanted plain types; cast or drop it"
                    )
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values)
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        kind = type(error).__name__  # ValueError: text that is not UTF-8; OverflowError: a date beyond Python's
        raise DataError(f"{path} cannot be read as Parquet ({kind}); wanted a whole file; write it again") from None


def _dataset_rows(dataset: Any, label_column: str, *, label_names: bool) -> Iterator[Row]:
    names = getattr(dataset.features.get(label_column), "names", None)  # only a ClassLabel has them
    number = 0
    # As Arrow tables, the rows hold pictures in their files' bytes or by path: none is decoded.
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        for values in table.to_pylist():
            number += 1
            if names:
                label = values[label_column]
                unknown = label is None or label < 0  # Hugging Face writes -1 where a label is held back
                values[label_column] = None if unknown else names[label] if label_names else label
            yield Row(number, values)


def _iterable_rows(items: Iterable[object], columns: Columns) -> Iterator[Row]:
    for number, item in enumerate(items, start=1):
        if isinstance(item, Example):
            values: dict[str, Any] = {**item.fields, columns.image: item.image, columns.text: item.text}
            yield Row(number, {**values, columns.label: item.label, columns.id: item.id})
        elif isinstance(item, Mapping):
            yield Row(number, item)
        else:
            yield Row(number, problem=f"a {type(item).__name__}, wanted a dict or an Example")


def _folder_rows(folder: Path, columns: Columns) -> Iterator[Row]:
    """Read pictures from subfolders "0" and "1", each named for its label, in order of file name."""
    classes = [entry.name for entry in _visible(folder) if entry.is_dir()]
    if classes != ["0", "1"]:
        raise DataError(
            f"{folder} has subfolders {classes[:10]}; wanted two, '0' and '1', with the pictures of each "
            "class; sort the pictures so, or name a data file"
        )
    paths = [path for label in classes for path in _visible(folder / label)]
    for number, path in enumerate(paths, start=1):
        label = path.parent.name
        name = f"{label}/{path.name}"
        if path.suffix.lower() in _IMAGE_SUFFIXES:
            yield Row(number, {columns.image: name, columns.label: int(label)})
        else:
            yield Row(number, problem=f"{name!r} does not end in {' or '.join(_IMAGE_SUFFIXES)}")


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); wanted a folder; check it") from None
