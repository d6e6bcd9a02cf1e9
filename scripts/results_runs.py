"""Runs of docs/figures/results.md: one method on one set with one seed, and the file that keeps what came of them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_vl_classifier import (
    Backbone,
    Classifier,
    Example,
    FeatureStore,
    FinetuneConfig,
    TrainConfig,
    finetune,
    load_examples,
    train,
)
from qwen_vl_classifier.data.targets import labels_of
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.features.extraction import every_tap, extract_features, keep_features
from qwen_vl_classifier.training.splitting import groups_of

# The same for all sets, so that nothing is fitted to the dev rows of one. Learning rates of fine-tuning were chosen on
# a quarter of the train rows of nlvr and easyvqa_tiny.
PROBES: dict[str, dict[str, Any]] = {
    "recipe": {"taps": "mean:-1", "heads": "mlp"},
    "logistic": {"taps": "mean:-1", "heads": "linear"},
    "probe": {},
}
FINETUNES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "learning_rate": 5e-4, "head_learning_rate": 1e-3},
    "full": {"method": "full", "towers": "all", "learning_rate": 2e-4, "head_learning_rate": 1e-3},
}
FEATURES = "features"  # not a method: the pass over the training rows that all probes of a set share
UNSEEDED = ("majority", "zero-shot", FEATURES)
METHODS = ("majority", "zero-shot", *PROBES, *FINETUNES)
START = "probe"  # where fine-tuning starts
_PROGRESS = sys.stderr.isatty()  # bars are for a terminal; a log has a line for each run
LIBRARIES = ("qwen-vl-classifier", "torch", "transformers", "numpy", "scikit-learn", "peft")


@dataclass(frozen=True, slots=True)
class Run:
    """What is to be run: two runs that are equal give the same result.

    Attributes:
        set: The folder of the data set.
        method: One of `METHODS`, or `FEATURES`.
        seed: Of split, initial weights and order.
        model: The backbone.
        dtype: Of its weights.
        limit: How many rows of each part, 0 for all.
        options: Those of the method.
    """

    set: str
    method: str
    seed: int
    model: str
    dtype: str
    limit: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """All of it in a line, to compare."""
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return f"{self.set} {self.method}" + (f" seed {self.seed}" if self.method not in UNSEEDED else "")


def plan(
    sets: Sequence[str], methods: Sequence[str], seeds: Sequence[int], *, model: str, dtype: str, limit: int
) -> list[Run]:
    """List runs in the order of work: what is cheap for all sets first, then fine-tuning set by set.

    What a method needs comes with it: the features of a probe, and the probe from which fine-tuning starts.
    """
    wanted = set(methods)
    if wanted & FINETUNES.keys():
        wanted.add(START)
    if wanted & PROBES.keys():
        wanted.add(FEATURES)

    def runs(name: str, order: Sequence[str]) -> Iterator[Run]:
        for seed in seeds:
            for method in order:
                if method in wanted and (seed == seeds[0] or method not in UNSEEDED):
                    options = PROBES.get(method) or FINETUNES.get(method) or {}
                    number = 0 if method in UNSEEDED else seed
                    yield Run(name, method, number, model, dtype, limit, options)

    cheap = ("majority", "zero-shot", FEATURES, *PROBES)
    return [run for order in (cheap, tuple(FINETUNES)) for name in sets for run in runs(name, order)]


class RunFile:
    """A file of JSON lines, one for each run that is done; lines are only ever added.

    Args:
        path: Of the file; made with the first line.

    Raises:
        DataError: A line other than the last, which a kill may have cut, is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                self._records[Run(**record["run"]).key] = record
            except (ValueError, TypeError, KeyError):
                raise DataError(
                    f"{self._path}: line {number} is not a run; expected lines that this script wrote; take it out"
                ) from None

    def get(self, run: Run) -> dict[str, Any] | None:
        """Return what is kept of a run, or `None` if it is not done."""
        return self._records.get(run.key)

    def add(self, run: Run, result: dict[str, Any]) -> None:
        """Keep the result of a run."""
        record = {"run": asdict(run), **result}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._records[run.key] = record


