"""The rows of one shard, read where they lie: nothing of the file before them is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.readers import Columns
from qwen_vl_classifier.scoring.parts import Shard


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """How the rows of a data set are read; `make_plan` makes it. JSON in both directions.

    Attributes:
        format: "jsonl", "csv", "parquet", "pictures" (a folder of image files) or "given" (rows in Python).
        name: The data, for messages.
        unit: What a row's number counts: "line", "row" or "picture".
        columns: Names of the columns.
        text: One text for all rows, in place of the text column.
        allow_outside: Allow image paths to leave the folder of their data file.
        url_hosts: Hosts from which pictures may be fetched; none where URLs are off.
        several: Whether there are several files, so that messages name the one that is meant.
        listing: SHA-256 of the names in a folder of pictures; a folder that has changed since is refused.
        storage_options: Options of fsspec for data by URL. They may hold secrets: never show or keep them.
    """

    format: str
    name: str
    unit: str
    columns: Columns
    text: str | None = None
    allow_outside: bool = False
    url_hosts: tuple[str, ...] = ()
    several: bool = False
    listing: str = ""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SourceSpec:
        """Make a specification from what `to_json` gave."""
        return cls(**{**record, "columns": Columns(**record["columns"]), "url_hosts": tuple(record["url_hosts"])})


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row, ready to be scored, or what is wrong with it.

    Attributes:
        row: Position in the whole data, from 0.
        id: Its id, or its position where it has none that can be read.
        example: The example, without label; `None` where there is an error.
        code: What is wrong, in one word for programs: invalid_row, or a code of `ImageError`; else "".
        error: What is wrong, in one line that names the row; else "".
    """

    row: int
    id: str
    example: Example | None = None
    code: str = ""
    error: str = ""


class ShardReader:
    """Read shards of one data set, any of them, in any order.

    Args:
        spec: How to read it.
        given: The rows themselves where they are given in Python (`Plan.given`), else `None`.
    """

    def __init__(self, spec: SourceSpec, given: Any = None) -> None:
        self.spec = spec
        self._given = given

    def read(self, shard: Shard) -> list[SourceRow]:
        """Return the rows of a shard, in order; a row that cannot be used has an error in place of an example.

        Pictures that lie in an object store or behind a URL are named, not fetched: see `fetch`.

        Raises:
            DataError: The data has changed since it was planned, or cannot be read any further.
        """
        raise NotImplementedError

    def fetch(self, rows: Sequence[SourceRow]) -> list[SourceRow]:
        """Return rows with the bytes of those pictures that do not lie on this machine, or with an error.

        Rows whose pictures are local are returned as they are, at no cost. A few dozen rows at a time keep memory
        bounded.
        """
        raise NotImplementedError


def read_rows(spec: SourceSpec, shard: Shard, given: Any = None) -> list[SourceRow]:
    """Return the rows of a shard with all pictures that are not local fetched: `ShardReader.read` and `fetch`."""
    reader = ShardReader(spec, given)
    return reader.fetch(reader.read(shard))
