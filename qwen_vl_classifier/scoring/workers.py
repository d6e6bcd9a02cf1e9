"""What workers do with a shard, by the kind of their job: scores go to a file, features to a store.

Whatever is wrong with single rows, the others get their results. Windows are planned within a shard and never across,
so that what a row gets does not depend on which shards were done before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.devices import choose_token_budget
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.backbone.windows import read_ahead
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.errors import OutOfMemoryError
from qwen_vl_classifier.features.extraction import every_tap
from qwen_vl_classifier.features.reader import FeatureReader
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.whole import clear_leftovers
from qwen_vl_classifier.images.limits import decoding_threads
from qwen_vl_classifier.scoring.formats import ScoredRow
from qwen_vl_classifier.scoring.jobs import Job, Pulse, RowError, Shard, ShardReport, Task
from qwen_vl_classifier.scoring.manifest import ScoreManifest
from qwen_vl_classifier.scoring.reading import ShardReader, ShardWindow
from qwen_vl_classifier.scoring.scorers.exclusive_classes import ExclusiveClasses
from qwen_vl_classifier.scoring.shards import ShardFolder
from qwen_vl_classifier.scoring.sources import GivenRows, SourceSpec
from qwen_vl_classifier.training.probe.candidates import candidate_taps


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreJob:
    """Scores of classifiers; see `Job`.

    Attributes:
        classifiers: Folders of saved classifiers, in the order of the manifest's.
        device: Where they run, as in `Backbone.load`.
        model: Where the backbone is now; "" for where it was when the classifiers were saved.
        max_text_tokens: Tokens that a text may have; 0 for as many as the model has positions.
        threads: Of the CPU; 0 leaves the number as it is. As many open pictures (`decoding_threads`).
        sharing: Workers that share the memory of this worker's device.
        source: How rows are read.
        out: The folder of the scores, by path or URL; it is made and checked already.
        manifest: The content of its `manifest.json`.
        token_budget: Most tokens in one batch; 0 takes that of the folder, which the first worker chooses.
        features: Folder where features are kept; "" keeps none.
        run: Name of the run that has `out` locked (`ShardFolder.run`).
        decode_timeout: Seconds of processor time that one picture may take to decode.
        storage_options: Options of fsspec for `out`. They may hold secrets: never show or keep them.
    """

    kind: ClassVar[str] = "score"

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
    run: str = ""
    decode_timeout: float = math.inf
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def worker(self) -> ScoreWorker:
        """Return a worker for this job, not loaded."""
        return ScoreWorker(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractJob:
    """Features of a backbone; see `Job`.

    Attributes:
        backbone: Arguments of `Backbone.load`, but for the device.
        taps: Where to read: a list, "auto" or "all", as on the command line.
        device: Where the backbone runs.
        source: How rows are read.
        features: The folder of the store.
        feature_dtype: The type in which it keeps features.
        decode_timeout: Seconds of processor time that one picture may take to decode.
        threads: Of the CPU; 0 leaves the number as it is. As many open pictures (`decoding_threads`).
        sharing: Workers that share the memory of this worker's device.
    """

    kind: ClassVar[str] = "extract"

    backbone: Mapping[str, Any]
    taps: str
    device: str
    source: SourceSpec
    features: str
    feature_dtype: Literal["float32", "float16"] = "float32"
    decode_timeout: float = math.inf
    threads: int = 0
    sharing: int = 1

    def worker(self) -> ExtractWorker:
        """Return a worker for this job, not loaded."""
        return ExtractWorker(self)


def job_from_json(record: Mapping[str, Any]) -> Job:
    """Make a job from what `job_to_json` returned."""
    fields = {**record, "source": SourceSpec.from_json(record["source"])}
    if fields.pop("kind") == ExtractJob.kind:
        return ExtractJob(**fields)
    return ScoreJob(**{**fields, "classifiers": tuple(record["classifiers"])})


class ScoreWorker:
    """Scores shards: a `Worker`.

    Args:
        job: What to score with, and where to write.
        panel: The classifiers, where they are in memory already.
        given: The rows, where they are given in Python (`Plan.given`).
    """

    def __init__(self, job: ScoreJob, *, panel: Panel | None = None, given: GivenRows | None = None) -> None:
        self.job = job
        self.pulse = Pulse()
        self._panel = panel
        self._folder = ShardFolder(job.out, ScoreManifest.from_json(job.manifest), job.storage_options, job.run)
        self._reader = ShardReader(
            job.source,
            given,
            pulse=self.pulse,
            decode_timeout=job.decode_timeout,
            threads=decoding_threads(job.threads),
        )
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
            _count_layers(self._panel.backbone, self.pulse)
        return self._panel

    @cached_property
    def _exclusive(self) -> list[tuple[ExclusiveClasses, Panel]]:
        """Those of the classifiers that are classes of which a row has exactly one."""
        groups = ScoreManifest.from_json(self.job.manifest).exclusive
        return [
            (
                group,
                Panel(
                    self.panel.classifiers[group.first : group.numbers.stop],
                    names=group.classes,
                    one_of=True,
                    temperature=group.temperature,
                ),
            )
            for group in groups
        ]

    def load(self) -> None:
        """Load the classifiers and open the store of features.

        Raises:
            ArtifactError: A folder holds no classifier, or its backbone is not the one it was saved with.
            CheckpointError: The backbone cannot be loaded.
            FeatureStoreError: Features cannot be kept where they should.
        """
        self.job.source.adopt()
        _ = self.panel
        if self.job.features and self._store is None:
            self._store = FeatureStore(self.job.features)

    def run_all(self, tasks: Iterable[Task], *, endless: bool = False) -> Iterator[ShardReport]:
        """Score shards and write each; see `Worker`.

        Raises:
            ConfigError: One cannot be written.
            DataError: The data has changed since it was planned, or cannot be read any further.
        """
        self.load()
        if not self._budget:
            self._budget = self.job.token_budget or self._folder.settle_token_budget(self._proposed_budget())
        scores: _Scores | None = None
        for window in read_ahead(self._reader.windows(self.panel.backbone.processor, tasks), wait=not endless):
            started = time.perf_counter()
            scores = scores or self._begin()
            self._score(window, scores)
            scores.seconds += time.perf_counter() - started
            self.pulse.count_done(0 if window.is_last else len(scores))
            if window.is_last:
                rows = scores.in_order()
                assert len(rows) == window.shard.rows
                self._folder.write(window.shard.index, rows)
                errors = sum(row.error is not None for row in rows)
                yield ShardReport(window.shard.index, len(rows), errors, scores.seconds)
                scores = None

    def probe(self, task: Task) -> list[ScoredRow]:
        """Score some rows of a shard without writing, and return them in order."""
        self.load()
        scores = self._begin()
        for window in self._reader.windows(self.panel.backbone.processor, [task]):
            self._score(window, scores)
        return scores.in_order()

    def remove_partial_files(self, shards: Iterable[Shard]) -> None:
        """Remove what a worker that died left of shards.

        Raises:
            ConfigError: It cannot be removed.
        """
        for shard in shards:
            self._folder.sweep(shard.index)
        if self.job.features:
            clear_leftovers(Path(self.job.features))

    def _proposed_budget(self) -> int:
        backbone = self.panel.backbone
        return choose_token_budget(backbone.model.config, backbone.devices, backbone.dtype, sharing=self.job.sharing)

    def _begin(self) -> _Scores:
        return _Scores(FeatureReader(self.panel.backbone, self.panel.taps, self._store, token_budget=self._budget))

    def _score(self, window: ShardWindow, scores: _Scores) -> None:
        """Add the scores of a window's rows."""
        kept = window.kept
        for row, name, error in window.failed:
            scores.add(ScoredRow(name, row, error=error, kept=kept.get(row, ())))
        if not window.prepared:
            return
        features = _features(scores.reader, window.prepared, window.ids)
        fitting = [feature for feature in features if not isinstance(feature, RowError)]
        probabilities = iter(self.panel.own_probabilities_of(np.stack(fitting)) if fitting else np.empty(0))
        for row, name, feature in zip(window.rows, window.ids, features, strict=True):
            if isinstance(feature, RowError):
                scores.add(ScoredRow(name, row, error=feature, kept=kept.get(row, ())))
                continue
            values = next(probabilities)
            if not np.isfinite(values).all():
                message = "the model's answer is not a number; use float32, or check the checkpoint"
                scores.add(ScoredRow(name, row, error=RowError("not_finite", message), kept=kept.get(row, ())))
                continue
            predictions = list(map(Classifier.decision_of, self.panel.classifiers, values.tolist()))
            classes = []
            for group, panel in self._exclusive:
                (answer,) = panel.decisions_of(panel.joint_probabilities(values[None, group.numbers]))
                predictions[group.first : group.numbers.stop] = answer.labels.values()
                classes.append((answer.label_name or "", answer.probability or 0.0))
            scores.add(ScoredRow(name, row, tuple(predictions), tuple(classes), kept=kept.get(row, ())))


