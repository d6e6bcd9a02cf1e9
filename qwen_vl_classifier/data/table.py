"""Rows as they were read, the names of their columns, and the options by which they become examples."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from qwen_vl_classifier.config.fields import MAX_TEXT_CHARS
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import PLAIN_NAMES
from qwen_vl_classifier.errors import DataError

_UNREADABLE = "holds text that is not UTF-8, or a date beyond Python's"

MAX_COLUMNS = 20_000
"""Most columns of a table."""

Values: TypeAlias = "Mapping[str, Any] | str | None"
"""Column name to value of a row; what is wrong with it; or `None` where Python cannot hold a value that is needed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, as read.

    Attributes:
        number: Line (JSONL, CSV) or position in the table, both from 1.
        values: Column name to value.
        problem: Why the row could not be read, else "".
        example: The example from which `values` were made, if the row was given as one: its label is a class already.
    """

    number: int
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    example: Example | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns that make an example."""

    image: str = "image"
    text: str = "text"
    label: str = "label"
    id: str = "id"

    @property
    def file_names(self) -> tuple[str, ...]:
        """The columns that name pictures in Hugging Face's layout "imagefolder", for rows without an image column."""
        return ("file_name", "file_names", f"{self.image}_file_name", f"{self.image}_file_names")

    @property
    def needed(self) -> tuple[str, ...]:
        """All columns from which an example may be made; any other is kept as it is."""
        return (*astuple(self), *self.file_names)

    def image_in(self, names: Container[str]) -> str:
        """Return the column that names the pictures: the image column, or one of `file_names` if it is missing.

        Args:
            names: The columns that there are.
        """
        if self.image in names:
            return self.image
        return next((name for name in self.file_names if name in names), self.image)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How rows become examples; the attributes are those arguments of `load_examples`."""

    columns: Columns = Columns()
    positive: str | None = None
    class_names: tuple[str, str] | None = None
    text: str | None = None
    allow_outside: bool = False
    require_labels: bool = False
    read_labels: bool = True
    soft_labels: bool = False
    allow_missing: bool = False
    max_text_chars: int = MAX_TEXT_CHARS

    @property
    def has_words(self) -> bool:
        """Whether it is known which word stands for which class."""
        return self.positive is not None or tuple(self.class_names or PLAIN_NAMES) != PLAIN_NAMES


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one source.

    Attributes:
        name: The source, for messages.
        unit: What the number of a row counts: "line", "row" or "picture".
        rows: The rows, read one after the other.
        folder: Where relative image paths begin, and may not leave; `None` for rows given in Python.
    """

    name: str
    unit: str
    rows: Iterator[Row]
    folder: Path | None = None


def numbered_rows(values: Iterable[Values], first: int = 1) -> Iterator[Row]:
    """Make rows of values; those that could not be read get a problem.

    Args:
        values: Of each row.
        first: Number of the first row.
    """
    for number, one in enumerate(values, start=first):
        if one is None or isinstance(one, str):
            yield Row(number, problem=one or _UNREADABLE)
        else:
            yield Row(number, one)


def check_names(names: Sequence[str], needed: Iterable[str], source: str) -> None:
    """Make sure that no column that is needed is there twice, and that there are not too many.

    Raises:
        DataError: One is, or there are; the message calls the table `source`.
    """
    if len(names) > MAX_COLUMNS:
        raise DataError(
            f"{source} has {len(names):,} columns; expected at most {MAX_COLUMNS:,}; leave out those that are not used"
        )
    if twice := [one for one in needed if names.count(one) > 1]:
        raise DataError(f"{source} names column {twice[0]!r} twice; expected each name once; rename one")
