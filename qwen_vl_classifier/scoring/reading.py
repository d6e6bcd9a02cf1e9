"""The rows of a shard, read where they lie and prepared for the model: nothing of the file before them is read."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import sys
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.backbone.windows import by_picture, prepare_outcomes
from qwen_vl_classifier.config.spelling import did_you_mean, spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.folders import picture_problem
from qwen_vl_classifier.data.locating import shown_url
from qwen_vl_classifier.data.parquet import ParquetRows
from qwen_vl_classifier.data.rows import RowParser, plain_value
from qwen_vl_classifier.data.table import LoadOptions, Row, Table, name_in, numbered_rows
from qwen_vl_classifier.data.text_files import unpacked
from qwen_vl_classifier.data.text_rows import text_rows
from qwen_vl_classifier.errors import ConfigError, DataError, ExampleError, ImageError, first_of, shown
from qwen_vl_classifier.files.locations import storage_of
from qwen_vl_classifier.files.paths import is_url
from qwen_vl_classifier.files.storage import Storage
from qwen_vl_classifier.images.source import ImageSource
from qwen_vl_classifier.images.time_limit import decoding_limit
from qwen_vl_classifier.scoring.jobs import Pulse, RowError, Shard, Span, Task
from qwen_vl_classifier.scoring.sources import GivenRows, SourceSpec, picture_locator

if TYPE_CHECKING:
    from qwen_vl_classifier.images.fetching import Fetcher

_CONNECTIONS = 16  # pictures fetched at a time
_FETCHED = 64  # rows whose pictures are fetched together
_PART_BYTES = 128 << 20  # of texts and pictures that a table contains, read at a time


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row, ready to be scored, or what is wrong with it.

    Attributes:
        row: Position in the whole data, from 0.
        id: Its id, or its position where it has none that can be read.
        example: The example, without label; `None` where there is an error.
        code: What is wrong, in one word for programs: invalid_row, or a code of `ImageError`; else "".
        error: What is wrong, in one line that names the row; else "".
        where: The row, for messages about it: "line 7", or "b.jsonl, line 7" where there are several files.
        kept: The values of the columns that go along with it, as text.
    """

    row: int
    id: str
    example: Example | None = None
    code: str = ""
    error: str = ""
    where: str = ""
    kept: tuple[str | None, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardWindow:
    """Rows of a shard that are encoded together, and rows that cannot be.

    Attributes:
        shard: Theirs.
        rows: The position of each in the whole data.
        ids: Their ids.
        prepared: What the model reads of each.
        failed: Position, id and error of each row that cannot be encoded.
        is_last: Whether these are the last of the shard.
        kept: The values of the columns that go along with each row, by its position; other rows may be among them.
    """

    shard: Shard
    rows: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    prepared: list[EncodedExample] = field(default_factory=list)
    failed: list[tuple[int, str, RowError]] = field(default_factory=list)
    is_last: bool = False
    kept: Mapping[int, tuple[str | None, ...]] = field(default_factory=dict)


class ShardReader:
    """Read shards of one data set, any of them, in any order; in order is cheapest.

    Args:
        spec: How to read it.
        given: The rows themselves where they are given in Python (`Plan.given`), else `None`.
        fetcher: Fetches pictures by http; without it, one is made for the hosts of `spec`.
        pulse: Told which row is being prepared.
        decode_timeout: Seconds of processor time that one picture may take to decode.
        threads: How many open pictures; `None` for `decoding_threads`.
    """

    def __init__(
        self,
        spec: SourceSpec,
        given: GivenRows | None = None,
        *,
        fetcher: Fetcher | None = None,
        pulse: Pulse | None = None,
        decode_timeout: float = math.inf,
        threads: int | None = None,
    ) -> None:
        self.spec = spec
        self._pulse = pulse or Pulse()
        self._decode_timeout = decode_timeout
        self._threads = threads
        self._given = given
        self._fetcher = fetcher
        self._storages: dict[str, Storage] = {}
        self._parquet: tuple[str, ParquetRows] | None = None  # the last one, open where it was left

    def read(self, shard: Shard) -> list[SourceRow]:
        """Return the rows of a shard, in order; a row that cannot be used has an error in place of an example.

        Pictures that lie in an object store or behind a URL are named, not fetched: see `fetch`.

        Raises:
            DataError: The data has changed since it was planned, or cannot be read any further.
        """
        return [row for part in self.parts(shard) for row in part]

    def parts(self, shard: Shard) -> Iterator[list[SourceRow]]:
        """Yield what `read` returns in parts, each with a bounded number of bytes of texts and pictures.

        Nearly all shards are one part: only where a table contains its pictures are there more.
        """
        found: list[SourceRow] = []
        done = held = 0
        for span in shard.spans:
            parser = self._parser(span)  # a new one for each span: it remembers every path that it has seen
            file = f"{span.source.removeprefix(self.spec.root).lstrip('/')}, " if self.spec.root else ""
            for row in self._rows(span):
                position = shard.first_row + done
                done += 1
                parsed = parser.parse(row)
                self._pulse.step()
                where = f"{file}{self.spec.unit} {row.number}"
                error = f"{where}: {'; '.join(parsed.problems)}" if parsed.problems else ""
                example = None if parsed.example is None else replace(parsed.example, fields={})
                kept = self._kept(row) if self.spec.kept else ()
                found.append(SourceRow(position, parsed.id or str(position), example, parsed.code, error, where, kept))
                held += (0 if example is None else _bytes_in(example)) + sum(len(cell or "") for cell in kept)
                if held >= _PART_BYTES:
                    yield found
                    found, held = [], 0
        if found:
            yield found

    def check(self, shard: Shard) -> None:
        """Make sure, before any row is scored, that the options make sense and no column is missing in all of a shard.

        Raises:
            DataError: One is, or the rows cannot be read.
            ConfigError: The text for all rows is blank, or one of the hosts is none.
            MissingExtraError: Pictures may be fetched, and what fetches them is not installed.
        """
        if self.spec.url_hosts:
            self._ready_fetcher()
        if self.spec.format == "parquet":  # which says so without its rows, that may hold pictures
            rows = [Row(0, dict.fromkeys(self._opened(span.source).column_names)) for span in shard.spans]
        else:
            rows = [replace(row, values=dict.fromkeys(row.values)) for span in shard.spans for row in self._rows(span)]
        self._parser(shard.spans[0]).check_columns(rows)
        seen = dict.fromkeys(name for row in rows for name in row.values)
        for name in self.spec.kept:
            if self._column_of(name, seen) not in seen and (name != self.spec.columns.text or self.spec.text is None):
                raise DataError(
                    f"{self.spec.name} has no column {name!r}, which {spelled('columns')} names; its columns are "
                    f"{first_of([*map(shown, seen)], most=20)}{did_you_mean(name, map(str, seen))}"
                )

    def fetch(self, rows: Sequence[SourceRow]) -> list[SourceRow]:
        """Return rows with the bytes of those pictures that do not lie on this machine, or with an error.

        Rows whose pictures are local are returned as they are, at no cost. A few dozen rows at a time keep memory
        bounded. A picture of several rows is fetched once.
        """
        urls: dict[str, int] = {}  # with the first row that has it
        for row in rows:
            for url in _urls_of(row.example) if row.example is not None else ():
                urls.setdefault(url, row.row)
        if not urls:
            return list(rows)
        if any(map(_is_http, urls)):
            self._ready_fetcher()
        with ThreadPoolExecutor(max_workers=min(_CONNECTIONS, len(urls)), thread_name_prefix="fetch") as executor:
            pictures = {}
            fetched = executor.map(self._picture, urls)
            for url, row_number in urls.items():
                self._pulse.prepare(row_number)
                pictures[url] = next(fetched)
            self._pulse.prepare(None)
        return [_with_pictures(row, pictures) for row in rows]

    def windows(self, processor: Processor, tasks: Iterable[Task]) -> Iterator[ShardWindow]:
        """Read shards one after the other, and prepare their rows in windows of bounded size.

        Rows of the same picture are brought together within their shard, so that they share its pass.

        Args:
            processor: Of the backbone.
            tasks: Shards with the rows that are left out; of a probe, its rows alone are taken.

        Raises:
            DataError: As in `read`.
        """
        read = partial(processor.read_pictures, identify=False)  # nobody compares pictures
        for task in tasks:
            failed: list[tuple[int, str, RowError]] = []
            kept: dict[int, tuple[str | None, ...]] = {}
            is_last = False
            for rows in self.parts(task.shard):
                kept |= {row.row: row.kept for row in rows if row.kept}
                usable: list[tuple[SourceRow, Example]] = []
                for row in rows:
                    position = row.row - task.shard.first_row
                    if task.probe is not None and position not in task.probe:
                        continue
                    if error := task.excluded.get(position):
                        failed.append((row.row, row.id, error))
                    elif row.example is None:
                        failed.append((row.row, row.id, RowError(row.code, row.error)))
                    else:
                        usable.append((row, row.example))
                order = [usable[place][0] for place in by_picture([example for _, example in usable])]
                ends = rows[-1].row == task.shard.first_row + task.shard.rows - 1
                taken: deque[tuple[int, str]] = deque()  # position and id of those that were read and not yet prepared
                done = 0  # prepared, and no longer in `taken`

                def begin(number: int) -> None:
                    self._pulse.prepare(taken[number - done][0])  # noqa: B023  # called while this part is read

                with decoding_limit(self._decode_timeout):
                    examples = self._examples(order, taken, failed)
                    threads = 1 if task.careful else self._threads
                    for outcomes in prepare_outcomes(
                        processor, examples, begin=begin, at_hand=True, read=read, threads=threads
                    ):
                        self._pulse.prepare(None)
                        window = ShardWindow(task.shard, kept=kept)
                        for outcome in outcomes:
                            position, name = taken.popleft()
                            done += 1
                            if isinstance(outcome, ExampleError):
                                failed.append((position, name, RowError(outcome.code, str(outcome))))
                            else:
                                window.rows.append(position)
                                window.ids.append(name)
                                window.prepared.append(outcome)
                            is_last = ends and position == order[-1].row
                        yield replace(window, failed=failed[:], is_last=is_last)
                        failed.clear()
                del rows, usable, order, row, examples  # before the next part is read
            if not is_last:  # no row could be prepared, or the last ones could not be fetched
                yield ShardWindow(task.shard, failed=failed, is_last=True, kept=kept)

    def _examples(
        self, rows: Sequence[SourceRow], taken: deque[tuple[int, str]], failed: list[tuple[int, str, RowError]]
    ) -> Iterator[Example]:
        """Yield the examples of rows with their pictures fetched; note those that are taken, and those that fail."""
        for start in range(0, len(rows), _FETCHED):
            for row in self.fetch(rows[start : start + _FETCHED]):
                if row.example is None:
                    failed.append((row.row, row.id, RowError(row.code, row.error)))
                else:
                    taken.append((row.row, row.id))
                    yield row.example

    def _rows(self, span: Span) -> Iterator[Row]:
        """Yield the rows of a span one after the other: a table may hold far more than fits into memory."""
        count = 0
        try:
            for row in self._rows_there(span):
                count += 1
                yield row
        except OSError as error:
            raise DataError(
                f"{span.source} cannot be read ({error.strerror}); expected the file that was planned; check it"
            ) from None
        if count != span.rows:
            raise DataError(
                f"{span.source} has changed since its shards were planned; expected the same file until the end; "
                "score the new one into another folder"
            )

    def _rows_there(self, span: Span) -> Iterator[Row]:
        kind = self.spec.format
        if kind == "given":
            assert self._given is not None
            yield from self._given.rows(span.start, span.rows)
        elif kind == "pictures":
            for number, name in enumerate(span.names, span.first_number):
                yield self._picture_row(span.source, number, name)
        elif kind == "parquet":
            yield from numbered_rows(self._opened(span.source).each(span.start, span.rows), span.first_number)
        else:
            yield from self._text_rows(span)

    def _text_rows(self, span: Span) -> Iterator[Row]:
        """Yield rows of a file of text from where they begin; none where no row can begin there."""
        name, kind, needed = span.source, self.spec.format, self.spec.columns.needed
        with self._storage(name).open(name) as packed:
            file = unpacked(packed, name)
            rows = text_rows(file, name, kind, needed=needed, start=span.start, first=span.first_number)
            yield from itertools.islice(rows, span.rows)

    def _column_of(self, name: str, names: Collection[str]) -> str:
        """Return how a column that goes along is spelled in a table."""
        columns = self.spec.columns
        return columns.image_in(names) if name == columns.image else name_in(names, name)

    def _kept(self, row: Row) -> tuple[str | None, ...]:
        """Return the values of the columns that go along with a row, as text."""
        spec = self.spec
        values = {name: row.values.get(self._column_of(name, row.values)) for name in spec.kept}
        if spec.text is not None and spec.columns.text in values:
            values[spec.columns.text] = spec.text
        return tuple(map(_as_text, values.values()))

    def _picture_row(self, folder: str, number: int, name: str) -> Row:
        # In a store, what a file is shows when it is fetched.
        problem = picture_problem(Path(folder), name) if self._storage(folder).is_local else ""
        if problem:
            return Row(number, problem=problem)
        return Row(number, {self.spec.columns.id: name, self.spec.columns.image: name})

    def _opened(self, path: str) -> ParquetRows:
        if self._parquet is None or self._parquet[0] != path:
            self._parquet = None
            names = self.spec.columns
            columns = {names.image, *names.file_names, names.id} | ({names.text} if self.spec.text is None else set())
            columns |= {*self.spec.kept}
            file = self._storage(path).open(path)
            try:
                table = ParquetRows(file, path, columns, needed=columns)
            except BaseException:
                file.close()
                raise
            weakref.finalize(table, file.close)
            self._parquet = (path, table)
        return self._parquet[1]

    def _parser(self, span: Span) -> RowParser:
        spec = self.spec
        locate = picture_locator(spec, span.source, None if spec.format == "given" else self._storage(span.source))
        table = Table(spec.name, spec.unit, iter(()))
        options = LoadOptions(spec.columns, text=spec.text, read_labels=False, max_text_chars=spec.max_text_chars)
        return RowParser(table, options, locate)

    def _storage(self, path: str) -> Storage:
        host = "/".join(path.split("/", 3)[:3]) if is_url(path) else ""
        if host not in self._storages:
            self._storages[host] = storage_of(path, self.spec.storage_options)
        return self._storages[host]

    def _picture(self, url: str) -> bytes | ImageError:
        most = self.spec.limits.max_bytes
        try:
            if _is_http(url):
                return self._ready_fetcher().fetch(url)
            content = self._storage(url).read(url, most + 1)
        except ImageError as error:
            return error
        except FileNotFoundError:
            return ImageError(f"{shown_url(url)} does not exist; expected a picture", code="image_missing")
        except (OSError, ConfigError) as error:  # ConfigError: a row may name a store by a URL that cannot be
            reason = getattr(error, "strerror", None) or "the URL is not valid"
            return ImageError(f"{shown_url(url)} cannot be read ({reason}); expected a picture", code="image_refused")
        if len(content) > most:
            message = f"{shown_url(url)} has more than {most:,} bytes; expected at most that; compress it"
            return ImageError(message, code="image_too_large")
        return content

    def _ready_fetcher(self) -> Fetcher:
        if self._fetcher is None:
            from qwen_vl_classifier.images.fetching import Fetcher  # needs an extra

            self._fetcher = Fetcher(self.spec.url_hosts, max_bytes=self.spec.limits.max_bytes)
        return self._fetcher


def _as_text(value: Any) -> str | None:
    """Write a value of a table as text; pictures in it are named by their path, where they have one."""
    value = plain_value(value)
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        value = value.get("path")
    if isinstance(value, (list, tuple)):
        return json.dumps([_as_text(one) for one in value], ensure_ascii=False)
    if isinstance(value, Mapping):
        return json.dumps({str(name): _as_text(one) for name, one in value.items()}, ensure_ascii=False)
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if value is None or isinstance(value, (bytes, Image.Image)):
        return None
    return value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else str(value)


def _bytes_in(example: Example) -> int:
    """Return how many bytes the text and the pictures of an example take that are in memory."""
    return sys.getsizeof(example.text) + sum(len(one) for one in example.images if isinstance(one, bytes))


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _urls_of(example: Example) -> list[str]:
    return [image for image in example.images if isinstance(image, str) and is_url(image)]


def _with_pictures(row: SourceRow, pictures: Mapping[str, bytes | ImageError]) -> SourceRow:
    if row.example is None or not _urls_of(row.example):
        return row
    images: list[ImageSource] = []
    for image in row.example.images:
        picture = pictures.get(image, image) if isinstance(image, str) else image
        if isinstance(picture, ImageError):
            return replace(row, example=None, code=picture.code, error=f"{row.where}: {picture}")
        images.append(picture)
    single = not isinstance(row.example.image, (list, tuple))
    return replace(row, example=replace(row.example, image=images[0] if single else tuple(images)))