@dataclass(slots=True)
class _Scores:
    """What is known of a shard so far.

    Attributes:
        reader: Reads features: one for each shard, so that what a row gets does not depend on the shards before.
        seconds: Time that the model took.
    """

    reader: FeatureReader
    seconds: float = 0.0
    _rows: dict[int, ScoredRow] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: ScoredRow) -> None:
        self._rows[row.row] = row

    def in_order(self) -> list[ScoredRow]:
        return [self._rows[row] for row in sorted(self._rows)]


def _features(
    reader: FeatureReader, prepared: Sequence[EncodedExample], ids: Sequence[str]
) -> list[npt.NDArray[np.float32] | RowError]:
    """Return the features of each example, or that it does not fit into memory, even alone."""
    try:
        return list(reader.read(prepared, ids))
    except OutOfMemoryError as error:
        if len(prepared) == 1:
            return [RowError("out_of_memory", str(error))]
    middle = len(prepared) // 2
    return _features(reader, prepared[:middle], ids[:middle]) + _features(reader, prepared[middle:], ids[middle:])


def _count_layers(backbone: Backbone, pulse: Pulse) -> None:
    """Count a step for each layer of a pass: on a CPU, a whole pass may take many minutes."""
    model: Any = backbone.model
    for layer in (*model.visual.blocks, *model.language_model.layers):
        layer.register_forward_hook(lambda *_: pulse.step())


