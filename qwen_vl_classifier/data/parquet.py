"""Read any rows of a Parquet file, without those before their row group, and few at a time if they are large."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from qwen_vl_classifier.data.arrow_values import python_rows
from qwen_vl_classifier.data.table import Values, check_names, name_in, needed_names
from qwen_vl_classifier.errors import DataError

_BATCH_ROWS = 1024
_BATCH_BYTES = 16 << 20  # rows may hold pictures
_BUFFER_BYTES = 1 << 20
_TAIL_BYTES = 8  # the length of the footer, in 4, and "PAR1"

# A few bytes can unpack to 2 GiB. Packing makes pictures hardly smaller and text by 10 at most, but for pages of the
# same value again and again, which are small.
_MAX_RATIO, _SMALL_PAGE = 100, 64 << 20
_MAX_LIST_RATIO, _SMALL_LISTS = 64, 1 << 24  # values of lists in a column for each byte: nulls take nearly none
_LITTLE_PACKED = ("UNCOMPRESSED", "SNAPPY")  # unpacks to 21 times its size at most, so that no page need be looked at

# The header of a page: `PageHeader` in parquet.thrift, in Thrift's compact protocol.
_HEADER_BYTES = 1 << 10  # read at first: a header also holds the least and greatest value of its page
_MAX_HEADER_BYTES = 1 << 24
_MAX_PAGES = 100_000  # of one column in a row group
_MAX_DEPTH = 8
_TYPE, _UNPACKED, _PACKED = 1, 2, 3
_DATA, _DICTIONARY, _DATA_2 = 5, 7, 8  # fields whose own first field is the number of values


class ParquetRows:
    """The rows of one Parquet file.

    Reading rows in order takes one pass through the file. Any others also cost the rows before them in their row group.

    Args:
        file: The file, which must stay open.
        name: The file, for messages.
        columns: Read these alone, as far as they are there.
        needed: Columns without which a row cannot be used; of any other, values that Python cannot hold become text.

    Attributes:
        count: How many rows there are.
        column_names: The names of all columns.
        batch_rows: How many rows are read at a time: fewer where they are large.

    Raises:
        DataError: It is not Parquet, or names a needed column twice.
    """

    def __init__(
        self, file: BinaryIO, name: str, columns: Collection[str] | None = None, *, needed: Collection[str] = ()
    ) -> None:
        from pyarrow import parquet

        self._raw, self._name, self._needed = file, name, needed
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None  # the rest of the last one that was read
        self._position = 0  # of its first row
        self._group = -1  # in which it lies; -1 before anything was read
        self._problem = ""  # with that group
        with self._refusing_damage():
            metadata = parquet.ParquetFile(file).metadata
            # A value that many rows share is in memory once: a megabyte of them could become terabytes of copies.
            leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
            shared = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            self._file = parquet.ParquetFile(
                file, metadata=metadata, read_dictionary=shared, buffer_size=_BUFFER_BYTES, pre_buffer=False
            )
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            self.column_names: list[str] = list(self._file.schema_arrow.names)
        check_names(self.column_names, needed, name)
        wanted = None if columns is None else needed_names(self.column_names, columns)
        self._columns = None if wanted is None else [one for one in self.column_names if one in wanted]
        self._starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
        self.count = self._starts[-1]
        sizes = ((max(group.total_byte_size, _packed_bytes(group)), group.num_rows) for group in groups)
        row_bytes = max((size // max(rows, 1) for size, rows in sizes), default=0)
        self.batch_rows = min(max(_BATCH_BYTES // max(row_bytes, 1), 1), _BATCH_ROWS)

    def rows(self, start: int, count: int) -> list[Values]:
        """Return the values of consecutive rows by column; fewer where the file ends.

        A row is `None` where a needed column holds what Python cannot, such as text that is not UTF-8, and a text that
        says what is wrong where it would take too much memory to be read.

        Args:
            start: Position of the first, from 0.
            count: How many.

        Raises:
            DataError: They cannot be read.
        """
        return list(self.each(start, count))

    def each(self, start: int, count: int) -> Iterator[Values]:
        """Yield what `rows` returns, and hold no more than one batch."""
        stop = min(start + count, self.count)
        while start < stop:
            with self._refusing_damage():
                found = self._read(start, stop - start)
            if not found:
                return
            yield from found
            start += len(found)

    def _read(self, start: int, most: int) -> list[Values]:
        """Return at most `most` rows, beginning with row `start`; an empty list at the end of the file."""
        group = max(bisect.bisect_right(self._starts, start) - 1, 0)
        if not (self._group == group and self._position <= start):
            self._batch, self._position, self._group = None, self._starts[group], group
            self._problem, rows = self._looked_at(group)
            self._batches = self._file.iter_batches(rows, row_groups=[group], columns=self._columns)
        if self._problem:
            return [self._problem] * min(most, self._starts[group + 1] - start)
        while True:
            if not self._batch:
                self._batch = next(self._batches, None)
                if self._batch is None:
                    return []
            skipped = min(start - self._position, len(self._batch))
            batch = self._batch.slice(skipped, most)
            taken = skipped + len(batch)
            self._batch = self._batch.slice(taken)
            self._position += taken
            if len(batch):
                return [*python_rows(batch, self._needed)]

    def _looked_at(self, index: int) -> tuple[str, int]:
        """Return what is wrong with a row group, if anything is, and how many of its rows to read at a time."""
        group, names = self._file.metadata.row_group(index), set(self._columns or self.column_names)
        largest = 0  # bytes of a row, by its largest page
        for number in range(group.num_columns):
            chunk, leaf = group.column(number), self._file.schema.column(number)
            is_list = leaf.max_repetition_level > 0
            if leaf.path.partition(".")[0] not in names or (chunk.compression in _LITTLE_PACKED and not is_list):
                continue
            start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
            values = 0
            for page in pages_of(self._raw, start, start + chunk.total_compressed_size):
                if page.unpacked > max(_SMALL_PAGE, _MAX_RATIO * page.packed):
                    seen = f"{page.packed:,} bytes of its row group unpack to {page.unpacked:,}"
                    return f"{seen}, expected at most {_MAX_RATIO} times as many", 1
                if not page.is_dictionary:
                    values += page.values
                    largest = max(largest, page.unpacked // (1 if is_list else max(page.values, 1)))
            if is_list and values > max(_SMALL_LISTS, _MAX_LIST_RATIO * chunk.total_compressed_size):
                return f"its row group has {values:,} values of lists in few bytes, expected fewer", 1
        return "", min(max(_BATCH_BYTES // max(largest, 1), 1), self.batch_rows)

    def class_names(self, column: str) -> list[str]:
        """Return the names of the classes of a column, from the note that Hugging Face's library writes."""
        try:
            note = json.loads((self._file.schema_arrow.metadata or {})[b"huggingface"])
            names = note["info"]["features"][name_in(self.column_names, column)]["names"]
        except (KeyError, TypeError, ValueError):
            return []
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []

    def digest(self) -> str:
        """Return the SHA-256 of the file's size and footer, which holds the sizes and statistics of all columns.

        Raises:
            DataError: They cannot be read.
        """
        with self._refusing_damage():
            size = self._raw.seek(-_TAIL_BYTES, os.SEEK_END) + _TAIL_BYTES
            footer = int.from_bytes(self._raw.read(4), "little")
            self._raw.seek(size - _TAIL_BYTES - footer)
            return hashlib.sha256(size.to_bytes(8, "little") + self._raw.read(footer)).hexdigest()

    @contextmanager
    def _refusing_damage(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            self._group = -1  # it is not known where reading stopped
            raise DataError(
                f"{self._name} cannot be read as Parquet ({type(error).__name__}); expected a whole file; write it "
                "again"
            ) from None


def _packed_bytes(group: Any) -> int:
    """Return how many bytes of the file a row group takes."""
    return sum(int(group.column(index).total_compressed_size) for index in range(group.num_columns))


class Page(NamedTuple):
    """The header of a page.

    Attributes:
        unpacked: Bytes of its content when it is unpacked.
        packed: Bytes of its content in the file.
        values: How many values it holds.
        is_dictionary: Whether these are the distinct values to which other pages refer.
    """

    unpacked: int
    packed: int
    values: int
    is_dictionary: bool


def pages_of(file: BinaryIO, start: int, end: int) -> Iterator[Page]:
    """Yield the headers of the pages between two offsets of a file: those of one column in one row group.

    The footer says how large columns are, and may be wrong; a decoder makes room for what the header of each page says.

    Raises:
        ValueError: They cannot be read, or are too many.
    """
    for _ in range(_MAX_PAGES):
        if start >= end:
            return
        fields, length = _header(file, start, end)
        details = next((fields[one] for one in (_DATA, _DICTIONARY, _DATA_2) if one in fields), {1: 0})
        try:
            page = Page(fields[_UNPACKED], fields[_PACKED], details[1], _DICTIONARY in fields)
        except (KeyError, TypeError):
            raise ValueError("a page without a size") from None
        if not all(isinstance(one, int) and one >= 0 for one in page):
            raise ValueError("a page of a negative size")
        yield page
        start += length + page.packed
    raise ValueError("too many pages")


def _header(file: BinaryIO, start: int, end: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the header at an offset, and its length."""
    size = _HEADER_BYTES
    while True:
        file.seek(start)
        data = file.read(min(size, end - start))
        try:
            return _struct(data, 0, 0)
        except IndexError:
            if len(data) < size or size >= _MAX_HEADER_BYTES:
                raise ValueError("a truncated page header") from None
        size *= 16


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Read a struct: whole numbers and structs by the number of their field, the rest passed over."""
    if depth > _MAX_DEPTH:
        raise ValueError("a page header that is nested too deeply")
    fields: dict[int, Any] = {}
    field = 0
    while byte := data[at]:
        at += 1
        step, kind = byte >> 4, byte & 15
        if not step:
            step, at = _number(data, at)
            field = 0
        field += step
        fields[field], at = _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true or false, in place of a value
        return None, at
    if kind == 3:
        return None, at + 1
    if kind in (4, 5, 6):
        return _number(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind in (9, 10):
        byte, at = data[at], at + 1
        count = byte >> 4
        if count == 15:
            count, at = _varint(data, at)
        for _ in range(count):
            _, at = _value(data, at + ((byte & 15) in (1, 2)), byte & 15, depth + 1)
        return None, at
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise ValueError("a page header of unknown fields")


def _number(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a page header with a number that is too long")
