"""Write rows with added columns to a table: a copy of the user's own file, or one of another format."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from qwen_vl_classifier.data.text_files import FORMATS, format_of
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.files.whole import new_file
from qwen_vl_classifier.scoring.tables.raw_tables import Cells, added_arrays, copy_with_columns, csv_line

_SEPARATORS = {"csv": ",", "tsv": "\t"}


def out_format(out: Path) -> str:
    """Return the format of a table that is to be written, by its name.

    Raises:
        ConfigError: Its name ends in no format of a data file.
    """
    kind = format_of(out.name)
    if kind is None:
        raise ConfigError(f"--out {out}: expected a name that ends in {', '.join(FORMATS)} (text also .gz); rename it")
    return kind


def write_table(
    out: Path,
    names: Sequence[str],
    rows: Sequence[Cells],
    *,
    own_rows: Iterable[Mapping[str, Any]],
    copied: Path | None = None,
    needed: Sequence[str] = (),
) -> None:
    """Write a table with added columns, whole or not at all.

    Args:
        out: The file; the end of its name says the format.
        names: Of the added columns.
        rows: What they hold.
        own_rows: The values of the user's own columns, for the same rows; not read where the file is copied.
        copied: The data file, to be copied as it is if the format is the same; `None` if there is none.
        needed: The columns by which the separator of the data file is found.

    Raises:
        DataError: Values that the format cannot hold; or the data file has changed.
        ConfigError: The file cannot be written.
    """
    kind = out_format(out)
    try:
        with new_file(out) as file:
            target = file
            if out.name.lower().endswith(".gz"):
                target = cast(BinaryIO, gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0))
            if copied is not None and format_of(copied.name) == kind:
                copy_with_columns(copied, kind, target, names, rows, needed)
            else:
                _write_rows(kind, target, names, rows, list(own_rows))
            if target is not file:
                target.close()
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror or type(error).__name__}); give a file that can be written"
        ) from error


def json_lines(
    names: Sequence[str], rows: Sequence[Cells], own_rows: Iterable[Mapping[str, Any]], *, pictures: bool = False
) -> Iterator[str]:
    """Yield each row with its added columns as one line of JSON.

    Args:
        names: Of the added columns.
        rows: What they hold.
        own_rows: The values of the other columns, for the same rows.
        pictures: Write null for pictures that lie in the table, instead of refusing them.

    Raises:
        DataError: A value is binary.
    """
    for own, added in zip(own_rows, rows, strict=True):
        values = {name: _plain(name, value, pictures=pictures) for name, value in own.items()}
        yield json.dumps({**values, **dict(zip(names, added, strict=True))}, ensure_ascii=False)


def _write_rows(
    kind: str, target: BinaryIO, names: Sequence[str], rows: Sequence[Cells], own_rows: Sequence[Mapping[str, Any]]
) -> None:
    own_names = list(dict.fromkeys(name for own in own_rows for name in own))
    if kind == "parquet":
        _write_parquet(target, own_names, names, rows, own_rows)
    elif kind in _SEPARATORS:
        separator = _SEPARATORS[kind]
        target.write(csv_line([*own_names, *names], separator) + b"\n")
        for own, added in zip(own_rows, rows, strict=True):
            cells = [_cell(name, own.get(name)) for name in own_names]
            line = csv_line(cells, separator, escape=False) + separator.encode() + csv_line(added, separator)
            target.write(line + b"\n")
    else:
        lines = json_lines(names, rows, own_rows)
        start, between, end = ("[\n", ",\n", "\n]\n") if kind == "json" else ("", "\n", "\n")
        target.write((start + between.join(lines) + end).encode("utf-8", "replace"))


def _write_parquet(
    target: BinaryIO,
    own_names: Sequence[str],
    names: Sequence[str],
    rows: Sequence[Cells],
    own_rows: Sequence[Mapping[str, Any]],
) -> None:
    import pyarrow
    from pyarrow import parquet

    arrays = []
    for name in own_names:
        try:
            arrays.append(pyarrow.array([own.get(name) for own in own_rows]))
        except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
            raise DataError(
                f"column {name!r} holds values of several types, or numbers that are too large; Parquet expects one "
                "type in a column; write JSONL, with --out and a name that ends in .jsonl"
            ) from None
    parquet.write_table(pyarrow.table([*arrays, *added_arrays(len(names), rows)], names=[*own_names, *names]), target)


def _cell(name: str, value: Any) -> str | None:
    """Write a value as a cell of CSV."""
    value = _plain(name, value)
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(name: str, value: Any, *, pictures: bool = False) -> Any:
    """Return a value as JSON has it; dates become text as ISO 8601 writes them."""
    if isinstance(value, bytes):
        if pictures:
            return None
        raise DataError(
            f"column {name!r} holds the bytes of pictures; a table of text cannot; write Parquet, with --out and a "
            "name that ends in .parquet"
        )
    if isinstance(value, Mapping):
        return {str(key): _plain(name, inner, pictures=pictures) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, inner, pictures=pictures) for inner in value]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