def chosen_taps(taps: str, backbone: Backbone) -> list[Tap]:
    """Return the taps of a list, those that training tries ("auto"), or all ("all").

    Raises:
        ConfigError: The backbone has no such tap, or the list cannot be read.
    """
    return every_tap(backbone) if taps == "all" else list(candidate_taps(taps, backbone))


class ExtractWorker:
    """Puts the features of shards into a store: a `Worker`.

    A store may be written by any number of processes, and what it has is not computed again, so that a run that was
    killed goes on. Nothing says which shards are done: their rows are read again, and their features found.

    Args:
        job: What to encode with, and where features are kept.
    """

    def __init__(self, job: ExtractJob) -> None:
        self.job = job
        self.pulse = Pulse()
        self._reader = ShardReader(
            job.source, pulse=self.pulse, decode_timeout=job.decode_timeout, threads=decoding_threads(job.threads)
        )
        self._backbone: Backbone | None = None

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
            taps = chosen_taps(self.job.taps, backbone)
            store = FeatureStore(self.job.features, dtype=self.job.feature_dtype)
            self._features = FeatureReader(backbone, taps, store)
            _count_layers(backbone, self.pulse)
            self._backbone = backbone

    def run_all(self, tasks: Iterable[Task], *, endless: bool = False) -> Iterator[ShardReport]:
        """Keep the features of shards; see `Worker`."""
        problems: list[tuple[int, str]] = []
        seconds, done = 0.0, 0
        for window in read_ahead(self._windows(tasks), wait=not endless):
            started = time.perf_counter()
            problems += ((row, error.message) for row, _, error in window.failed)
            if window.prepared:
                self._features.keep(window.prepared, window.ids)
            seconds += time.perf_counter() - started
            done += len(window.failed) + len(window.prepared)
            self.pulse.count_done(0 if window.is_last else done)
            if window.is_last:
                yield ShardReport(
                    window.shard.index, window.shard.rows, len(problems), seconds, problems=sorted(problems)
                )
                problems, seconds, done = [], 0.0, 0

    def probe(self, task: Task) -> None:
        """Encode some rows of a shard without keeping their features."""
        for window in self._windows([task]):
            if window.prepared:
                assert self._backbone is not None
                self._backbone.encode_prepared(window.prepared, self._features.taps)

    def remove_partial_files(self, shards: Iterable[Shard]) -> None:
        """Remove what workers that died left in the store; what a living one is writing stays."""
        clear_leftovers(Path(self.job.features))

    def _windows(self, tasks: Iterable[Task]) -> Iterator[ShardWindow]:
        self.load()
        assert self._backbone is not None
        return self._reader.windows(self._backbone.processor, tasks)
