"""Tables in memory -> rows: DataFrames of pandas and polars, and tables of pyarrow, none of which need be installed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from qwen_vl_classifier.data.arrow_values import python_rows
from qwen_vl_classifier.data.parquet import UNREADABLE
from qwen_vl_classifier.data.table import Row
from qwen_vl_classifier.errors import DataError

_READ = {
    ("pandas", "DataFrame"): "pandas",
    ("polars", "DataFrame"): "polars",
    ("pyarrow", "Table"): "arrow",
    ("pyarrow", "RecordBatch"): "arrow",
}
_FRAMES = frozenset(("DataFrame", "LazyFrame", "Table"))  # what libraries call a table in memory
_ROWS = 1024  # read at a time


def is_frame(source: object) -> bool:
    """Tell whether something is a table in memory of which the columns are read.

    Raises:
        DataError: It is one of another library.
    """
    if _kind(source):
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
        frame: For which `is_frame` says yes.
        needed: Columns without which a row cannot be used.
        start: Position of the first row, from 0.
        stop: Position after the last; `None` for all.

    Raises:
        DataError: Two columns that are needed have one name.
    """
    kind = _kind(frame)
    names = [str(name) for name in (frame.schema.names if kind == "arrow" else frame.columns)]
    if twice := [one for one in needed if names.count(one) > 1]:
        raise DataError(f"the {type(frame).__name__} names column {twice[0]!r} twice; expected each once; rename one")
    stop = len(frame) if stop is None else min(stop, len(frame))
    for first in range(start, stop, _ROWS):
        count = min(_ROWS, stop - first)
        for number, values in enumerate(_values(frame, kind, names, first, count, needed), start=first + 1):
            yield Row(number, problem=UNREADABLE) if values is None else Row(number, values)


def _values(
    frame: Any, kind: str | None, names: list[str], first: int, count: int, needed: Collection[str]
) -> Iterator[dict[str, Any] | None]:
    if kind == "pandas":
        part = frame.iloc[first : first + count]
        columns = [part.iloc[:, place].tolist() for place in range(len(names))]
        for cells in zip(*columns, strict=True):
            yield dict(zip(names, cells, strict=True))
    elif kind == "polars":
        yield from frame.slice(first, count).iter_rows(named=True)
    else:
        part = frame.slice(first, count)
        for batch in part.to_batches() if hasattr(part, "to_batches") else [part]:
            yield from python_rows(batch, needed)


def _kind(source: object) -> str | None:
    for base in type(source).__mro__:
        found = _READ.get((base.__module__.partition(".")[0], base.__name__))
        if found:
            return found
    return None
