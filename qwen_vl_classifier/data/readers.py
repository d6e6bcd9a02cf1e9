"""Choose how a source is read: a data file, a labelled folder, a data set, a table in memory, or an iterable of rows.

Readers know little of what a column means. They number rows as a person who looks for one would count them: by line in
a text file, else by position, both from 1. A row that cannot be read gets a problem, so that all bad rows are reported
together; only what makes the rest unreadable raises.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from qwen_vl_classifier.config.spelling import flags_in_use
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.folders import IMAGE_SUFFIXES, METADATA, folder_rows, metadata_name
from qwen_vl_classifier.data.in_memory import (
    class_names,
    dataset_rows,
    frame_rows,
    is_dataset,
    is_frame,
    iterable_rows,
    named_rows,
    undecoded,
)
from qwen_vl_classifier.data.parquet import ParquetRows
from qwen_vl_classifier.data.table import Columns, LoadOptions, Row, Table, numbered_rows
from qwen_vl_classifier.data.text_files import FORMATS, UNITS, advice_for, format_of, unpacked
from qwen_vl_classifier.data.text_rows import text_rows
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.files.bounded import open_regular_file
from qwen_vl_classifier.files.near_names import beside
from qwen_vl_classifier.files.paths import is_url

_SOURCES = f"expected one of {', '.join(FORMATS)} (text also .gz), or a folder with a subfolder for each class"


def read_table(source: object, options: LoadOptions) -> Table:
    """Choose the reader that fits `source`.

    Args:
        source: Path of a data file or labelled folder, Hugging Face data set, table in memory, iterable of rows, or one
            row alone.
        options: How rows become examples.

    Raises:
        DataError: If `source` is missing or of no known kind.
    """
    columns, kind = options.columns, type(source).__name__
    if isinstance(source, (str, os.PathLike)):
        return _path_table(os.fspath(source), options)
    if is_dataset(source):
        return Table("the data set", "row", dataset_rows(source, columns.label, needed=columns.needed))
    if is_frame(source):
        return Table(f"the {kind}", "row", frame_rows(source, columns.needed))
    if isinstance(source, Example):
        return Table("the example", "row", iterable_rows([source], columns))
    if isinstance(source, Mapping):
        if not any(name in source for name in (columns.text, columns.image, *columns.file_names)):
            seen = ", ".join(map(repr, itertools.islice(source, 10)))
            raise DataError(
                f"got a {kind} of {seen}; expected one row with a column {columns.text!r}, a list of rows or one data "
                "set; of several splits pick one"
            )
        return Table("the row", "row", iterable_rows([source], columns))
    _check_rows(source)
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise DataError(f"got a {kind}; expected a path, a data set, a DataFrame, a list of rows or one row")
    rows = iterable_rows(undecoded(source), columns)
    if names := class_names(source, columns.label):  # a streamed data set has them too
        rows = named_rows(rows, columns.label, names)
    return Table(f"the {kind}", "row", rows)


def _check_rows(source: object) -> None:
    """Refuse at once what has no rows that can be read, such as a list of paths or a column of a table.

    Raises:
        DataError: It has none.
    """
    library = type(source).__module__.partition(".")[0]
    if type(source).__name__ == "Series" and library in ("pandas", "polars"):
        raise DataError(
            f"got a Series of {library}, which is one column or one row; expected a DataFrame; give frame[:1] for one "
            'row, frame[["image", "text"]] for columns'
        )
    if isinstance(source, (list, tuple)) and source and not any(isinstance(row, (Example, Mapping)) for row in source):
        raise DataError(
            f"got a {type(source).__name__} of {type(source[0]).__name__}; expected dicts or Examples; write each row "
            'as {"image": "photo.jpg", "text": "what goes with it"}'
        )


def _path_table(name: str, options: LoadOptions) -> Table:
    if is_url(name):
        raise DataError(f"{name[:300]!r} is a URL; expected a local file or folder; download it first")
    if not name:  # Python takes it for the working directory
        raise DataError("the path of the data is empty; expected a data file or a folder; name one")
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or "the path is not valid"
        near = beside(name) if isinstance(error, FileNotFoundError) else ""
        raise DataError(f"{name[:300]!r} cannot be opened ({reason}); {_SOURCES}; {near or 'check the path'}") from None
    if stat.S_ISDIR(mode):
        metadata = metadata_name((file for file in METADATA if (path / file).is_file()), name)
        if metadata is None:
            return Table(str(path), "picture", _readable(path, folder_rows(path, options)), path)
        path = path / metadata
    elif not stat.S_ISREG(mode):
        raise DataError(f"{name!r} is a pipe, socket or device; {_SOURCES}; copy it to a file")
    kind = format_of(path.name)
    if kind is None:
        raise DataError(f"{name!r} ends in {path.suffix!r}; {_SOURCES}; {_advice(path.suffix)}")
    return Table(str(path), UNITS[kind], _readable(path, _file_rows(path, kind, options.columns)), path.parent)


def _advice(suffix: str) -> str:
    if suffix.lower() in IMAGE_SUFFIXES and not flags_in_use():
        return 'for a picture alone give {"image": "photo.jpg", "text": "what goes with it"}'
    return advice_for(suffix)


def _file_rows(path: Path, kind: str, columns: Columns) -> Iterator[Row]:
    with open_regular_file(path) as file:
        if kind != "parquet":
            yield from text_rows(unpacked(file, str(path)), str(path), kind, needed=columns.needed)
            return
        table = ParquetRows(file, str(path), needed=columns.needed)
        rows = numbered_rows(table.each(0, table.count))
        yield from named_rows(rows, columns.label, table.class_names(columns.label))


def _readable(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """Turn an `OSError` of reading into a `DataError`."""
    try:
        yield from rows
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected a data file or folder; check it") from None
