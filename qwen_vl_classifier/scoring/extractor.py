"""Features of a data set of any size: the shards and engines of scoring, with one store of features as the output.

A store may be written by any number of processes, and what it has is not computed again, so that a run that was killed
goes on with the same command. Nothing says which shards are done: their rows are read again, and their features found.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.preparing import prepare_outcomes, read_ahead
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.config.fields import split_list
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.readers import Columns
from qwen_vl_classifier.errors import ConfigError, DataError, ExampleError
from qwen_vl_classifier.features.extraction import every_tap, feature_reader
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.whole import clear_leftovers
from qwen_vl_classifier.scoring import local
from qwen_vl_classifier.scoring.formats import RowError
from qwen_vl_classifier.scoring.parts import Shard
from qwen_vl_classifier.scoring.plan import make_plan
from qwen_vl_classifier.scoring.progress import Progress
from qwen_vl_classifier.scoring.scorer import ShardReport
from qwen_vl_classifier.scoring.sources import ShardReader, SourceRow, SourceSpec
from qwen_vl_classifier.training.probe.candidates import candidate_taps

_FETCHED = 64  # rows whose pictures are fetched together


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractJob:
    """All that a worker needs to know, beside its shards. JSON in both directions.

    Attributes:
        backbone: Arguments of `Backbone.load`, but for the device.
        taps: Where to read: a list, "auto" or "all", as on the command line.
        device: Where the backbone runs.
        source: How rows are read.
        features: The folder of the store.
        feature_dtype: The type in which it keeps features.
        threads: Of the CPU; 0 leaves the number as it is.
        sharing: Workers that share the memory of this worker's device.
    """

    backbone: Mapping[str, Any]
    taps: str
    device: str
    source: SourceSpec
    features: str
    feature_dtype: Literal["float32", "float16"] = "float32"
    threads: int = 0
    sharing: int = 1

    def worker(self) -> ShardExtractor:
        """Return what does this job's shards, as yet without any model."""
        return ShardExtractor(self)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ExtractJob:
        """Make a job from what `to_json` returned."""
        return cls(**{**record, "source": SourceSpec.from_json(record["source"])})


def chosen_taps(taps: str, backbone: Backbone) -> list[Tap]:
    """Return the taps of a list, those that training tries ("auto"), or all ("all").

    Raises:
        ConfigError: The backbone has no such tap, or the list cannot be read.
    """
    return every_tap(backbone) if taps == "all" else list(candidate_taps(taps, backbone))


@dataclass(slots=True)
class _Piece:
    """Rows that are encoded together; the last of a shard carries its problems."""

    prepared: list[EncodedExample]
    ids: list[str | None]
    shard: Shard
    problems: Sequence[tuple[int, str]] = ()
    is_last: bool = False


@dataclass(slots=True)
class ShardExtractor:
    """Put the features of shards into a store, one shard after the other."""

    job: ExtractJob
    _backbone: Backbone | None = None
    _store: FeatureStore | None = None
    _taps: list[Tap] = field(default_factory=list)

    def load(self) -> None:
        """Load the backbone and open the store.

        Raises:
            CheckpointError: The backbone cannot be loaded.
            ConfigError: The backbone has no such tap.
            FeatureStoreError: Features cannot be kept where they should.
        """
        self.job.source.adopt()
        if self._backbone is None:
            if self.job.threads:
                torch.set_num_threads(self.job.threads)
            backbone = Backbone.load(**self.job.backbone, device=self.job.device)
            self._taps = chosen_taps(self.job.taps, backbone)
            self._store = FeatureStore(self.job.features, dtype=self.job.feature_dtype)
            self._backbone = backbone

    def run_all(
        self, tasks: Iterable[tuple[Shard, Mapping[int, RowError]]], *, endless: bool = False
    ) -> Iterator[ShardReport]:
        """Keep the features of shards, and read the next one while the model is at the one before.

        Args:
            tasks: Shards, each with the rows that are not to be encoded.
            endless: As in `ShardScorer.run_all`.
        """
        self.load()
        scoring = 0.0
        for piece in read_ahead(self._pieces(tasks), wait=not endless):
            started = time.perf_counter()
            self._keep(piece, self._store)
            scoring += time.perf_counter() - started
            if piece.is_last:
                yield ShardReport(
                    piece.shard.index,
                    piece.shard.rows,
                    len(piece.problems),
                    seconds_scoring=scoring,
                    problems=piece.problems,
                )
                scoring = 0.0

    def probe(self, shard: Shard, rows: range, blamed: Mapping[int, RowError] | None = None) -> None:
        """Encode some rows of a shard without keeping them, to see whether the process survives them."""
        self.load()
        for piece in self._pieces([(shard, blamed or {})], only=rows):
            self._keep(piece, None)

    def remove_partial_files(self, shards: Iterable[Shard]) -> None:
        """Remove what workers that died left in the store; what a living one is writing stays."""
        clear_leftovers(Path(self.job.features))

    def _keep(self, piece: _Piece, store: FeatureStore | None) -> None:
        assert self._backbone is not None
        if not piece.prepared:
            return
        reader = feature_reader(self._backbone, self._taps, store)
        if store is None:
            reader.read(piece.prepared, piece.ids)
        else:
            reader.keep(piece.prepared, piece.ids)

    def _pieces(
        self, tasks: Iterable[tuple[Shard, Mapping[int, RowError]]], only: range | None = None
    ) -> Iterator[_Piece]:
        assert self._backbone is not None
        reader = ShardReader(self.job.source)
        for shard, blamed in tasks:
            rows = reader.read(shard)
            problems: dict[int, str] = {position: error.message for position, error in blamed.items()}
            chosen = [position for position in (range(len(rows)) if only is None else only) if position not in problems]
            waiting: deque[int] = deque()  # positions of those that were read and not yet prepared
            examples = _examples(reader, rows, chosen, problems, waiting)
            for outcomes in prepare_outcomes(self._backbone.processor, examples):
                piece = _Piece([], [], shard)
                for outcome in outcomes:
                    position = waiting.popleft()
                    if isinstance(outcome, ExampleError):
                        problems[position] = str(outcome)
                    else:
                        piece.prepared.append(outcome)
                        piece.ids.append(rows[position].id)
                yield piece
            found = [(shard.first_row + position, problem) for position, problem in sorted(problems.items())]
            yield _Piece([], [], shard, problems=found, is_last=True)


