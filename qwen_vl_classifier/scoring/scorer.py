"""One shard: rows -> pictures -> probabilities -> a file, whatever is wrong with single rows.

Rows of the same picture are brought together within their shard, so that they share its pass. Batches are planned
within a shard and never across, so that what a row gets does not depend on which shards ran before it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qwen_vl_classifier.backbone.devices import choose_token_budget
from qwen_vl_classifier.backbone.preparing import by_picture, prepare_outcomes, read_ahead
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.backbone.stream import FeatureReader
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ExampleError, OutOfMemoryError
from qwen_vl_classifier.features.extraction import feature_reader
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.whole import clear_leftovers
from qwen_vl_classifier.scoring.formats import RowError, ScoredRow
from qwen_vl_classifier.scoring.parts import Shard
from qwen_vl_classifier.scoring.shards import ScoreManifest, ShardFolder
from qwen_vl_classifier.scoring.sources import ShardReader, SourceRow, SourceSpec

_FETCHED = 64  # rows whose pictures are fetched together

_Features = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a worker needs to know, beside its shards. JSON in both directions.

    Attributes:
        classifiers: Folders of saved classifiers.
        device: Where they run, as in `Backbone.load`.
        model: Where the backbone is now; "" for where it was when the classifiers were saved.
        max_text_tokens: Tokens that a text may have; 0 for as many as the model has positions.
        threads: Of the CPU; 0 leaves the number as it is.
        sharing: Workers that share the memory of this worker's device.
        source: How rows are read.
        out: The folder of the scores, by path or URL; it is made and checked already.
        manifest: The content of its `manifest.json`.
        token_budget: Most tokens in one batch; 0 takes that of the folder, which the first worker chooses.
        features: Folder where features are kept; "" keeps none.
        storage_options: Options of fsspec for `out`. They may hold secrets: never show or keep them.
    """

    classifiers: tuple[str, ...]
    device: str
    source: SourceSpec
    out: str
    manifest: Mapping[str, Any]
    model: str = ""
    max_text_tokens: int = 0
    threads: int = 0
    sharing: int = 1
    token_budget: int = 0
    features: str = ""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def worker(self) -> ShardScorer:
        """Return what does this job's shards, as yet without any model."""
        return ShardScorer(self)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Job:
        """Make a job from what `to_json` returned."""
        source = SourceSpec.from_json(record["source"])
        return cls(**{**record, "classifiers": tuple(record["classifiers"]), "source": source})


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
        problems: Of rows that were left out of features: position in the data and what is wrong.
    """

    index: int
    rows: int
    errors: int
    seconds_reading: float = 0.0
    seconds_scoring: float = 0.0
    seconds_writing: float = 0.0
    problems: Sequence[tuple[int, str]] = ()


class ShardScorer:
    """Score shards, one after the other.

    Args:
        job: What to score with, and where to write.
        panel: The classifiers, where they are in memory already.
        given: The rows, where they are given in Python (`Plan.given`).
    """

    def __init__(self, job: Job, *, panel: Panel | None = None, given: Any = None) -> None:
        self.job = job
        self._panel = panel
        self._reader = ShardReader(job.source, given)
        self._folder = ShardFolder(job.out, ScoreManifest.from_json(job.manifest), job.storage_options)
        self._store: FeatureStore | None = None
        self._budget: int | None = None

    @property
    def panel(self) -> Panel:
        """The classifiers, loaded when they are first needed."""
        if self._panel is None:
            if self.job.threads:
                torch.set_num_threads(self.job.threads)
            self._panel = Panel.load(
                self.job.classifiers,
                device=self.job.device,
                model=self.job.model or None,
                max_text_tokens=self.job.max_text_tokens or None,
            )
        return self._panel

    def load(self) -> None:
        """Load the classifiers and open the store of features; `run` and `probe` do it where it was not done.

        Raises:
            ArtifactError: A folder holds no classifier, or its backbone is not the one it was saved with.
            CheckpointError: The backbone cannot be loaded.
            FeatureStoreError: Features cannot be kept where they should.
        """
        self.job.source.adopt()
        _ = self.panel
        if self.job.features and self._store is None:
            self._store = FeatureStore(self.job.features)

    def run(self, shard: Shard, blamed: Mapping[int, RowError] | None = None) -> ShardReport:
        """Score a shard and write it; on return it is on disk.

        Args:
            shard: Which.
            blamed: Rows that are not to be scored, by position in the shard, and the error that each becomes.

        Raises:
            ConfigError: It cannot be written.
            DataError: The data has changed since it was planned, or cannot be read any further.
        """
        (report,) = self.run_all([(shard, blamed or {})])
        return report

    def run_all(
        self, tasks: Iterable[tuple[Shard, Mapping[int, RowError]]], *, endless: bool = False
    ) -> Iterator[ShardReport]:
        """Score shards as `run` does, and read the next one while the model is at the one before.

        Args:
            tasks: Shards, each with the rows that are not to be scored. A thread asks for the next one early: it may
                block until there is one, and the report of the one before comes all the same.
            endless: Whether it may block for ever. An error then leaves that thread behind, and the process has to be
                ended by `os._exit`.
        """
        self.load()
        if not self._budget:
            self._budget = self.job.token_budget or self._folder.settle_token_budget(self._proposed_budget())
        for piece in read_ahead(self._pieces(tasks), wait=not endless):
            work = piece.work
            started = time.perf_counter()
            self._score(piece)
            work.scoring += time.perf_counter() - started
            if piece.is_last:
                yield self._write(work)

    def probe(self, shard: Shard, rows: range, blamed: Mapping[int, RowError] | None = None) -> list[ScoredRow]:
        """Score some rows of a shard without writing: to see whether the process survives them, or how long they take.

        Args:
            shard: Which.
            rows: Positions in the shard.
            blamed: Rows that are not to be scored, by position in the shard.

        Returns:
            These rows, in order.
        """
        self.load()
        scored: Sequence[ScoredRow | None] = ()
        for piece in self._pieces([(shard, blamed or {})], only=rows):
            self._score(piece)
            scored = piece.work.rows
        return [row for row in scored if row is not None]

    def remove_partial_files(self, shards: Iterable[Shard]) -> None:
        """Remove what a worker that died left of shards; only while no other worker has them.

        Raises:
            ConfigError: It cannot be removed.
        """
        for shard in shards:
            self._folder.sweep(shard.index)
        if self.job.features:
            clear_leftovers(Path(self.job.features))

    def _proposed_budget(self) -> int:
        backbone = self.panel.backbone
        return choose_token_budget(backbone.model.config, backbone.device, backbone.dtype, sharing=self.job.sharing)

    def _pieces(
        self, tasks: Iterable[tuple[Shard, Mapping[int, RowError]]], only: range | None = None
    ) -> Iterator[_Piece]:
        """Read shards and prepare their rows, in pieces that are encoded together; the last of each shard says so."""
        for shard, blamed in tasks:
            started = time.perf_counter()
            rows = self._reader.read(shard)
            panel = self.panel
            reader = feature_reader(panel.backbone, panel.taps, self._store, token_budget=self._budget)
            work = _Work(shard, [None] * len(rows), reader)
            good: list[tuple[int, Example]] = []
            for position, row in enumerate(rows):
                if only is not None and position not in only:
                    continue
                if position in blamed:
                    work.fail(position, row, blamed[position])
                elif row.example is None:
                    work.fail(position, row, RowError(row.code, row.error))
                else:
                    good.append((position, row.example))
            waiting: deque[int] = deque()  # positions of the examples that were read and not yet prepared
            order = [good[place][0] for place in by_picture([example for _, example in good])]
            examples = self._examples(rows, order, work, waiting)
            piece = None
            for outcomes in prepare_outcomes(panel.backbone.processor, examples):
                positions = [waiting.popleft() for _ in outcomes]
                prepared = []
                for position, outcome in zip(positions, outcomes, strict=True):
                    if isinstance(outcome, ExampleError):
                        work.fail(position, rows[position], RowError(outcome.code, str(outcome)))
                    else:
                        prepared.append((position, rows[position].id, outcome))
                piece = _Piece(work, prepared, is_last=positions[-1] == order[-1])
                work.reading += time.perf_counter() - started
                yield piece
                started = time.perf_counter()
            if piece is None or not piece.is_last:  # no row could be prepared, or the last ones were not fetched
                yield _Piece(work, [], is_last=True)

    def _examples(
        self, rows: Sequence[SourceRow], order: Sequence[int], work: _Work, waiting: deque[int]
    ) -> Iterator[Example]:
        """Yield the examples of rows with their pictures fetched, and note their positions as they are taken."""
        for start in range(0, len(order), _FETCHED):
            chosen = order[start : start + _FETCHED]
            for position, row in zip(chosen, self._reader.fetch([rows[one] for one in chosen]), strict=True):
                if row.example is None:
                    work.fail(position, row, RowError(row.code, row.error))
                else:
                    waiting.append(position)
                    yield row.example

    def _score(self, piece: _Piece) -> None:
        """Fill in the scores of a piece's rows."""
        if not piece.rows:
            return
        names = [name for _, name, _ in piece.rows]
        outcomes = _features(piece.work.reader, [item for _, _, item in piece.rows], names)
        places = [place for place, outcome in enumerate(outcomes) if not isinstance(outcome, RowError)]
        for (position, name, _), outcome in zip(piece.rows, outcomes, strict=True):
            if isinstance(outcome, RowError):
                piece.work.fail_named(position, name, outcome)
        if not places:
            return
        features = np.stack([outcomes[place] for place in places])  # type: ignore[misc]  # no errors among them
        for place, row in zip(places, self.panel.probabilities_of(features).tolist(), strict=True):
            position, name, _ = piece.rows[place]
            if not all(map(math.isfinite, row)):
                message = "the model's answer is not a number; use float32, or check the checkpoint"
                piece.work.fail_named(position, name, RowError("not_finite", message))
                continue
            predictions = tuple(
                classifier.decision_of(probability)
                for classifier, probability in zip(self.panel.classifiers, row, strict=True)
            )
            piece.work.keep(position, ScoredRow(name, piece.work.shard.first_row + position, predictions))

    def _write(self, work: _Work) -> ShardReport:
        started = time.perf_counter()
        rows = [row for row in work.rows if row is not None]
        assert len(rows) == work.shard.rows
        self._folder.write(work.shard.index, rows)
        return ShardReport(
            index=work.shard.index,
            rows=len(rows),
            errors=sum(row.error is not None for row in rows),
            seconds_reading=work.reading,
            seconds_scoring=work.scoring,
            seconds_writing=time.perf_counter() - started,
        )


