"""The rows of one shard, read where they lie: nothing of the file before them is read."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_classifier.config.spelling import flags_in_use, name_flags
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.folders import problem_of
from qwen_vl_classifier.data.lines import csv_header, csv_records, csv_row, delimiter_of, first_line, jsonl_rows
from qwen_vl_classifier.data.locating import Locate, file_locator, shown_url, store_locator
from qwen_vl_classifier.data.parquet import UNREADABLE, ParquetRows
from qwen_vl_classifier.data.rows import RowParser
from qwen_vl_classifier.data.table import Columns, Row, Table, image_columns, needed_columns
from qwen_vl_classifier.data.text_files import bounded_lines, json_row, json_values, unpacked
from qwen_vl_classifier.errors import ConfigError, DataError, ImageError
from qwen_vl_classifier.files.locations import storage_of
from qwen_vl_classifier.files.paths import is_url
from qwen_vl_classifier.files.storage import Storage
from qwen_vl_classifier.images.limits import ImageLimits, current_limits, set_image_limits
from qwen_vl_classifier.images.source import ImageSource
from qwen_vl_classifier.scoring.given import GivenRows
from qwen_vl_classifier.scoring.parts import Part, Shard

if TYPE_CHECKING:
    from qwen_vl_classifier.images.fetching import Fetcher

_CONNECTIONS = 16  # pictures fetched at a time


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """How the rows of a data set are read; `make_plan` makes it. JSON in both directions.

    Attributes:
        format: "jsonl", "csv", "tsv", "json", "parquet", "pictures" (a folder of these) or "given" (rows in Python).
        name: The data, for messages.
        unit: What a row's number counts: "line", "row" or "picture".
        columns: Names of the columns.
        text: One text for all rows, in place of the text column.
        allow_outside: Allow image paths to leave the folder of their data file.
        url_hosts: Hosts from which pictures may be fetched; none where URLs are off.
        root: Where there are several files, the folder that holds them: messages name them by what follows.
        limits: Which pictures are let in.
        flags: Whether messages name options as the command line does.
        storage_options: Options of fsspec for data by URL. They may hold secrets: never show or keep them.
    """

    format: str
    name: str
    unit: str
    columns: Columns
    text: str | None = None
    allow_outside: bool = False
    url_hosts: tuple[str, ...] = ()
    root: str = ""
    limits: ImageLimits = field(default_factory=current_limits)
    flags: bool = field(default_factory=flags_in_use)
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SourceSpec:
        """Make a specification from what `to_json` gave."""
        return cls(
            **{
                **record,
                "columns": Columns(**record["columns"]),
                "url_hosts": tuple(record["url_hosts"]),
                "limits": ImageLimits.from_json(record["limits"]),
            }
        )

    def adopt(self) -> None:
        """Let in the pictures that the driver lets in, and write messages as it does: for the process of a worker."""
        set_image_limits(self.limits)
        name_flags(self.flags)


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
    """

    row: int
    id: str
    example: Example | None = None
    code: str = ""
    error: str = ""
    where: str = ""


def picture_locator(spec: SourceSpec, source: str, storage: Storage | None) -> Locate:
    """Return a function from what a row calls a picture to where it is.

    Args:
        spec: How rows are read.
        source: Path or URL of the data file, or of the folder of pictures.
        storage: Where it lies; `None` for rows given in Python.
    """
    confined, urls = not spec.allow_outside, bool(spec.url_hosts)
    if storage is None:
        return file_locator(None, confined=confined, urls=urls)
    folder = source if spec.format == "pictures" else storage.parent(source)
    if not storage.is_local:
        return store_locator(folder, confined=confined, urls=urls)
    return file_locator(Path(folder), confined=confined, urls=urls)


