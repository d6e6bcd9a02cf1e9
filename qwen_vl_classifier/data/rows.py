"""Turn one row of a data set into an example, or into a list of what is wrong with it."""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from PIL import Image

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import Labels
from qwen_vl_classifier.data.locating import INVALID_ROW, CellError, Locate, file_locator
from qwen_vl_classifier.data.table import LoadOptions, Row, Table, settled, suggested_column
from qwen_vl_classifier.errors import ConfigError, DataError, first_of, shown
from qwen_vl_classifier.images.source import ImageSource

_MOST_NAMED = 20  # columns in a message
_PLAIN = (str, int, bool, type(None), bytes, dict, list)


class _Part(NamedTuple):
    """How one part of an example is read from its column.

    A missing column is replaced by the first of `instead` that is there; if none is, an optional one counts as null.
    """

    name: str
    column: str
    read: Callable[[Any], Any]
    optional: bool = False
    instead: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """The example of a row, or what is wrong with it.

    Attributes:
        example: The example, or `None` if there are problems.
        id: The row's id, if it has one that can be read.
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
        table: Their table; relative image paths begin in its folder.
        options: How rows become examples.
        locate: Find a picture by its name in a row; by default it is a file in the table's folder.

    Attributes:
        labels: The labels that were read so far.

    Raises:
        ConfigError: `options.text` is blank, or options about labels contradict each other.
    """

    def __init__(self, table: Table, options: LoadOptions, locate: Locate | None = None) -> None:
        text, columns = options.text, options.columns
        if text is not None and not text.strip():
            raise ConfigError(
                f"{spelled('text', text)}, which is blank; expected the text of every row; leave it out to use the "
                "text column"
            )
        if options.max_text_chars < 1:
            raise ConfigError(f"{spelled('max_text_chars', options.max_text_chars)}; expected at least 1; raise it")
        locate = locate or file_locator(table.folder, confined=not options.allow_outside)
        required, soft = options.require_labels, options.soft_labels
        self._table, self._columns, self._needed = table, columns, columns.needed
        self.labels = Labels(positive=options.positive, class_names=options.class_names, required=required, soft=soft)
        self._classes = Labels(required=required, soft=soft)  # labels of examples: no words any more
        self._parts = [
            _Part("image", columns.image, functools.partial(_pictures, locate=locate), instead=columns.file_names),
            _Part("text", columns.text, functools.partial(checked_text, most=options.max_text_chars))
            if text is None
            else _Part("text", columns.text, lambda _: text, optional=True),
        ]
        if options.read_ids:
            self._parts.append(_Part("id", columns.id, _id, optional=True))
        if options.read_labels and not options.one_of:
            self._parts.insert(2, _Part("label", columns.label, self.labels.read, optional=not required))

    def check_columns(self, rows: Sequence[Row]) -> None:
        """Make sure that a column is not missing in all rows: then its name is what is wrong.

        Args:
            rows: The table's rows, or the first of them.

        Raises:
            DataError: There are no rows, or all of them lack a column.
        """
        if not rows:
            raise DataError(
                f"{self._table.name} holds no rows; expected at least one; check that it is the right source"
            )
        readable = [settled(row.values, self._needed) for row in rows if not row.problem]
        seen = dict.fromkeys(itertools.chain.from_iterable(readable))
        for part in self._parts:
            if readable and seen.keys().isdisjoint((part.column, *part.instead)) and not part.optional:
                if self._table.unit == "picture":  # a folder has no columns that could be named
                    raise DataError(
                        f"{self._table.name} is a folder of pictures, which has no texts; expected the text that goes "
                        f"with all of them; give it, such as {spelled('text', 'The photo shows a dog.')}"
                    )
                others = [str(name) for name in seen if name not in self._needed]
                near = suggested_column(part.name, part.column, others)
                named = spelled(f"{part.name}_column", near or None)
                instead = f", or give one text for all rows with {spelled('text')}" if part.name == "text" else ""
                raise DataError(
                    f"{self._table.name} has no column {part.column!r}; its columns are "
                    f"{first_of([shown(str(name)) for name in seen], most=_MOST_NAMED)}; "
                    f"{'use' if near else 'name the column of the ' + part.name + ' with'} {named}{instead}"
                )

    def parse(self, row: Row) -> ParsedRow:
        """Make an example from a row, or list all that is wrong with it."""
        if row.problem:
            return ParsedRow(None, None, (row.problem,), INVALID_ROW)
        made: dict[str, Any] = {}
        problems = []
        codes = []
        rest = dict(settled(row.values, self._needed))
        for part in self._parts:
            column = part.column
            if column not in rest and part.instead:
                column = self._columns.image_in(rest)
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
            origin = (row.example and row.example.origin) or f"{self._table.unit} {row.number}"
            example = Example(**made, fields=dict(rest), origin=origin)  # a copy: smaller than `rest`
        return ParsedRow(example, made.get("id"), tuple(problems), codes[0] if codes else "")


def plain_value(value: Any) -> Any:
    """Turn a number of NumPy, pandas or torch into Python's, and their values for null into `None`."""
    if value.__class__ in _PLAIN:
        return value
    shape = getattr(value, "shape", None)
    if shape is not None and math.prod(shape) == 1:
        value = value.item()
    if value.__class__.__name__ in ("NAType", "NaTType"):  # of pandas, which need not be installed
        return None
    return None if isinstance(value, float) and math.isnan(value) else value


def checked_text(value: object, *, most: int = sys.maxsize) -> str:
    """Return the text of an example.

    Args:
        value: What a row has in its place.
        most: Most characters.

    Raises:
        CellError: It is something else, or blank, or too long.
    """
    if value is None:
        raise CellError("is null, expected text")
    if not isinstance(value, str):
        raise CellError(f"is of type {type(value).__name__}, expected text")
    if len(value) > most:
        flag = spelled("max_text_chars")
        raise CellError(f"has {len(value):,} characters, expected at most {most:,}; shorten it, or raise {flag}")
    if not value.strip():
        raise CellError("is blank, expected words")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; tokenizers cannot read it
            raise CellError("holds an unpaired surrogate, expected valid Unicode") from None
    return value


def _id(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        return str(int(value))  # pandas writes whole numbers so beside missing ones, and databases always
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise CellError(f"is of type {type(value).__name__}, expected text or a whole number")
    if not str(value).strip():
        raise CellError("is blank, expected a name or null")
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
    raise CellError(f"is {kind}, expected a path, the bytes of an image file or a PIL image")
