"""What readers give: rows as they were read, and how to speak of them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_classifier.data.example import Example


@dataclass(frozen=True, slots=True)
class Row:
    """One row, as read.

    Attributes:
        number: Line (JSONL, CSV) or position in the table, both from 1.
        values: Column name to value.
        problem: What is wrong with the row where it could not be read, else "".
        example: The example that the values are of, where one was given: its label is a class, whatever words stand
            for classes.
    """

    number: int
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    example: Example | None = None


@dataclass(frozen=True, slots=True)
class Columns:
    """The names under which the parts of an example are found."""

    image: str
    text: str
    label: str
    id: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows to come, and how to speak of them.

    Attributes:
        name: The source, for messages.
        unit: What a row's number counts: "line", "row" or "picture".
        rows: The rows, read as they are asked for.
        folder: Where relative image paths begin, and may not leave; `None` for rows given in Python.
    """

    name: str
    unit: str
    rows: Iterator[Row]
    folder: Path | None = None


def image_columns(image: str) -> tuple[str, ...]:
    """Return the columns in which Hugging Face's layout "imagefolder" names pictures, for rows without an image column.

    Args:
        image: Name of the image column.
    """
    return ("file_name", "file_names", f"{image}_file_name", f"{image}_file_names")


def needed_columns(columns: Columns) -> tuple[str, ...]:
    """Return all columns of which an example can be made; every other goes along as it is."""
    return (*astuple(columns), *image_columns(columns.image))


def image_column_in(names: Container[str], image: str) -> str:
    """Return the column that names the pictures of a row: the image column, or where it is missing one instead of it.

    Args:
        names: The columns that there are.
        image: Name of the image column.
    """
    if image in names:
        return image
    return next((name for name in image_columns(image) if name in names), image)
