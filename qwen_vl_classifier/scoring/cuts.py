"""Where shards begin: rows are counted one by one or by arithmetic, and those of one picture may be kept together."""

from __future__ import annotations

import filecmp
import hashlib
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from PIL import Image

from qwen_vl_classifier.data.locating import CellError, Locate
from qwen_vl_classifier.data.table import Columns, Row
from qwen_vl_classifier.data.text_files import LongLine, bounded_lines, size_of
from qwen_vl_classifier.data.text_rows import (
    csv_header,
    csv_records,
    csv_row,
    is_blank,
    json_values,
    jsonl_row,
    object_row,
)
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.identity import picture_identity, stamp_of

_HASHED = 1 << 20  # bytes of lines that are hashed together


class Cuts:
    """Where the spans of each shard begin. In memory, a span takes 32 bytes.

    Args:
        shard_size: Rows of a shard.
        limit: Most rows in all, or `None`.
    """

    def __init__(self, shard_size: int, limit: int | None) -> None:
        self._shard_size = shard_size
        self._limit = limit
        self._files, self._starts, self._sizes, self._numbers = (array("q") for _ in range(4))  # of each span
        self._first_spans, self._first_rows = array("q"), array("q")  # of each shard
        self._held = shard_size  # rows in the last shard: full, so that the first row begins a new one
        self.rows = 0

    def __len__(self) -> int:
        return len(self._first_spans)

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.rows == self._limit

    def digest(self, data: str) -> str:
        """Return the SHA-256 over that of the data and where its shards begin."""
        return hashlib.sha256(data.encode() + self._first_rows.tobytes()).hexdigest()

    def shard(self, index: int) -> tuple[int, list[tuple[int, int, int, int]]]:
        """Return a shard's first row, and for each of its spans the file, the start, the rows and the first number."""
        first = self._first_spans[index]
        last = self._first_spans[index + 1] if index + 1 < len(self) else len(self._files)
        columns = (column[first:last] for column in (self._files, self._starts, self._sizes, self._numbers))
        return self._first_rows[index], list(zip(*columns, strict=True))

    def add_each(
        self,
        file: int,
        rows: Iterable[tuple[int, int, Any]],
        same: Callable[[tuple[int, Any], tuple[int, Any]], bool] | None,
    ) -> None:
        """Add the rows of a file that are found one after the other; stops at the limit.

        Args:
            file: Index of the file.
            rows: The start, the number and the content of each; no more are taken than are added.
            same: Tells whether two rows, by number and content, have the same picture and stay in one shard; `None`
                keeps no rows together.
        """
        previous: tuple[int, Any] | None = None
        for start, number, content in rows:
            row = (number, content)
            if self._held >= self._shard_size and not (same and previous and same(previous, row)):
                self._begin_shard()
            if previous is None or not self._held:
                self._begin_span(file, start, number)
            self._grow(1)
            if self.full:
                return
            previous = row

    def add_range(self, file: int, rows: int, same_as_before: Callable[[int], bool] | None) -> None:
        """Add the rows of a file in which every row is found by its position; stops at the limit.

        Args:
            file: Index of the file.
            rows: How many it holds.
            same_as_before: Tells whether the row at a position has the picture of the one before and stays with it;
                `None` keeps no rows together.
        """
        if self._limit is not None:
            rows = min(rows, self._limit - self.rows)
        position = 0
        while position < rows:
            taken = self._shard_size - self._held
            if taken <= 0:
                if position and same_as_before and same_as_before(position):
                    taken = 1
                else:
                    self._begin_shard()
                    taken = self._shard_size
            if not position or not self._held:
                self._begin_span(file, position, position + 1)
            taken = min(taken, rows - position)
            self._grow(taken)
            position += taken

    def _begin_shard(self) -> None:
        self._first_spans.append(len(self._files))
        self._first_rows.append(self.rows)
        self._held = 0

    def _begin_span(self, file: int, start: int, number: int) -> None:
        for of_span, value in ((self._files, file), (self._starts, start), (self._sizes, 0), (self._numbers, number)):
            of_span.append(value)

    def _grow(self, rows: int) -> None:
        self._sizes[-1] += rows
        self._held += rows
        self.rows += rows


