"""What a worker is told of a shard: which rows it holds and where they lie. Small, and JSON in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of one file.

    Attributes:
        source: Path or URL of the file, or of the folder of pictures; "" for rows given in Python.
        start: Where the first row begins: its byte (JSONL, CSV), or its position from 0.
        rows: How many rows.
        first_number: The first row's number in messages, from 1: its line (JSONL, CSV) or position.
        names: The names of the pictures, where the source is a folder of these.
    """

    source: str
    start: int
    rows: int
    first_number: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one output file.

    Attributes:
        index: Which shard, from 0.
        first_row: Position of its first row in the whole data, from 0.
        rows: How many rows.
        parts: Where they lie, in order.
    """

    index: int
    first_row: int
    rows: int
    parts: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Shard:
        """Make a shard from what `to_json` gave."""
        parts = (Part(**{**part, "names": tuple(part["names"])}) for part in record["parts"])
        return cls(record["index"], record["first_row"], record["rows"], tuple(parts))