@dataclass(slots=True)
class _Work:
    """A shard in the making."""

    shard: Shard
    rows: list[ScoredRow | None]
    reader: FeatureReader  # of its own, so that what a row gets does not depend on the shards before
    reading: float = 0.0
    scoring: float = 0.0

    def keep(self, position: int, row: ScoredRow) -> None:
        self.rows[position] = row

    def fail(self, position: int, row: SourceRow, error: RowError) -> None:
        self.fail_named(position, row.id, error)

    def fail_named(self, position: int, name: str, error: RowError) -> None:
        self.keep(position, ScoredRow(name, self.shard.first_row + position, error=error))


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a shard that are encoded together: position, id and what the model reads."""

    work: _Work
    rows: Sequence[tuple[int, str, EncodedExample]]
    is_last: bool


def _features(
    reader: FeatureReader, prepared: Sequence[EncodedExample], ids: Sequence[str]
) -> list[_Features | RowError]:
    """Return the features of each example, or that it does not fit into memory, even alone."""
    try:
        return list(reader.read(prepared, ids))
    except OutOfMemoryError as error:
        if len(prepared) == 1:
            return [RowError("out_of_memory", str(error))]
    middle = len(prepared) // 2
    return _features(reader, prepared[:middle], ids[:middle]) + _features(reader, prepared[middle:], ids[middle:])
