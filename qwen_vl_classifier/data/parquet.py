"""Parquet: any rows of a file, without those before their row group, and refused where its types run code."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from qwen_vl_classifier.errors import DataError

_BATCH_ROWS = 256  # rows may hold pictures: few at a time
_BUFFER_BYTES = 1 << 20
_TAIL_BYTES = 8  # the length of the footer, in 4, and "PAR1"


class ParquetRows:
    """The rows of one Parquet file.

    Rows asked for in order are read in one go through the file; others cost what lies before them in their row group.

    Args:
        file: The file; it stays open for as long as rows are asked for.
        name: The file, for messages.
        columns: Read these alone; they must be there.

    Attributes:
        count: How many rows there are.
        column_names: The names of all columns.

    Raises:
        DataError: It is not Parquet, or has columns of types that run code of their own.
    """

    def __init__(self, file: BinaryIO, name: str, columns: list[str] | None = None) -> None:
        import pyarrow
        from pyarrow import parquet

        self._raw, self._name, self._columns = file, name, columns
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None  # what is left of the last one that was read
        self._position = -1  # of its first row; before the file: nothing has been read
        with self._refusing_damage():
            self._file = parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            metadata = self._file.metadata
            groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
            schema = self._file.schema_arrow
        for column in schema:
            # Extension types run code of their own; plain columns hold all that an example needs.
            if isinstance(column.type, pyarrow.BaseExtensionType):
                raise DataError(
                    f"{name} has column {column.name!r} of extension type {column.type.extension_name}; "
                    "wanted plain types; cast or drop it"
                )
        self.column_names: list[str] = list(schema.names)
        self._starts = [0, *itertools.accumulate(groups)]
        self.count = self._starts[-1]

    def rows(self, start: int, count: int) -> list[dict[str, Any] | None]:
        """Return the values of consecutive rows by column; fewer where the file ends.

        A row is `None` where it holds what Python cannot: text that is not UTF-8, or a date beyond its years.

        Args:
            start: Position of the first, from 0.
            count: How many.

        Raises:
            DataError: They cannot be read.
        """
        group = max(bisect.bisect_right(self._starts, start) - 1, 0)
        found: list[dict[str, Any] | None] = []
        with self._refusing_damage():
            if not self._starts[group] <= self._position <= start:
                groups = list(range(group, len(self._starts) - 1))
                self._batches = self._file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=self._columns)
                self._batch, self._position = None, self._starts[group]
            while len(found) < count:
                if not self._batch:
                    self._batch = next(self._batches, None)
                    if self._batch is None:
                        break
                wanted = self._batch.slice(start - self._position if self._position < start else 0)
                wanted = wanted.slice(0, count - len(found))
                found += _values(wanted)
                taken = min(max(start - self._position, 0), len(self._batch)) + len(wanted)
                self._batch = self._batch.slice(taken)
                self._position += taken
        return found

    def digest(self) -> str:
        """Return the SHA-256 of the file's size and footer, which holds sizes and statistics of all that is in it.

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
            self._position = -1  # nothing is known of where reading stopped
            raise DataError(
                f"{self._name} cannot be read as Parquet ({type(error).__name__}); wanted a whole file; write it again"
            ) from None


def _values(batch: Any) -> list[dict[str, Any] | None]:
    """Turn a batch into Python's values; where that fails, row by row, so that one row does not take others along."""
    try:
        values: list[dict[str, Any] | None] = batch.to_pylist()
    except (ValueError, OverflowError):
        return [None] if len(batch) == 1 else [one for row in range(len(batch)) for one in _values(batch.slice(row, 1))]
    return values