def _examples(
    reader: ShardReader, rows: Sequence[SourceRow], chosen: Sequence[int], problems: dict[int, str], waiting: deque[int]
) -> Iterator[Example]:
    """Yield the examples that can be used, their pictures fetched, and note their positions, or what is wrong."""
    usable = []
    for position in chosen:
        if rows[position].example is None:
            problems[position] = rows[position].error
        else:
            usable.append(position)
    for start in range(0, len(usable), _FETCHED):
        positions = usable[start : start + _FETCHED]
        for position, row in zip(positions, reader.fetch([rows[one] for one in positions]), strict=True):
            if row.example is None:
                problems[position] = row.error
            else:
                waiting.append(position)
                yield row.example


def extract_shards(
    source: str | os.PathLike[str],
    store: FeatureStore,
    *,
    taps: str,
    backbone: Mapping[str, Any],
    config: ScoreConfig,
    device: str = "auto",
    columns: Columns,
    text: str | None = None,
    allow_outside: bool = False,
    limit: int | None = None,
    bad: BadRows | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Keep the features of a data set in files, with the workers of an engine.

    Args:
        source: Data that `score` takes, in files.
        store: Where features are kept.
        taps: Where to read: a list, "auto" or "all".
        backbone: Arguments of `Backbone.load`, but for the device.
        config: Which engine and how many workers; what concerns scores alone is not looked at.
        device: As in `Backbone.load`.
        columns: Names of the columns.
        text: One text for all rows.
        allow_outside: Allow image paths to leave the folder of their data file.
        limit: Take the first so many rows.
        bad: Given the rows that cannot be used, which are left out; without it, they are an error at the end.
        progress: Show a progress bar if it takes more than two seconds.

    Returns:
        `rows` in the data, `errors` among them, and `features` that were added to the store.

    Raises:
        ConfigError: An option is out of its range.
        DataError: The data cannot be read, has no rows, or has rows that cannot be used; all others are in the store.
        QwenVLClassifierError: What a worker could not do.
    """
    engine = local.run
    if config.engine == "ray":
        from qwen_vl_classifier.scoring import ray

        engine = ray.run
    hosts = tuple(sorted(split_list(config.url_hosts)))
    plan = make_plan(
        source,
        columns,
        shard_size=config.shard_size,
        limit=limit,
        group_by_image=config.group_by_image,
        text=text,
        allow_outside=allow_outside,
        url_hosts=hosts,
    )
    if plan.given is not None:
        raise ConfigError("rows given in Python are extracted in this process: use extract_features")
    job = ExtractJob(
        backbone=dict(backbone),
        taps=taps,
        device=device,
        source=plan.spec,
        features=str(Path(store.folder).resolve()),
        feature_dtype=store.dtype,
    )
    before = len(store)
    found = BadRows() if bad is None else bad

    def add(report: ShardReport) -> None:
        done.add(report)
        for position, problem in report.problems:
            found.add(position, None, DataError(problem))

    try:
        with Progress(plan.rows, rows_there=0, errors_there=0, show=progress, work="extract") as done:
            engine(job, plan, config, add, lambda: False)
    finally:
        clear_leftovers(store.folder)  # of workers that were ended with the run, or of a run that was killed before
    store.refresh()
    if bad is None:
        found.check(plan.rows)
    return {"rows": plan.rows, "errors": done.errors, "features": len(store) - before}
