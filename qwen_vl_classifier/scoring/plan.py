"""Which rows make which shard, and where they lie: known after one look at the data, in memory by shard, not by row."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qwen_vl_classifier.data.readers import Columns
from qwen_vl_classifier.scoring.parts import Part, Shard
from qwen_vl_classifier.scoring.sources import SourceSpec

__all__ = ["Part", "Plan", "Shard", "make_plan"]


class Plan:
    """Shards, made as they are asked for.

    Attributes:
        spec: How their rows are read.
        digest: SHA-256 of the data.
        rows: How many rows there are.
        given: Rows given in Python, for `ShardReader`; else `None`.
    """

    spec: SourceSpec
    digest: str
    rows: int
    given: Any

    @property
    def unit(self) -> str:
        """What a row's number counts: "line", "row" or "picture"."""
        return self.spec.unit

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Shard:
        raise NotImplementedError

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
    url_hosts: Collection[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan the shards of a data set.

    Args:
        source: A JSONL, CSV or Parquet file, a glob or a folder of these, or a folder of pictures, by path or by URL
            of a store (s3://, gs://, hdfs://, ...); a Hugging Face data set; or rows in Python.
        columns: Names of the columns.
        shard_size: Rows of a shard.
        limit: Take the first so many rows.
        group_by_image: Keep consecutive rows of the same picture in one shard, which may then be larger.
        text: One text for all rows, in place of the text column. A folder of pictures needs it.
        allow_outside: Allow image paths to leave the folder of their data file.
        url_hosts: Hosts from which pictures may be fetched.
        storage_options: Options of fsspec for a source by URL.

    Raises:
        DataError: The data cannot be read, or has no rows, or the first rows lack a column.
        ConfigError: `limit` is below 1, or `text` is blank.
    """
    raise NotImplementedError
