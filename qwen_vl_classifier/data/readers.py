"""Formats to rows: JSONL, CSV, Parquet, a labelled folder, a Hugging Face data set, or any iterable of rows.

A reader knows little of what a column means. It numbers the rows as a person who looks for one would count
them: by line in a text file, else by position, both from 1. A row that cannot be read is handed on with what
is wrong with it, so that `loading` reports every bad row at once; only what makes the rest unreadable raises.
"""

from __future__ import annotations

import itertools
import operator
import os
import stat
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_vl_classifier.data.arrow_values import python_rows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.folders import METADATA, FolderOptions, folder_rows, metadata_name
from qwen_vl_classifier.data.frames import frame_rows, is_frame
from qwen_vl_classifier.data.labels import NamedLabel
from qwen_vl_classifier.data.lines import csv_header, csv_records, csv_row, jsonl_rows
from qwen_vl_classifier.data.parquet import UNREADABLE, ParquetRows
from qwen_vl_classifier.data.table import Columns, Row, Table, image_columns, needed_columns
from qwen_vl_classifier.data.text_files import FORMATS, UNITS, bounded_lines, format_of, json_row, json_values, unpacked
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.files.near_names import beside
from qwen_vl_classifier.files.paths import is_url

__all__ = ["Columns", "Row", "Table", "read_table"]

_DATASET_ROWS = 1024  # read at a time
_DATASET_BYTES = 16 << 20

_DEFAULT_OPTIONS = FolderOptions()


def read_table(source: object, columns: Columns, options: FolderOptions = _DEFAULT_OPTIONS) -> Table:
    """Choose the reader that fits `source`.

    Args:
        source: Path of a data file or labelled folder, Hugging Face data set, table in memory, iterable of rows, or one
            row alone.
        columns: Names of the columns.
        options: How a folder is read.

    Raises:
        DataError: If `source` is missing or of no known kind.
    """
    if isinstance(source, (str, os.PathLike)):
        return _path_table(os.fspath(source), columns, options)
    needed = needed_columns(columns)
    if is_dataset(source):
        return Table("the data set", "row", dataset_rows(source, columns.label, needed=needed))
    if is_frame(source):
        return Table(f"the {type(source).__name__}", "row", frame_rows(source, needed))
    if isinstance(source, Example):
        return Table("the example", "row", iterable_rows([source], columns))
    if isinstance(source, Mapping):
        if not any(name in source for name in (columns.text, columns.image, *image_columns(columns.image))):
            seen = ", ".join(map(repr, itertools.islice(source, 10)))
            raise DataError(
                f"got a {type(source).__name__} of {seen}; expected one row with a column {columns.text!r}, a list of "
                "rows or one data set; of several splits pick one"
            )
        return Table("the row", "row", iterable_rows([source], columns))
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        kind = type(source).__name__
        raise DataError(f"got a {kind}; expected a path, a data set, a DataFrame, a list of rows or one row")
    rows = iterable_rows(_undecoded(source), columns)
    if class_labels := _class_labels(source, columns.label):  # a data set that is streamed has them too
        rows = (replace(row, values=_named(row.values, columns.label, class_labels)) for row in rows)
    return Table(f"the {type(source).__name__}", "row", rows)


def _path_table(path: str, columns: Columns, options: FolderOptions) -> Table:
    if is_url(path):
        raise DataError(f"{path[:300]!r} is a URL; wanted a local file or folder, as URLs are off; download it first")
    if not path:  # Python takes it for the working directory
        raise DataError("the path of the data is empty; expected a data file or a folder; name one")
    place = Path(path)
    wanted = f"wanted one of {', '.join(FORMATS)} (text also .gz), or a folder with a subfolder for each class"
    try:
        mode = place.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or "the path is not valid"
        near = beside(path) if isinstance(error, FileNotFoundError) else ""
        raise DataError(f"{path[:300]!r} cannot be opened ({reason}); {wanted}; {near or 'check the path'}") from None
    if stat.S_ISDIR(mode):
        metadata = metadata_name((name for name in METADATA if (place / name).is_file()), path)
        if metadata is None:
            return Table(str(place), "picture", folder_rows(place, columns, options), place)
        place = place / metadata
        mode = place.stat().st_mode
    if not stat.S_ISREG(mode):
        raise DataError(f"{path!r} is a pipe, socket or device; {wanted}; copy it to a file")
    kind = format_of(place.name)
    if kind is None:
        raise DataError(f"{path!r} ends in {place.suffix!r}; {wanted}; convert or rename it")
    return Table(
        str(place),
        UNITS[kind],
        _file_rows(place, kind, columns),
        place.parent,
    )