class DataSet:
    """One data set and what its runs share: rows, backbone and kept features.

    Args:
        folder: Holds train.jsonl and dev.jsonl.
        work: Where classifiers are kept, from which fine-tuning starts.
        features: Where features are kept.
    """

    def __init__(self, folder: Path, work: Path, features: Path) -> None:
        self._folder = folder
        self._work = work
        self._features = features
        self._rows: dict[str, list[Example]] = {}

    @cached_property
    def _store(self) -> FeatureStore:
        return FeatureStore(self._features)

    def rows(self, part: str, limit: int) -> list[Example]:
        """Return the rows of "train" or "dev"; with a limit, some from all over, for sets are sorted.

        Raises:
            DataError: They cannot be read, or are of one class only.
        """
        if part not in self._rows:
            self._rows[part] = load_examples(self._folder / f"{part}.jsonl", require_labels=True)
        rows = self._rows[part]
        rows = rows[:: max(1, len(rows) // limit)][:limit] if limit else rows
        labels_of(rows, what=part)  # of both classes, without which there is no AUROC
        return rows

    def perform(self, run: Run, backbone: Backbone) -> dict[str, Any]:
        """Do a run, and return what is to be kept of it, ready for JSON."""
        examples = self.rows("train", run.limit)
        began = time.perf_counter()
        if run.method == FEATURES:
            return {"seconds": self._pass_seconds(examples, backbone), **circumstances()}
        if run.method == "majority":
            share = float(np.mean([example.label for example in examples]))
            dev = self.rows("dev", run.limit)
            return {"seconds": 0.0, "threshold": 0.5, **_said(dev, [share] * len(dev)), **circumstances()}
        classifier, more = self._classifier(run, examples, backbone)
        seconds = time.perf_counter() - began
        dev = self.rows("dev", run.limit)
        store = None if run.method in FINETUNES else self._store  # features of weights that nobody keeps
        probabilities = classifier.predict_proba(dev, store=store, progress=_PROGRESS)
        return {
            "seconds": seconds,
            "tap": str(classifier.tap),
            "head": classifier.spec.kind,
            "threshold": classifier.threshold,
            **more,
            **_said(dev, probabilities[:, 1].tolist()),
            **circumstances(),
        }

    def _classifier(self, run: Run, examples: list[Example], backbone: Backbone) -> tuple[Classifier, dict[str, Any]]:
        """Train what a run asks for; return it with what else is to be kept of the run."""
        if run.method == "zero-shot":
            return Classifier.zero_shot(backbone), {}
        start = self.start_of(run)
        if run.method in FINETUNES:
            finetuning = FinetuneConfig(seed=run.seed, **run.options)
            result = finetune(Classifier.load(start), examples, config=finetuning, progress=_PROGRESS)
            return result.classifier, {"improved": result.improved}
        config = TrainConfig(seed=run.seed, **run.options)
        classifier = train(examples, backbone=backbone, config=config, store=self._store, progress=_PROGRESS).classifier
        if run.method == START:
            start.parent.mkdir(parents=True, exist_ok=True)
            classifier.save(start)
        return classifier, {}

    def start_of(self, run: Run) -> Path:
        """Return where the probe is kept from which a run of this seed, with these rows and this backbone, starts."""
        probe = dataclasses.replace(run, method=START, options=PROBES[START])
        return self._work / "probes" / f"{run.set}-{run.seed}-{hashlib.sha256(probe.key.encode()).hexdigest()[:12]}"

    def _pass_seconds(self, examples: list[Example], backbone: Backbone) -> float:
        """Return what reading the features of all taps costs a first time, beyond reading those that are kept."""
        taps = every_tap(backbone)

        def timed(work: Callable[[], object]) -> float:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began

        before = self._store.written
        first = timed(lambda: keep_features(examples, backbone, taps, self._store, progress=_PROGRESS))
        contents = len({(example.images, example.text) for example in examples})
        # What was kept already is missing from the time. A few are missing always: the same picture under two names.
        if self._store.written - before < 0.95 * contents * len(taps):
            first = timed(lambda: extract_features(examples, backbone, taps, progress=_PROGRESS))
        again = timed(lambda: extract_features(examples, backbone, taps, store=self._store, progress=_PROGRESS))
        return max(0.0, first - again)


def _said(dev: list[Example], probabilities: list[float]) -> dict[str, Any]:
    """Return what scores are made of: no picture or text is needed for them again."""
    return {
        "labels": [example.label for example in dev],
        "groups": groups_of(dev).tolist(),
        "probabilities": probabilities,
    }


def circumstances() -> dict[str, Any]:
    """Return what a reader may ask of the machine: threads, versions, processor."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # peft is an extra
            continue
    return {
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
        "machine": platform.machine(),
    }