class ShardReader:
    """Read shards of one data set, any of them, in any order; in order is cheapest.

    Args:
        spec: How to read it.
        given: The rows themselves where they are given in Python (`Plan.given`), else `None`.
        limits: The largest picture that is fetched; without them, those of `spec`.
        fetcher: Fetches pictures by http; without it, one is made for the hosts of `spec`.
    """

    def __init__(
        self,
        spec: SourceSpec,
        given: GivenRows | None = None,
        *,
        limits: ImageLimits | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        self.spec = spec
        self._given = given
        self._limits = limits or spec.limits
        self._fetcher = fetcher
        self._storages: dict[str, Storage] = {}
        self._parquet: tuple[str, ParquetRows] | None = None  # the last one, open where it was left

    def read(self, shard: Shard) -> list[SourceRow]:
        """Return the rows of a shard, in order; a row that cannot be used has an error in place of an example.

        Pictures that lie in an object store or behind a URL are named, not fetched: see `fetch`.

        Raises:
            DataError: The data has changed since it was planned, or cannot be read any further.
        """
        found: list[SourceRow] = []
        for part in shard.parts:
            parser = self._parser(part)  # a new one for each part: it remembers every path that it has seen
            file = f"{part.source.removeprefix(self.spec.root).lstrip('/')}, " if self.spec.root else ""
            for row in self._rows(part):
                position = shard.first_row + len(found)
                parsed = parser.parse(row)
                where = f"{file}{self.spec.unit} {row.number}"
                error = f"{where}: {'; '.join(parsed.problems)}" if parsed.problems else ""
                found.append(SourceRow(position, parsed.id or str(position), parsed.example, parsed.code, error, where))
        return found

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
            rows = [Row(0, dict.fromkeys(self._opened(part.source).column_names)) for part in shard.parts]
        else:
            rows = [row for part in shard.parts for row in self._rows(part)]
        self._parser(shard.parts[0]).check_columns(rows)

    def fetch(self, rows: Sequence[SourceRow]) -> list[SourceRow]:
        """Return rows with the bytes of those pictures that do not lie on this machine, or with an error.

        Rows whose pictures are local are returned as they are, at no cost. A few dozen rows at a time keep memory
        bounded. A picture of several rows is fetched once.
        """
        urls = {url for row in rows if row.example is not None for url in _urls_of(row.example)}
        if not urls:
            return list(rows)
        if any(map(_is_http, urls)):
            self._ready_fetcher()
        with ThreadPoolExecutor(max_workers=min(_CONNECTIONS, len(urls)), thread_name_prefix="fetch") as executor:
            pictures = dict(zip(urls, executor.map(self._picture, urls), strict=True))
        return [_with_pictures(row, pictures) for row in rows]

    def _rows(self, part: Part) -> list[Row]:
        kind, rows = self.spec.format, []
        try:
            if kind == "given":
                assert self._given is not None
                rows = list(self._given.rows(part.start, part.rows))
            elif kind == "pictures":
                rows = [
                    self._picture_row(part.source, number, name)
                    for number, name in enumerate(part.names, part.first_number)
                ]
            elif kind == "parquet":
                values = self._opened(part.source).rows(part.start, part.rows)
                rows = [
                    Row(number, problem=UNREADABLE) if one is None else Row(number, one)
                    for number, one in enumerate(values, start=part.first_number)
                ]
            else:
                rows = self._text_rows(part)
        except OSError as error:
            raise DataError(
                f"{part.source} cannot be read ({error.strerror}); wanted the file that was planned; check it"
            ) from None
        if len(rows) != part.rows:
            raise DataError(
                f"{part.source} has changed since its shards were planned; wanted the same file until the end; "
                "score the new one into another folder"
            )
        return rows

    def _text_rows(self, part: Part) -> list[Row]:
        """Read rows of a file of text from where they begin; none where no row can begin there."""
        name, kind = part.source, self.spec.format
        with self._storage(name).open(name) as packed:
            file = unpacked(packed, name)
            if kind == "json":
                values = json_values(file, name)[part.start : part.start + part.rows]
                return [json_row(number, value) for number, value in enumerate(values, part.first_number)]
            header, delimiter = [], ""
            if kind != "jsonl":
                delimiter = delimiter_of(first_line(bounded_lines(file, name))[1], kind)
                file.seek(0)
                records = csv_records(bounded_lines(file, name), name, delimiter=delimiter)
                header = csv_header(records, name, needed=needed_columns(self.spec.columns))
            file.seek(max(part.start - 1, 0))
            if part.start and file.read(1) != b"\n":
                return []
            lines = bounded_lines(file, name)
            if kind == "jsonl":
                return list(itertools.islice(jsonl_rows(lines, part.first_number), part.rows))
            records = csv_records(lines, name, part.first_number, delimiter=delimiter)
            return [csv_row(number, cells, header) for number, cells in itertools.islice(records, part.rows)]

    def _picture_row(self, folder: str, number: int, name: str) -> Row:
        # In a store, what a file is shows when it is fetched.
        problem = problem_of(Path(folder), name) if self._storage(folder).is_local else ""
        if problem:
            return Row(number, problem=problem)
        return Row(number, {self.spec.columns.id: name, self.spec.columns.image: name})

    def _opened(self, path: str) -> ParquetRows:
        if self._parquet is None or self._parquet[0] != path:
            self._parquet = None
            names = self.spec.columns
            columns = {names.image, *image_columns(names.image), names.id} | (
                {names.text} if self.spec.text is None else set()
            )
            file = self._storage(path).open(path)
            try:
                table = ParquetRows(file, path, columns, needed=columns)
            except BaseException:
                file.close()
                raise
            weakref.finalize(table, file.close)
            self._parquet = (path, table)
        return self._parquet[1]

    def _parser(self, part: Part) -> RowParser:
        spec = self.spec
        locate = picture_locator(spec, part.source, None if spec.format == "given" else self._storage(part.source))
        table = Table(spec.name, spec.unit, iter(()))
        return RowParser(table, spec.columns, text=spec.text, read_labels=False, locate=locate)

    def _storage(self, path: str) -> Storage:
        host = "/".join(path.split("/", 3)[:3]) if is_url(path) else ""
        if host not in self._storages:
            self._storages[host] = storage_of(path, self.spec.storage_options)
        return self._storages[host]

    def _picture(self, url: str) -> bytes | ImageError:
        most = self._limits.max_bytes
        try:
            if _is_http(url):
                return self._ready_fetcher().fetch(url)
            content = self._storage(url).read(url, most + 1)
        except ImageError as error:
            return error
        except FileNotFoundError:
            return ImageError(f"{shown_url(url)} is not there; wanted a picture", code="image_missing")
        except (OSError, ConfigError) as error:  # ConfigError: a row may name a store by a URL that cannot be
            reason = getattr(error, "strerror", None) or "the URL is not valid"
            return ImageError(f"{shown_url(url)} cannot be read ({reason}); wanted a picture", code="image_refused")
        if len(content) > most:
            message = f"{shown_url(url)} has more than {most:,} bytes; wanted at most that; compress it"
            return ImageError(message, code="image_too_large")
        return content

    def _ready_fetcher(self) -> Fetcher:
        if self._fetcher is None:
            from qwen_vl_classifier.images.fetching import Fetcher  # needs an extra

            self._fetcher = Fetcher(self.spec.url_hosts, max_bytes=self._limits.max_bytes)
        return self._fetcher


def read_rows(spec: SourceSpec, shard: Shard, given: GivenRows | None = None) -> list[SourceRow]:
    """Return the rows of a shard with all pictures that are not local fetched: `ShardReader.read` and `fetch`."""
    reader = ShardReader(spec, given)
    return reader.fetch(reader.read(shard))


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