class TextScan:
    """One pass over a text file, which finds its rows and hashes what it passed.

    Args:
        file: At its beginning.
        kind: "jsonl", "csv", "tsv" or "json".
        name: The file, for messages.
        needed: Columns that a table may not have twice.
    """

    def __init__(self, file: BinaryIO, kind: str, name: str, needed: Collection[str] = ()) -> None:
        self._file = file
        self._kind = kind
        self._name = name
        self._needed = needed
        self._digest = hashlib.sha256()
        self._unhashed = bytearray()  # lines that were taken
        self._position = 0  # byte at which the next line begins
        self._line = 0  # lines taken
        self._header: list[str] = []

    def rows(self) -> Iterator[tuple[int, int, Any]]:
        """Yield for each row where it begins, its number and what it holds.

        Rows of lines begin at a byte and have the number of their line; items of a JSON array are counted.

        Raises:
            DataError: It cannot be read.
        """
        if self._kind == "json":
            values = json_values(self._file, self._name)
            self._digest.update(repr(values).encode("utf-8", "backslashreplace"))
            yield from ((index, index + 1, value) for index, value in enumerate(values))
            return
        lines = self._lines()
        if self._kind == "jsonl":
            for line in lines:
                if not is_blank(self._line, line):
                    yield self._position - size_of(line), self._line, line
            return
        records = csv_records(lines, self._name, kind=self._kind, needed=self._needed)
        self._header = csv_header(records, self._name, needed=self._needed)
        start, number = self._position, self._line + 1
        for _, cells in records:
            yield start, number, cells  # blank lines before a record are its own: reading passes over them
            start, number = self._position, self._line + 1

    def row(self, number: int, content: Any) -> Row:
        """Make a row of a number and what the row holds."""
        if self._kind == "json":
            return object_row(number, content)
        return jsonl_row(number, content) if self._kind == "jsonl" else csv_row(number, content, self._header)

    def digest(self) -> str:
        """Return the SHA-256 of the lines that were taken so far."""
        self._digest.update(self._unhashed)
        self._unhashed.clear()
        return self._digest.hexdigest()

    def _lines(self) -> Iterator[bytes]:
        for line in bounded_lines(self._file, self._name):
            self._unhashed += b"%d bytes" % line.size if isinstance(line, LongLine) else line
            self._line += 1
            self._position += size_of(line)
            if len(self._unhashed) >= _HASHED:
                self.digest()
            yield line


def picture_keys(row: Row, image_column: str) -> list[bytes | str]:
    """Return what stands for a row's pictures until they are compared: a path, or else a key of the content."""
    cell = row.values.get(Columns(image_column).image_in(row.values))
    cells = cell if isinstance(cell, (list, tuple)) else [] if cell is None else [cell]
    return [_picture_key(one) for one in cells]


def _picture_key(cell: Any) -> bytes | str:
    if isinstance(cell, Mapping):  # as Hugging Face writes pictures
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, (str, os.PathLike)):
        return os.fspath(cell)
    if isinstance(cell, bytes):
        return stamp_of(cell)
    try:
        return picture_identity(cell) if isinstance(cell, Image.Image) else b"%d" % id(cell)
    except ImageError:
        return b"%d" % id(cell)  # equal to no other


def same_pictures(keys: Sequence[bytes | str], others: Sequence[bytes | str], locate: Locate) -> bool:
    """Tell whether two rows have the same pictures, at least one; files are compared by their bytes."""
    if not keys or len(keys) != len(others):
        return False
    return all(one == other or _same_file(one, other, locate) for one, other in zip(keys, others, strict=True))


def _same_file(one: bytes | str, other: bytes | str, locate: Locate) -> bool:
    if isinstance(one, bytes) or isinstance(other, bytes):
        return False
    try:
        first, second = locate(one), locate(other)
        return first == second or filecmp.cmp(first, second, shallow=False)
    except (CellError, OSError):  # reading the row will say what is wrong with it; URLs are not read
        return False
