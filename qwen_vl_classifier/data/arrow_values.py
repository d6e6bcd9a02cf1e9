"""Convert rows of Arrow to rows of Python, with the same result whatever else is installed.

pyarrow's own conversion needs pandas for nanoseconds and a database for time zones, fails on dates beyond Python's
years, and calls Python classes for the values of extension types. Here values that cannot be converted become text, and
a row cannot be used only if that happens in a column that it needs.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Collection
from typing import Any

from qwen_vl_classifier.data.table import needed_names

_SHOWN_BYTES = 10_000  # of a text that is not UTF-8: each row has one of its own
_UTC = "+00:00"  # an offset needs no database of time zones


def python_rows(batch: Any, needed: Collection[str] = ()) -> list[dict[str, Any] | None]:
    """Convert a record batch or table to one dict for each row.

    Times of nanoseconds become text, times with a zone become times in UTC, a UUID becomes text; other extension types
    are read by their storage. A value that Python cannot hold, such as a date in the year 40,000, becomes text too.

    Args:
        batch: A `RecordBatch`.
        needed: Columns without which a row cannot be used.

    Returns:
        The rows; `None` where a value of a needed column cannot be converted.
    """
    columns, spoiled = {}, set()
    needed = needed_names(batch.schema.names, needed)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values, failed = _converted(column)
        columns[name] = values
        if name in needed:
            spoiled.update(failed)
    cells = zip(*columns.values(), strict=True) if columns else itertools.repeat((), len(batch))
    rows: list[dict[str, Any] | None] = [dict(zip(columns, row, strict=True)) for row in cells]
    for row in spoiled:
        rows[row] = None
    return rows


def _converted(column: Any) -> tuple[list[Any], list[int]]:
    """Return the values of a column, and the positions of those that became text because Python cannot hold them."""
    kind = getattr(column.type, "extension_name", "")
    if kind:
        column = column.storage
    try:
        values = _python_values(_plain(column))
    except Exception:  # besides Arrow's errors: a time zone that is not found, an integer that overflows, ...
        return _one_by_one(column)
    if kind == "arrow.uuid":
        values = [None if value is None else str(uuid.UUID(bytes=value)) for value in values]
    elif kind == "arrow.bool8":
        values = [None if value is None else bool(value) for value in values]
    return values, []


def _in_utc(kind: Any) -> Any:
    """Return a type without extension types, and with times in UTC in place of a time zone."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _mapped(kind.storage_type, _in_utc)
    if pyarrow.types.is_timestamp(kind) and kind.tz is not None:
        return pyarrow.timestamp(kind.unit, _UTC)
    return kind


def _without_nanoseconds(kind: Any) -> Any:
    """Return text for a type of nanoseconds, for which Python has no type."""
    import pyarrow
    from pyarrow import types

    timed = types.is_timestamp(kind) or types.is_time64(kind) or types.is_duration(kind)
    return pyarrow.string() if timed and kind.unit == "ns" else kind


def _mapped(kind: Any, leaf: Callable[[Any], Any]) -> Any:
    """Apply a function to the innermost types of a nested type."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(kind):
        value = _mapped(kind.value_type, leaf)
        return kind if value == kind.value_type else value
    if types.is_struct(kind):
        return pyarrow.struct([one.with_type(_mapped(one.type, leaf)) for one in kind])
    if types.is_map(kind):
        key, item = _mapped(kind.key_type, leaf), _mapped(kind.item_type, leaf)
        return kind if (key, item) == (kind.key_type, kind.item_type) else pyarrow.map_(key, item)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = kind.value_field.with_type(_mapped(kind.value_type, leaf))
        if types.is_fixed_size_list(kind):
            return pyarrow.list_(item, kind.list_size)
        return pyarrow.large_list(item) if types.is_large_list(kind) else pyarrow.list_(item)
    return leaf(kind)


def _plain(column: Any) -> Any:
    """Cast a column to types that Python holds in the same way everywhere; most are cast to their own."""
    for leaf in (_in_utc, _without_nanoseconds):
        kind = _mapped(column.type, leaf)
        if kind != column.type:
            column = column.cast(kind)
    return column


def _python_values(column: Any) -> list[Any]:
    """Return the values of an array; those of a dictionary are made once, however many rows have them."""
    import pyarrow
    from pyarrow import compute, types

    kind = column.type
    if not _has_dictionary(kind):
        values: list[Any] = column.to_pylist()
        return values
    if types.is_dictionary(kind):
        places = column.indices.to_pylist()
        distinct = [place for place in set(places) if place is not None]
        used = column.dictionary.take(pyarrow.array(distinct, pyarrow.int64()))
        made: dict[int | None, Any] = dict(zip(distinct, used.to_pylist(), strict=True))
        return [made.get(place) for place in places]
    if types.is_struct(kind):
        cells = zip(*map(_python_values, column.flatten()), strict=True)
        names, there = [one.name for one in kind], column.is_valid().to_pylist()
        return [dict(zip(names, row, strict=True)) if valid else None for row, valid in zip(cells, there, strict=True)]
    if types.is_map(kind):
        pairs = [*zip(_python_values(column.keys), _python_values(column.items), strict=True)]
        ends, there = column.offsets.to_pylist(), column.is_valid().to_pylist()
        return [pairs[first:end] if valid else None for first, end, valid in zip(ends, ends[1:], there, strict=False)]
    items = iter(_python_values(column.flatten()))  # of lists
    lengths = compute.list_value_length(column).to_pylist()
    return [None if length is None else list(itertools.islice(items, length)) for length in lengths]


def _has_dictionary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_dictionary(kind) or any(_has_dictionary(kind.field(index).type) for index in range(kind.num_fields))


def _one_by_one(column: Any) -> tuple[list[Any], list[int]]:
    """Convert what can be converted, and write the rest as text."""
    values: list[Any] = []
    failed = []
    for position in range(len(column)):
        one = column.slice(position, 1)
        try:
            values += _python_values(_plain(one))
        except Exception:
            failed.append(position)
            values.append(_as_text(one))
    return values, failed


def _as_text(one: Any) -> str:
    """Write the only value of an array as text, whatever it is."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(one.type):
        one = one.dictionary_decode()
    if types.is_string(one.type) or types.is_large_string(one.type) or types.is_string_view(one.type):
        return bytes(one[0].as_buffer()[:_SHOWN_BYTES]).decode("utf-8", "replace")
    try:
        return str(one.cast(pyarrow.string())[0].as_py())
    except Exception:
        return f"<{one.type} that cannot be read>"
