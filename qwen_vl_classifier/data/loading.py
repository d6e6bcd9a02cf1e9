"""Rows to examples: `load_examples` checks a whole data set and tells of all that is wrong in one error."""

from __future__ import annotations

import functools
import itertools
import math
import os
import reprlib
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from qwen_vl_classifier.data.example import Example, ImageSource
from qwen_vl_classifier.data.images import is_url
from qwen_vl_classifier.data.readers import Columns, Row, Table, read_table
from qwen_vl_classifier.errors import ConfigError, DataError

_SHOWN_ROWS = 10

_brief = reprlib.Repr()
_brief.maxstring = 80


class _CellError(Exception):
    """A cell cannot be used; the message follows the column's name: what it is, and what was wanted."""


class _Part(NamedTuple):
    """How one part of an example is made from its column; an optional column may be missing, as if null."""

    name: str
    column: str
    read: Callable[[Any], Any]
    optional: bool = False


def load_examples(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any] | Example],
    *,
    image_column: str = "image",
    text_column: str = "text",
    label_column: str = "label",
    id_column: str = "id",
    positive: str | None = None,
    text: str | None = None,
    allow_outside: bool = False,
    require_labels: bool = False,
    limit: int | None = None,
) -> list[Example]:
    """Load a data set, with every row checked but no picture decoded.

    A row's picture is a path, the bytes of an image file, Hugging Face's `{"bytes": ..., "path": ...}`, a PIL
    image, a list of these, or null for text alone. Its label and id may be missing. Columns other than the
    four named go to `Example.fields`.

    Args:
        source: A `.jsonl`, `.ndjson`, `.csv` or `.parquet` file; a folder whose subfolders `0` and `1` hold
            the pictures of each class; a Hugging Face data set; or an iterable of dicts or of examples.
        image_column: Column of the picture(s). Paths are relative to the data file, or to the working
            directory for rows given in Python.
        text_column: Column of the text.
        label_column: Column of the label: 0 or 1, as number, text or truth value.
        id_column: Column of the id, unique in the data set; may be missing.
        positive: The label that counts as 1 where labels are words; every other counts as 0.
        text: One text for all rows, in place of the text column. A folder needs it.
        allow_outside: Allow a data file to name pictures outside of its own folder.
        require_labels: Refuse rows without a label.
        limit: Take the first so many rows.

    Returns:
        One example for each row, in order; at least one.

    Raises:
        DataError: If the source cannot be read, holds no rows, or holds rows that cannot be used; the first
            ten of these are listed, by line or row number from 1, with their total.
        ConfigError: If `limit` is below 1.

    Example:
        >>> load_examples([{"image": None, "text": "A claim.", "verdict": "true"}],
        ...               label_column="verdict", positive="true")
        [Example(image=None, text='A claim.', label=1, id=None)]
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; wanted at least 1; leave it out to take all rows")
    if text is not None and not text.strip():
        raise ConfigError("text is blank; wanted the text of every row; leave it out to use the text column")
    columns = Columns(image_column, text_column, label_column, id_column)
    table = read_table(source, columns, label_names=positive is not None)
    rows = list(itertools.islice(table.rows, limit))

    locate = _locator(table.folder, confined=not allow_outside)
    read_label = functools.partial(_label, positive=positive, required=require_labels)
    parts = [
        _Part("image", image_column, functools.partial(_pictures, locate=locate)),
        _Part("text", text_column, _text),
        _Part("label", label_column, read_label, optional=not require_labels),
        _Part("id", id_column, _id, optional=True),
    ]
    if text is not None:
        parts[1] = _Part("text", text_column, lambda _: text, optional=True)
    _check_columns(rows, parts, table)

    examples = []
    problems = []
    first_with: dict[str, int] = {}
    for row in rows:
        made, found = _read(row, parts)
        name = made.get("id")
        if name is not None and (first := first_with.setdefault(name, row.number)) != row.number:
            found.append(f"{id_column} is {_shown(name)}, as on {table.unit} {first}")
        if found:
            problems.append(f"{table.unit} {row.number}: {'; '.join(found)}")
        else:
            examples.append(Example(**made))
    if problems:
        raise DataError(_report(problems, len(rows), table))
    return examples


def _check_columns(rows: Sequence[Row], parts: Sequence[_Part], table: Table) -> None:
    """Raise where there are no rows, or where all of them lack a column: then its name is what is wrong."""
    if not rows:
        raise DataError(f"{table.name} holds no rows; wanted at least one; check that it is the right source")
    readable = [row.values for row in rows if not row.problem]
    seen = set(itertools.chain.from_iterable(readable))
    for part in parts:
        if readable and part.column not in seen and not part.optional:
            instead = ", or give one text for all rows with text=" if part.name == "text" else ""
            raise DataError(
                f"{table.name} has no column {part.column!r}, only {sorted(seen, key=str)}; wanted the "
                f"{part.name} of each row; name its column with {part.name}_column={instead}"
            )


def _read(row: Row, parts: Sequence[_Part]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of a row's `Example`, and what is wrong with the row."""
    if row.problem:
        return {}, [row.problem]
    made: dict[str, Any] = {}
    problems = []
    rest = dict(row.values)
    for part in parts:
        if part.column not in rest and not part.optional:
            problems.append(f"no column {part.column!r}")
            continue
        try:
            made[part.name] = part.read(_plain(rest.pop(part.column, None)))
        except _CellError as problem:
            problems.append(f"{part.column} {problem}")
    return {**made, "fields": rest}, problems


