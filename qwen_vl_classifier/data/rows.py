"""One row of a data set -> one example, or what is wrong with the row."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from PIL import Image

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import Labels
from qwen_vl_classifier.data.locating import INVALID_ROW, CellError, Locate, file_locator
from qwen_vl_classifier.data.table import Columns, Row, Table, image_column_in, image_columns
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.images.source import ImageSource

_PLAIN = (str, int, bool, type(None), bytes, dict, list)


class _Part(NamedTuple):
    """How one part of an example is made from its column; an optional column may be missing, as if null.

    Where the column is missing and one of `instead` is there, that is read.
    """

    name: str
    column: str
    read: Callable[[Any], Any]
    optional: bool = False
    instead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """What a row gave.

    Attributes:
        example: The example, or `None` where there are problems.
        id: The row's id, where it has one that can be read.
        problems: What is wrong with it, in the words of an error message.
        code: The first of these in one word for programs: invalid_row, image_missing or image_refused; else "".
    """

    example: Example | None
    id: str | None
    problems: tuple[str, ...]
    code: str = ""


class RowParser:
    """Make examples from the rows of one table.

    Args:
        table: Whose rows; relative image paths begin in its folder.
        columns: The names of the four columns.
        positive: The label that counts as 1; every other counts as 0.
        class_names: What class 0 and class 1 are called: labels may be these words, and 0 and 1.
        text: One text for all rows, in place of the text column.
        allow_outside: Allow image paths to leave the table's folder.
        require_labels: Refuse rows without a label.
        read_labels: Look at labels at all; where false, examples have none.
        soft_labels: Take any number from 0 to 1 as label, the probability of class 1.
        locate: Find a picture by what a row calls it; without it, files in the table's folder are meant.
        allow_missing: Let paths through where no file is; not looked at where `locate` is given.

    Attributes:
        columns: The names of the four columns.
        labels: The labels that were read so far.

    Raises:
        ConfigError: `text` is blank, or options about labels contradict each other.
    """

    def __init__(
        self,
        table: Table,
        columns: Columns,
        *,
        positive: str | None = None,
        class_names: tuple[str, str] | None = None,
        text: str | None = None,
        allow_outside: bool = False,
        require_labels: bool = False,
        read_labels: bool = True,
        soft_labels: bool = False,
        locate: Locate | None = None,
        allow_missing: bool = False,
    ) -> None:
        if text is not None and not text.strip():
            raise ConfigError("text is blank; wanted the text of every row; leave it out to use the text column")
        self._table, self.columns = table, columns
        locate = locate or file_locator(table.folder, confined=not allow_outside, allow_missing=allow_missing)
        self._parts = [
            _Part(
                "image",
                columns.image,
                functools.partial(_pictures, locate=locate),
                instead=image_columns(columns.image),
            ),
            _Part("text", columns.text, checked_text)
            if text is None
            else _Part("text", columns.text, lambda _: text, optional=True),
            _Part("id", columns.id, _id, optional=True),
        ]
        self.labels = Labels(positive=positive, class_names=class_names, required=require_labels, soft=soft_labels)
        self._classes = Labels(required=require_labels, soft=soft_labels)  # those of examples: no words any more
        if read_labels:
            self._parts.insert(2, _Part("label", columns.label, self.labels.read, optional=not require_labels))

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
            if readable and seen.isdisjoint((part.column, *part.instead)) and not part.optional:
                alike = [one for one in seen if str(one).strip().casefold() == part.column.casefold()]
                near = f"; did you mean {alike[0]!r}?" if alike else ""
                instead = f", or give one text for all rows with {spelled('text')}" if part.name == "text" else ""
                raise DataError(
                    f"{self._table.name} has no column {part.column!r}, only {sorted(seen, key=str)}; wanted the "
                    f"{part.name} of each row; name its column with {spelled(f'{part.name}_column')}{instead}{near}"
                )

    def parse(self, row: Row) -> ParsedRow:
        """Make an example from a row, or say all that is wrong with it."""
        if row.problem:
            return ParsedRow(None, None, (row.problem,), INVALID_ROW)
        made: dict[str, Any] = {}
        problems = []
        codes = []
        rest = dict(row.values)
        for part in self._parts:
            column = part.column
            if column not in rest and part.instead:
                column = image_column_in(rest, column)
            if column not in rest and not part.optional:
                problems.append(f"no column {part.column!r}")
                codes.append(INVALID_ROW)
                continue
            read = self._classes.read if part.name == "label" and row.example is not None else part.read
            try:
                made[part.name] = read(plain_value(rest.pop(column, None)))
            except CellError as problem:
                problems.append(f"{column} {problem}")
                codes.append(problem.code)
        if "label" in made:
            made["label"], made["label_text"] = made["label"]
            if row.example is not None:
                made["label_text"] = row.example.label_text
        example = None
        if not problems:
            # The copy is without the room of what was taken out.
            origin = (row.example and row.example.origin) or f"{self._table.unit} {row.number}"
            example = Example(**made, fields=dict(rest), origin=origin)
        return ParsedRow(example, made.get("id"), tuple(problems), codes[0] if codes else "")


def plain_value(value: Any) -> Any:
    """Turn one number of NumPy, pandas or torch into Python's, and what they write for null into `None`."""
    if value.__class__ in _PLAIN:
        return value
    shape = getattr(value, "shape", None)
    if shape is not None and math.prod(shape) == 1:
        value = value.item()
    if value.__class__.__name__ in ("NAType", "NaTType"):  # of pandas, which need not be installed
        return None
    return None if isinstance(value, float) and math.isnan(value) else value


def checked_text(value: object) -> str:
    """Return the text of an example.

    Raises:
        CellError: It is something else, or blank.
    """
    if value is None:
        raise CellError("is null, wanted text")
    if not isinstance(value, str):
        raise CellError(f"is of type {type(value).__name__}, wanted text")
    if not value.strip():
        raise CellError("is blank, wanted words")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; tokenizers cannot read it
            raise CellError("holds an unpaired surrogate, wanted whole characters") from None
    return value


def _id(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        return str(int(value))  # as pandas writes whole numbers beside missing ones, and databases all whole numbers
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise CellError(f"is of type {type(value).__name__}, wanted text or a whole number")
    if not str(value).strip():
        raise CellError("is blank, wanted a name or null")
    return str(value)


def _pictures(value: Any, *, locate: Locate) -> ImageSource | tuple[ImageSource, ...] | None:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return tuple(_picture(one, locate) for one in value) or None
    return _picture(value, locate)


def _picture(value: Any, locate: Locate) -> ImageSource:
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (str, os.PathLike)):
        return locate(os.fspath(value))
    if isinstance(value, Image.Image) or (isinstance(value, bytes) and value):
        return value
    kind = "empty" if isinstance(value, bytes) else f"of type {type(value).__name__}"
    raise CellError(f"is {kind}, wanted a path, the bytes of an image file or a PIL image")
