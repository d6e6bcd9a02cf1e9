"""Rows given in Python: lists of mappings or examples, and Hugging Face data sets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import astuple, replace
from typing import Any

from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.frames import frame_rows, is_frame
from qwen_vl_classifier.data.readers import dataset_rows, is_dataset, iterable_rows, read_table
from qwen_vl_classifier.data.table import Columns, Row, image_columns
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.identity import picture_identity


class GivenRows:
    """Rows that this process holds.

    Args:
        source: A Hugging Face data set, a table in memory, one row, or an iterable of rows, which is read to its end.
        columns: Names of the columns.

    Attributes:
        name: The source, for messages.

    Raises:
        DataError: It is something else.
    """

    def __init__(self, source: Any, columns: Columns) -> None:
        self.name = read_table(source, columns).name
        if isinstance(source, (Example, Mapping)):
            source = [source]
        in_place = isinstance(source, (list, tuple)) or is_dataset(source) or is_frame(source)
        self._items: Any = source if in_place else list(source)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._items)

    def rows(self, start: int, count: int) -> Iterator[Row]:
        """Yield consecutive rows, numbered from 1 in all of the source."""
        stop = min(start + count, len(self))
        needed = (*astuple(self._columns), *image_columns(self._columns.image))
        if is_frame(self._items):
            yield from frame_rows(self._items, needed, start, stop)
            return
        if not is_dataset(self._items):
            yield from iterable_rows(self._items[start:stop], self._columns, start + 1)
            return
        chosen = self._items.select(range(start, stop))
        for row in dataset_rows(chosen, self._columns.label, needed=needed):
            yield replace(row, number=start + row.number)

    def digest(self, count: int) -> str:
        """Return the SHA-256 of the pictures, texts and ids of the first so many rows."""
        digest = hashlib.sha256()
        image = self._columns.image
        names = (image, *image_columns(image), self._columns.text, self._columns.id)
        for row in self.rows(0, count):
            cells = [_stable(row.values.get(name)) for name in names]
            digest.update(repr([row.problem, *cells]).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()


def _stable(cell: Any) -> object:
    """Return something whose `repr` is the same for the same content, in every process."""
    if isinstance(cell, Image.Image):
        try:
            return ("picture", picture_identity(cell).hex())
        except ImageError as error:
            return str(error)
    if isinstance(cell, bytes):
        return ("bytes", hashlib.sha256(cell).hexdigest())
    if isinstance(cell, Mapping):
        return {name: _stable(value) for name, value in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [_stable(one) for one in cell]
    return os.fspath(cell) if isinstance(cell, os.PathLike) else cell
