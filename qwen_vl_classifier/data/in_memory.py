"""Rows that a program holds: tables of pandas, polars and pyarrow, Hugging Face data sets, and iterables.

Only pyarrow need be installed of these libraries.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qwen_vl_classifier.data.arrow_values import python_rows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import NamedLabel
from qwen_vl_classifier.data.table import Columns, Row, check_names, name_in, numbered_rows
from qwen_vl_classifier.errors import DataError

_READ = {
    ("pandas", "DataFrame"): "pandas",
    ("polars", "DataFrame"): "polars",
    ("pyarrow", "Table"): "arrow",
    ("pyarrow", "RecordBatch"): "arrow",
}
_FRAMES = frozenset(("DataFrame", "LazyFrame", "Table"))  # names that libraries have for a table in memory
_ROWS = 1024  # read at a time
_BYTES = 16 << 20  # of a data set whose rows may hold pictures


def iterable_rows(items: Iterable[object], columns: Columns, first: int = 1) -> Iterator[Row]:
    """Read rows given in Python: mappings and examples; `first` is the number of the first."""
    for number, item in enumerate(items, start=first):
        if isinstance(item, Example):
            values: dict[str, Any] = {**item.fields, columns.image: item.image, columns.text: item.text}
            yield Row(number, {**values, columns.label: item.label, columns.id: item.id}, example=item)
        elif isinstance(item, Mapping):
            yield Row(number, item)
        else:
            yield Row(number, problem=f"a {type(item).__name__}, expected a dict or an Example")


def is_frame(source: object) -> bool:
    """Tell whether something is a table in memory that is read by its columns.

    Raises:
        DataError: It is one of another library.
    """
    if _library_of(source):
        return True
    kind = type(source)
    if kind.__name__ in _FRAMES:
        raise DataError(
            f"got a {kind.__name__} of {kind.__module__.partition('.')[0]}; expected a DataFrame of pandas or polars, "
            "or a table of pyarrow; convert it to one of these"
        )
    return False


def frame_rows(frame: Any, needed: Collection[str], start: int = 0, stop: int | None = None) -> Iterator[Row]:
    """Read the rows of a table in memory, by its columns.

    Args:
        frame: One for which `is_frame` is true.
        needed: Columns without which a row cannot be used.
        start: Position of the first row, from 0.
        stop: Position after the last; `None` for all.

    Raises:
        DataError: Two columns that are needed have one name.
    """
    kind = _library_of(frame)
    names = [str(name) for name in (frame.schema.names if kind == "arrow" else frame.columns)]
    check_names(names, needed, f"the {type(frame).__name__}")
    stop = len(frame) if stop is None else min(stop, len(frame))
    for first in range(start, stop, _ROWS):
        count = min(_ROWS, stop - first)
        yield from numbered_rows(_frame_values(frame, kind, names, first, count, needed), first + 1)


def is_dataset(source: object) -> bool:
    """Tell whether something is a Hugging Face data set."""
    datasets = sys.modules.get("datasets")  # whoever holds a data set has imported it
    return datasets is not None and isinstance(source, datasets.Dataset)


def dataset_rows(dataset: Any, label_column: str, *, needed: Collection[str] = ()) -> Iterator[Row]:
    """Read a Hugging Face data set; the labels of a `ClassLabel` get their names.

    Args:
        dataset: All of it, or what its `select` returned.
        label_column: Column of the label.
        needed: Columns without which a row cannot be used; of any other, values that Python cannot hold become text.
    """
    return named_rows(numbered_rows(_dataset_values(dataset, needed)), label_column, class_names(dataset, label_column))


def class_names(dataset: Any, label_column: str) -> Sequence[str]:
    """Return the names of the classes of a data set; none if its label column is not a `ClassLabel`."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return ()
    return getattr(features.get(name_in(features, label_column)), "names", None) or ()


def named_rows(rows: Iterable[Row], label_column: str, names: Sequence[str]) -> Iterator[Row]:
    """Give labels that are numbers their names; without names, rows stay as they are."""
    labels = [NamedLabel(label, name) for label, name in enumerate(names)]
    if not labels:
        yield from rows
    for row in rows:
        column = name_in(row.values, label_column) if labels else label_column
        label: Any = row.values.get(column)
        try:
            number = operator.index(label)
        except TypeError:  # missing, or a word already
            yield row
            continue
        if number == -1:  # as Hugging Face writes a label that is held back
            row = replace(row, values={**row.values, column: None})
        elif 0 <= number < len(labels):
            row = replace(row, values={**row.values, column: labels[number]})
        yield row


def undecoded(source: Any) -> Any:
    """Return a streamed data set without decoding of its pictures, and anything else unchanged."""
    has_features = getattr(source, "features", None) is not None
    return source.decode(False) if has_features and callable(getattr(source, "decode", None)) else source


def _frame_values(
    frame: Any, kind: str | None, names: list[str], first: int, count: int, needed: Collection[str]
) -> Iterator[dict[str, Any] | None]:
    if kind == "pandas":
        part = frame.iloc[first : first + count]
        columns = [part.iloc[:, index].tolist() for index in range(len(names))]
        for cells in zip(*columns, strict=True):
            yield dict(zip(names, cells, strict=True))
    elif kind == "polars":
        yield from frame.slice(first, count).iter_rows(named=True)
    else:
        part = frame.slice(first, count)
        for batch in part.to_batches() if hasattr(part, "to_batches") else [part]:
            yield from python_rows(batch, needed)


def _library_of(source: object) -> str | None:
    for base in type(source).__mro__:
        found = _READ.get((base.__module__.partition(".")[0], base.__name__))
        if found:
            return found
    return None


def _dataset_values(dataset: Any, needed: Collection[str]) -> Iterator[dict[str, Any] | None]:
    """Yield rows, read in portions that hold little however large the pictures are."""
    tables = dataset.with_format("arrow")  # in which pictures are bytes of files or paths: none is decoded
    start, count = 0, 1
    while start < len(dataset):
        table = tables[start : start + count]
        for batch in table.to_batches():
            yield from python_rows(batch, needed)
        start += len(table)
        fitting = _BYTES * len(table) // max(table.nbytes, 1)
        count = min(max(fitting, 1), 4 * count, _ROWS)
