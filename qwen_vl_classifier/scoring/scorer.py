"""One shard: rows -> pictures -> probabilities -> a file, whatever is wrong with single rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.scoring.plan import Shard
from qwen_vl_classifier.scoring.sources import SourceSpec


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row could not be scored.

    Attributes:
        code: In one word for programs: a code of `ImageError`, invalid_row, out_of_memory or crashed.
        message: For people.
    """

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a worker needs to know, beside its shards.

    Attributes:
        classifiers: Folders of saved classifiers.
        device: Where they run, as in `Backbone.load`.
        threads: Of the CPU; 0 leaves the number as it is.
        sharing: Workers that share the memory of this worker's device.
        source: The rows.
        out: The folder of the scores; it is made and checked already.
        manifest: The content of its `manifest.json`.
        token_budget: Most tokens in one batch; 0 takes that of the folder, which the first worker chooses.
        features: Folder where features are kept; "" keeps none.
    """

    classifiers: tuple[str, ...]
    device: str
    threads: int
    sharing: int
    source: SourceSpec
    out: str
    manifest: Mapping[str, Any]
    token_budget: int = 0
    features: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        raise NotImplementedError

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Job:
        """Make a job from what `to_json` returned."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What came of a shard.

    Attributes:
        index: Which shard.
        rows: Rows in it.
        errors: Rows with an error.
        seconds_reading: Time to read rows and open pictures; most of it passes while the model is at work.
        seconds_scoring: Time in the model.
        seconds_writing: Time to write the file.
    """

    index: int
    rows: int
    errors: int
    seconds_reading: float = 0.0
    seconds_scoring: float = 0.0
    seconds_writing: float = 0.0


class ShardScorer:
    """Score shards, one after the other.

    Args:
        job: What to score with, and where to write.
        panel: The classifiers, where they are loaded already.
    """

    def __init__(self, job: Job, *, panel: Panel | None = None) -> None:
        self.job = job

    def load(self) -> None:
        """Load the classifiers; `run` and `probe` do it where it was not done."""

    def run(self, shard: Shard, blamed: Mapping[int, RowError] | None = None) -> ShardReport:
        """Score a shard and write it; on return it is on disk.

        Args:
            shard: Which.
            blamed: Rows that are not to be looked at, by position in the shard, and the error that each becomes.
        """
        raise NotImplementedError

    def run_all(self, tasks: Iterable[tuple[Shard, Mapping[int, RowError]]]) -> Iterator[ShardReport]:
        """Score shards as `run` does, and read the next one while the model is at the one before."""
        raise NotImplementedError

    def probe(self, shard: Shard, rows: range, blamed: Mapping[int, RowError] | None = None) -> None:
        """Score some rows of a shard without writing, to see whether the process survives them.

        Args:
            shard: Which.
            rows: Positions in the shard.
            blamed: Rows that are not to be looked at, by position in the shard.
        """
        raise NotImplementedError
