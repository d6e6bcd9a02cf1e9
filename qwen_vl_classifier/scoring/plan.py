"""Plan which rows make which shard, in one pass over the data; memory grows with shards, not with rows."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_vl_classifier.config.fields import MAX_TEXT_CHARS
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.locating import Locate
from qwen_vl_classifier.data.parquet import ParquetRows
from qwen_vl_classifier.data.table import Columns, Row, numbered_rows
from qwen_vl_classifier.data.text_files import UNITS, unpacked
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.scoring.cuts import Cuts, TextScan, picture_keys, same_pictures
from qwen_vl_classifier.scoring.jobs import Shard, Span
from qwen_vl_classifier.scoring.reading import ShardReader
from qwen_vl_classifier.scoring.sources import (
    DataFiles,
    GivenRows,
    PictureNames,
    SourceSpec,
    find_files,
    list_pictures,
    picture_locator,
)

_COMPARED = 256  # rows whose pictures are looked at together


@dataclass
class Plan:
    """The shards of a data set, made as they are needed.

    Attributes:
        spec: How their rows are read.
        cuts: Where they begin.
        digest: SHA-256 of the data.
        sources: Paths or URLs of the files.
        names: Names of the pictures, where the source is a folder of these.
        given: Rows given in Python, for `ShardReader`; else `None`.
    """

    spec: SourceSpec
    cuts: Cuts
    digest: str
    sources: tuple[str, ...] = ("",)
    names: PictureNames | None = None
    given: GivenRows | None = None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.cuts.rows

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> Shard:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first_row, found = self.cuts.shard(index)
        spans = tuple(
            Span(self.sources[file], start, rows, number, self.names.some(start, rows) if self.names else ())
            for file, start, rows, number in found
        )
        return Shard(index, first_row, sum(span.rows for span in spans), spans)

    def __iter__(self) -> Iterator[Shard]:
        return (self[index] for index in range(len(self)))


def make_plan(
    source: Any,
    columns: Columns,
    *,
    shard_size: int,
    limit: int | None = None,
    group_by_image: bool = False,
    text: str | None = None,
    allow_outside: bool = False,
    max_text_chars: int = MAX_TEXT_CHARS,
    url_hosts: Collection[str] = (),
    kept: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan the shards of a data set.

    JSONL and CSV are read once from beginning to end (or to `limit`), of Parquet the footers, and the pictures where
    shards would end if they are to be grouped. Of the first shard the rows are looked at, so that a wrong column name
    shows before anything is scored.

    Args:
        source: A JSONL, JSON, CSV, TSV or Parquet file, a glob or a folder of these, or a folder of pictures, by path
            or by URL of a store (s3://, gs://, hdfs://, ...); a Hugging Face data set; or rows in Python.
        columns: Names of the columns.
        shard_size: Rows of a shard.
        limit: Take the first so many rows.
        group_by_image: Keep consecutive rows of the same picture in one shard, which may then be larger.
        text: One text for all rows, in place of the text column. A folder of pictures needs it.
        allow_outside: Allow image paths to leave the folder of their data file.
        max_text_chars: A longer text, in characters, is a row with an error.
        url_hosts: Hosts from which pictures may be fetched.
        kept: Columns whose values go along with each row.
        storage_options: Options of fsspec for a source by URL.

    Raises:
        DataError: The data cannot be read, or has no rows, or the first rows lack a column.
        ConfigError: `limit` is below 1, or `text` is blank, or a URL is of no known store.
        MissingExtraError: The source is a URL, and fsspec is not installed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"{spelled('limit', limit)}; expected at least 1; leave it out to take all rows")
    cuts = Cuts(shard_size, limit)
    shared = {
        "columns": columns,
        "text": text,
        "allow_outside": allow_outside,
        "max_text_chars": max_text_chars,
        "url_hosts": tuple(url_hosts),
        "kept": tuple(kept),
    }
    if isinstance(source, (str, os.PathLike)):
        files = find_files(os.fspath(source), storage_options)
        spec = SourceSpec(
            format=files.format,
            name=os.fspath(source),
            unit=UNITS.get(files.format, "picture"),
            root=files.root if len(files.paths) > 1 else "",
            storage_options=dict(storage_options or {}),
            **shared,  # type: ignore[arg-type]  # each under its own type
        )
        plan = _plan_of_files(files, spec, cuts, group_by_image)
    else:
        given = GivenRows(source, columns)
        spec = SourceSpec(format="given", name=given.name, unit="row", **shared)  # type: ignore[arg-type]
        locate = picture_locator(spec, spec.name, None)
        same = _same_as_before(given.rows, columns.image, locate) if group_by_image else None
        cuts.add_range(0, len(given), same)
        plan = Plan(spec, cuts, given.digest(cuts.rows, kept), given=given)
    if group_by_image:  # where shards end depends on pictures too, which may change between two runs
        plan.digest = cuts.digest(plan.digest)
    if not plan.rows:
        raise DataError(f"{spec.name} holds no rows; expected at least one; check that it is the right source")
    ShardReader(spec, plan.given).check(plan[0])
    return plan


def _plan_of_files(files: DataFiles, spec: SourceSpec, cuts: Cuts, group_by_image: bool) -> Plan:
    if files.format == "pictures":
        names = list_pictures(files, follow_links=spec.allow_outside)
        cuts.add_range(0, len(names), None)
        return Plan(spec, cuts, names.digest(), sources=files.paths, names=names)
    add = _add_parquet if files.format == "parquet" else _add_text
    digests = []
    for index, path in enumerate(files.paths):
        if cuts.full:
            break
        try:
            digests.append((files.name(path), add(files, index, spec, cuts, group_by_image)))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}); expected a data file; check it") from None
    if len(files.paths) == 1:
        return Plan(spec, cuts, digests[0][1], sources=files.paths)
    joined = hashlib.sha256(os.fsencode("".join(f"{name}\0{one}\0" for name, one in digests)))
    return Plan(spec, cuts, joined.hexdigest(), sources=files.paths)


def _add_text(files: DataFiles, index: int, spec: SourceSpec, cuts: Cuts, group_by_image: bool) -> str:
    """Add the rows of a file of text; return the SHA-256 of what was read of it."""
    path = files.paths[index]
    with files.storage.open(path) as file:
        scan = TextScan(unpacked(file, path), files.format, path, spec.columns.needed)
        locate = picture_locator(spec, path, files.storage)

        def same(before: tuple[int, Any], now: tuple[int, Any]) -> bool:
            keys, others = (picture_keys(scan.row(*row), spec.columns.image) for row in (before, now))
            return same_pictures(keys, others, locate)

        cuts.add_each(index, scan.rows(), same if group_by_image else None)
        return scan.digest()


def _add_parquet(files: DataFiles, index: int, spec: SourceSpec, cuts: Cuts, group_by_image: bool) -> str:
    """Add the rows of a Parquet file; return the SHA-256 of its size and footer."""
    path = files.paths[index]
    with files.storage.open(path) as file:
        table = ParquetRows(file, path)
        image, same = spec.columns.image_in(table.column_names), None
        if group_by_image and image in table.column_names:
            pictures = ParquetRows(file, path, [image])
            same = _same_as_before(
                lambda start, count: numbered_rows(pictures.each(start, count)),
                image,
                picture_locator(spec, path, files.storage),
            )
        cuts.add_range(index, table.count, same)
        return table.digest()


def _same_as_before(
    rows: Callable[[int, int], Iterator[Row]], image_column: str, locate: Locate
) -> Callable[[int], bool]:
    """Return a function that tells whether the row at a position has the picture of the one before.

    Args:
        rows: Gives consecutive rows by their start and number.
        image_column: Name of the column.
        locate: From a path in a row to the file.
    """

    @functools.lru_cache(maxsize=2)
    def block_of(number: int) -> list[list[bytes | str]]:
        return [picture_keys(row, image_column) for row in rows(number * _COMPARED, _COMPARED)]

    def keys(position: int) -> list[bytes | str]:
        return block_of(position // _COMPARED)[position % _COMPARED]

    return lambda position: same_pictures(keys(position), keys(position - 1), locate)