def _report(problems: Sequence[str], total: int, table: Table) -> str:
    lines = [f"{len(problems)} of {total} rows of {table.name} cannot be used:"]
    lines += [f"  {problem}" for problem in problems[:_SHOWN_ROWS]]
    if len(problems) > _SHOWN_ROWS:
        lines.append(f"  and {len(problems) - _SHOWN_ROWS} more")
    lines.append("Correct these rows or take them out, then load again.")
    lines.append(f"Relative image paths start from {table.folder or 'the working directory'}.")
    return "\n".join(lines)


def _shown(value: object) -> str:
    """Describe a cell in an error: briefly, and never by an object's own `repr`."""
    return _brief.repr(value) if isinstance(value, (str, float, int)) else f"of type {type(value).__name__}"


def _plain(value: Any) -> Any:
    """Turn a scalar of NumPy or torch into Python's, and NaN, which pandas writes for null, into `None`."""
    if getattr(value, "shape", None) == ():
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(value: object) -> str:
    if value is None:
        raise _CellError("is null, wanted text")
    if not isinstance(value, str):
        raise _CellError(f"is of type {type(value).__name__}, wanted text")
    if not value.strip():
        raise _CellError("is blank, wanted words")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; tokenizers cannot read it
            raise _CellError("holds an unpaired surrogate, wanted whole characters") from None
    return value


def _label(value: object, *, positive: str | None, required: bool) -> int | None:
    if value is None:
        if required:
            raise _CellError("is null, wanted 0 or 1")
        return None
    if positive is not None:
        if not isinstance(value, str):
            raise _CellError(f"is {_shown(value)}, wanted a word, since positive={positive!r}")
        return int(value == positive)
    if isinstance(value, (str, float, int)) and value in ("0", "1", "0.0", "1.0", 0, 1):
        return int(float(value))
    advice = ", or positive= to say which word counts as 1" if isinstance(value, str) else ""
    raise _CellError(f"is {_shown(value)}, wanted 0 or 1{advice}")


def _id(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _CellError(f"is of type {type(value).__name__}, wanted text or a whole number")
    if not str(value).strip():
        raise _CellError("is blank, wanted a name or null")
    return str(value)


def _pictures(value: Any, *, locate: Callable[[str], str]) -> ImageSource | tuple[ImageSource, ...] | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return tuple(_picture(one, locate) for one in value) or None
    return _picture(value, locate)


def _picture(value: Any, locate: Callable[[str], str]) -> ImageSource:
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (str, os.PathLike)):
        return locate(os.fspath(value))
    if isinstance(value, Image.Image) or (isinstance(value, bytes) and value):
        return value
    kind = "empty" if isinstance(value, bytes) else f"of type {type(value).__name__}"
    raise _CellError(f"is {kind}, wanted a path, the bytes of an image file or a PIL image")


def _locator(folder: Path | None, *, confined: bool) -> Callable[[str], str]:
    """Return a function from an image path in a row to that of a file that is there.

    Args:
        folder: Where relative paths begin; `None` for the working directory.
        confined: Refuse what lies outside of `folder`, by an absolute path, by `..` or by a symbolic link.
    """
    root = folder.resolve() if folder is not None and confined else None

    @functools.cache  # data sets have few folders: following links for each costs little
    def inside(parent: Path) -> bool:
        return root is None or parent.resolve().is_relative_to(root)

    @functools.cache  # and often several rows about one picture
    def locate(name: str) -> str:
        if not name:
            raise _CellError("is blank, wanted a path or null")
        if is_url(name):
            raise _CellError(f"{_shown(name)} is a URL, wanted a file since URLs are off")
        path = Path(name) if folder is None else folder / name
        try:
            allowed = inside(path.parent)
            if allowed and path.is_symlink():
                allowed = inside(path.resolve())
            there = allowed and stat.S_ISREG(path.stat().st_mode)
        except (OSError, ValueError, RuntimeError):  # too long; a NUL in it; links in a circle
            allowed, there = True, False
        if not allowed:
            raise _CellError(f"{_shown(name)} leaves the data file's folder, wanted allow_outside=True for that")
        if not there:
            raise _CellError(f"{_shown(name)} is not there, wanted a file")
        return str(path)

    return locate
