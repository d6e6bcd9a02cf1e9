"""One row of a data set -> one example, or what is wrong with the row."""

from __future__ import annotations

import functools
import itertools
import math
import os
import reprlib
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from qwen_vl_classifier.data.example import Example, ImageSource
from qwen_vl_classifier.data.images import is_url
from qwen_vl_classifier.data.readers import Columns, Row, Table
from qwen_vl_classifier.errors import ConfigError, DataError

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


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """What a row gave.

    Attributes:
        example: The example, or `None` where there are problems.
        id: The row's id, where it has one that can be read.
        problems: What is wrong with it, in the words of an error message.
    """

    example: Example | None
    id: str | None
    problems: tuple[str, ...]


class RowParser:
    """Make examples from the rows of one table.

    Args:
        table: Whose rows; relative image paths begin in its folder.
        columns: The names of the four columns.
        positive: The label that counts as 1 where labels are words.
        text: One text for all rows, in place of the text column.
        allow_outside: Allow image paths to leave the table's folder.
        require_labels: Refuse rows without a label.
        read_labels: Look at labels at all; where false, examples have none.
        soft_labels: Take any number from 0 to 1 as label, the probability of class 1.

    Raises:
        ConfigError: `text` is blank.
    """

    def __init__(
        self,
        table: Table,
        columns: Columns,
        *,
        positive: str | None = None,
        text: str | None = None,
        allow_outside: bool = False,
        require_labels: bool = False,
        read_labels: bool = True,
        soft_labels: bool = False,
    ) -> None:
        if soft_labels and positive is not None:
            raise ConfigError(f"soft_labels with positive={positive!r}; soft labels are numbers: leave one of them out")
        if text is not None and not text.strip():
            raise ConfigError("text is blank; wanted the text of every row; leave it out to use the text column")
        self._table = table
        locate = _locator(table.folder, confined=not allow_outside)
        self._parts = [
            _Part("image", columns.image, functools.partial(_pictures, locate=locate)),
            _Part("text", columns.text, _text)
            if text is None
            else _Part("text", columns.text, lambda _: text, optional=True),
            _Part("id", columns.id, _id, optional=True),
        ]
        if read_labels:
            label: Callable[[Any], float | None] = (
                functools.partial(_soft_label, required=require_labels)
                if soft_labels
                else functools.partial(_label, positive=positive, required=require_labels)
            )
            self._parts.insert(2, _Part("label", columns.label, label, optional=not require_labels))

    def check_columns(self, rows: Sequence[Row]) -> None:
        """Make sure that a column is not missing in all rows: then its name is what is wrong.

        Args:
            rows: The table's rows, or the first of them.

        Raises:
            DataError: There are no rows, or all of them lack a column.
        """
        if not rows:
            raise DataError(f"{self._table.name} holds no rows; wanted at least one; check that it is the right source")
        readable = [row.values for row in rows if not row.problem]
        seen = set(itertools.chain.from_iterable(readable))
        for part in self._parts:
            if readable and part.column not in seen and not part.optional:
                instead = ", or give one text for all rows with text=" if part.name == "text" else ""
                raise DataError(
                    f"{self._table.name} has no column {part.column!r}, only {sorted(seen, key=str)}; wanted the "
                    f"{part.name} of each row; name its column with {part.name}_column={instead}"
                )

    def parse(self, row: Row) -> ParsedRow:
        """Make an example from a row, or say all that is wrong with it."""
        if row.problem:
            return ParsedRow(None, None, (row.problem,))
        made: dict[str, Any] = {}
        problems = []
        rest = dict(row.values)
        for part in self._parts:
            if part.column not in rest and not part.optional:
                problems.append(f"no column {part.column!r}")
                continue
            try:
                made[part.name] = part.read(_plain(rest.pop(part.column, None)))
            except _CellError as problem:
                problems.append(f"{part.column} {problem}")
        example = None if problems else Example(**made, fields=dict(rest))  # without the room of what was taken out
        return ParsedRow(example, made.get("id"), tuple(problems))


def shown(value: object) -> str:
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
            raise _CellError(f"is {shown(value)}, wanted a word, since positive={positive!r}")
        return int(value == positive)
    if isinstance(value, (str, float, int)) and value in ("0", "1", "0.0", "1.0", 0, 1):
        return int(float(value))
    advice = ", or positive= to say which word counts as 1" if isinstance(value, str) else ""
    raise _CellError(f"is {shown(value)}, wanted 0 or 1{advice}")


def _soft_label(value: object, *, required: bool) -> float | None:
    if value is None:
        if required:
            raise _CellError("is null, wanted a number from 0 to 1")
        return None
    try:
        number = float(value) if isinstance(value, (str, float, int)) else math.nan
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise _CellError(f"is {shown(value)}, wanted a number from 0 to 1")
    return int(number) if number in (0, 1) else number


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
            raise _CellError(f"{shown(name)} is a URL, wanted a file since URLs are off")
        path = Path(name) if folder is None else folder / name
        try:
            allowed = inside(path.parent)
            if allowed and path.is_symlink():
                allowed = inside(path.resolve())
            there = allowed and stat.S_ISREG(path.stat().st_mode)
        except (OSError, ValueError, RuntimeError):  # too long; a NUL in it; links in a circle
            allowed, there = True, False
        if not allowed:
            raise _CellError(f"{shown(name)} leaves the data file's folder, wanted allow_outside=True for that")
        if not there:
            raise _CellError(f"{shown(name)} is not there, wanted a file")
        return str(path)

    return locate
