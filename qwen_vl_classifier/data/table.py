"""Rows as they were read, the names of their columns, and the options by which they become examples."""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from qwen_vl_classifier.config.fields import MAX_TEXT_CHARS
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import PLAIN_NAMES, folded
from qwen_vl_classifier.errors import DataError

_UNREADABLE = "holds text that is not UTF-8, or a date beyond Python's"

_OTHER_WORDS = {
    "image": ("img", "photo", "picture", "pic", "file", "filename", "path", "foto", "bild"),
    "text": ("caption", "claim", "question", "sentence", "statement", "prompt", "description", "title", "comment"),
    "label": ("class", "target", "category", "answer", "truth", "verdict", "y"),
}
"""What people call the columns, for suggestions."""

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


_IDS = "id"
"""Taken only under exactly this name: ids must differ, and a column ID may well be the number of a customer."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of the columns that make an example."""

    image: str = "image"
    text: str = "text"
    label: str = "label"
    id: str = _IDS

    @property
    def file_names(self) -> tuple[str, ...]:
        """The columns that name pictures in Hugging Face's layout "imagefolder", for rows without an image column."""
        return ("file_name", "file_names", f"{self.image}_file_name", f"{self.image}_file_names")

    @property
    def needed(self) -> tuple[str, ...]:
        """All columns from which an example may be made; any other is kept as it is."""
        return (*astuple(self), *self.file_names)

    def image_in(self, names: Collection[str]) -> str:
        """Return the column that names the pictures: the image column, or one of `file_names` if it is missing.

        Args:
            names: The columns that there are, in any case and with any blanks around them.
        """
        found = (name_in(names, column) for column in (self.image, *self.file_names))
        return next((name for name in found if name in names), self.image)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How rows become examples; the attributes are those arguments of `load_examples`.

    Attributes:
        read_ids: Read ids, which must differ from row to row.
    """

    columns: Columns = Columns()
    positive: str | None = None
    class_names: tuple[str, str] | None = None
    text: str | None = None
    allow_outside: bool = False
    require_labels: bool = False
    read_labels: bool = True
    one_of: bool = False
    read_ids: bool = True
    soft_labels: bool = False
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


def name_in(names: Collection[str], column: str) -> str:
    """Return how a column is spelled in a table: in another case or with blanks around it, if nothing has its name.

    Args:
        names: The columns that there are.
        column: What it is called in the options; returned unchanged if it is missing, or if several are alike.
    """
    alike = [] if column in names else [name for name in names if folded(str(name)) == folded(column)]
    return alike[0] if len(alike) == 1 else column


def needed_names(names: Iterable[str], needed: Iterable[str]) -> set[str]:
    """Return the names of the columns that are needed, with those that are spelled in another case or with blanks."""
    needed = tuple(needed)
    return {*needed, *_respelled(tuple(names), needed)}


def settled(values: Mapping[str, Any], needed: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the values of a row with the needed columns under the names that the options have for them.

    Args:
        values: Column name to value; the names may be in another case or have blanks around them.
        needed: The names in the options, as `Columns.needed` has them.
    """
    other = _respelled(tuple(values), needed)
    return {other.get(name, name): value for name, value in values.items()} if other else values


@functools.lru_cache(maxsize=4)  # nearly all rows of a table have the same names
def _respelled(names: tuple[str, ...], needed: tuple[str, ...]) -> Mapping[str, str]:
    """Return the needed column that a name stands for, for each name that is not exactly its own."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(folded(str(name)), []).append(name)
    times = Counter(map(folded, needed))
    missing = [(column, alike.get(folded(column), [])) for column in needed if column not in (*names, _IDS)]
    return {found[0]: column for column, found in missing if len(found) == 1 and times[folded(column)] == 1}


def suggested_column(what: str, column: str, names: Sequence[str]) -> str:
    """Return the column that probably holds a part of an example, or "" where none is likely.

    Args:
        what: The part: "image", "text" or "label".
        column: What its column is called in the options.
        names: The columns that there are.

    Example:
        >>> suggested_column("image", "image", ["Photo", "claim"]), suggested_column("text", "txet", ["text", "b"])
        ('Photo', 'text')
    """
    by_form = {folded(name): name for name in reversed(names)}
    if near := difflib.get_close_matches(folded(column), by_form, n=1, cutoff=0.7):
        return by_form[near[0]]
    words = {what, *_OTHER_WORDS.get(what, ())}
    return next((name for name in names if words & {*re.split(r"[\W_]+", folded(name))}), "")


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
    columns = needed_names(names, needed)
    if twice := [name for name, times in Counter(names).items() if times > 1 and name in columns]:
        raise DataError(f"{source} names column {twice[0]!r} twice; expected each name once; rename one")
