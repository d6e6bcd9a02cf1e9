"""Parquet: any rows of a file, without reading those before their row group, and few at a time if they are large."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from qwen_vl_classifier.data.arrow_values import python_rows
from qwen_vl_classifier.data.table import check_names
from qwen_vl_classifier.errors import DataError

_BATCH_ROWS = 256
_BATCH_BYTES = 16 << 20  # rows may hold pictures
_BUFFER_BYTES = 1 << 20
_TAIL_BYTES = 8  # the length of the footer, in 4, and "PAR1"


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
        self._position = -1  # of its first row; -1 before anything was read
        with self._refusing_damage():
            self._file = parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            metadata = self._file.metadata
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            self.column_names: list[str] = list(self._file.schema_arrow.names)
        check_names(self.column_names, needed, name)
        self._columns = None if columns is None else [one for one in self.column_names if one in columns]
        self._starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
        self.count = self._starts[-1]
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        self.batch_rows = min(max(_BATCH_BYTES // max(row_bytes, 1), 1), _BATCH_ROWS)

    def rows(self, start: int, count: int) -> list[dict[str, Any] | None]:
        """Return the values of consecutive rows by column; fewer where the file ends.

        A row is `None` where a needed column holds what Python cannot, such as text that is not UTF-8.

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
                self._batches = self._file.iter_batches(self.batch_rows, row_groups=groups, columns=self._columns)
                self._batch, self._position = None, self._starts[group]
            while len(found) < count:
                if not self._batch:
                    self._batch = next(self._batches, None)
                    if self._batch is None:
                        break
                skipped = min(max(start - self._position, 0), len(self._batch))
                batch = self._batch.slice(skipped, count - len(found))
                found += python_rows(batch, self._needed)
                taken = skipped + len(batch)
                self._batch = self._batch.slice(taken)
                self._position += taken
        return found

    def class_names(self, column: str) -> list[str]:
        """Return the names of the classes of a column, from the note that Hugging Face's library writes."""
        try:
            note = json.loads((self._file.schema_arrow.metadata or {})[b"huggingface"])
            names = note["info"]["features"][column]["names"]
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
            self._position = -1  # it is not known where reading stopped
            raise DataError(
                f"{self._name} cannot be read as Parquet ({type(error).__name__}); expected a whole file; write it "
                "again"
            ) from None