def _file_rows(path: Path, kind: str, columns: Columns) -> Iterator[Row]:
    name, needed = str(path), needed_columns(columns)
    try:
        with path.open("rb") as file:
            if kind == "parquet":
                yield from _parquet_rows(ParquetRows(file, name, needed=needed), columns.label)
                return
            content = unpacked(file, name)
            if kind == "json":
                yield from (json_row(number, value) for number, value in enumerate(json_values(content, name), start=1))
            elif kind == "jsonl":
                yield from jsonl_rows(bounded_lines(content, name))
            else:
                records = csv_records(bounded_lines(content, name), name, kind=kind)
                header = csv_header(records, name, needed=needed)
                yield from (csv_row(number, cells, header) for number, cells in records)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); wanted a data file; check it") from None


def _parquet_rows(table: ParquetRows, label_column: str) -> Iterator[Row]:
    labels = [NamedLabel(label, name) for label, name in enumerate(table.class_names(label_column))]
    for start in range(0, table.count, table.batch_rows):
        for number, values in enumerate(table.rows(start, table.batch_rows), start=start + 1):
            if values is None:
                yield Row(number, problem=UNREADABLE)
            else:
                yield Row(number, _named(values, label_column, labels) if labels else values)


def is_dataset(source: object) -> bool:
    """Tell whether something is a Hugging Face data set."""
    datasets = sys.modules.get("datasets")  # whoever holds a data set has imported it
    return datasets is not None and isinstance(source, datasets.Dataset)


def dataset_rows(dataset: Any, label_column: str, *, needed: Collection[str] = ()) -> Iterator[Row]:
    """Read a Hugging Face data set; a `ClassLabel` is a `NamedLabel`.

    Args:
        dataset: All of it, or what its `select` gave.
        label_column: Column of the label.
        needed: Columns without which a row cannot be used; every other becomes text where Python cannot hold it.
    """
    labels = _class_labels(dataset, label_column)
    for number, values in enumerate(_dataset_values(dataset, needed), start=1):
        if values is None:
            yield Row(number, problem=UNREADABLE)
            continue
        yield Row(number, _named(values, label_column, labels) if labels else values)


def _undecoded(source: Any) -> Any:
    """Return a data set that is streamed as one whose pictures are not loaded, and anything else as it is."""
    has_features = getattr(source, "features", None) is not None
    return source.decode(False) if has_features and callable(getattr(source, "decode", None)) else source


def _class_labels(dataset: Any, label_column: str) -> list[NamedLabel]:
    """Return the classes of a Hugging Face data set, none where its label column is no `ClassLabel`."""
    features = getattr(dataset, "features", None)
    names = getattr(features.get(label_column), "names", None) if isinstance(features, Mapping) else None
    return [NamedLabel(label, name) for label, name in enumerate(names or ())]


def _named(values: Mapping[str, Any], label_column: str, labels: Sequence[NamedLabel]) -> Mapping[str, Any]:
    label: Any = values.get(label_column)
    try:
        number = operator.index(label)
    except TypeError:  # missing, or a word already
        return values
    if number == -1:  # as Hugging Face writes a label that is held back
        return {**values, label_column: None}
    return {**values, label_column: labels[number]} if 0 <= number < len(labels) else values


def _dataset_values(dataset: Any, needed: Collection[str]) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a Hugging Face data set, read in portions that hold little however large its pictures are."""
    tables = dataset.with_format("arrow")  # which hold pictures as their files' bytes or by path: none is decoded
    start, count = 0, 1
    while start < len(dataset):
        table = tables[start : start + count]
        for batch in table.to_batches():
            yield from python_rows(batch, needed)
        start += len(table)
        fitting = _DATASET_BYTES * len(table) // max(table.nbytes, 1)
        count = min(max(fitting, 1), 4 * count, _DATASET_ROWS)


def iterable_rows(items: Iterable[object], columns: Columns, first: int = 1) -> Iterator[Row]:
    """Read rows given in Python: mappings and examples; `first` is the number of the first."""
    for number, item in enumerate(items, start=first):
        if isinstance(item, Example):
            values: dict[str, Any] = {**item.fields, columns.image: item.image, columns.text: item.text}
            yield Row(number, {**values, columns.label: item.label, columns.id: item.id}, example=item)
        elif isinstance(item, Mapping):
            yield Row(number, item)
        else:
            yield Row(number, problem=f"a {type(item).__name__}, wanted a dict or an Example")
