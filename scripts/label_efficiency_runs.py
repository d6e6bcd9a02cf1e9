"""Runs of docs/explanation/labelling.md: label one set in one order, with answers that come from its labels."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from results_runs import circumstances

from qwen_vl_classifier import Backbone, Classifier, FeatureStore, Tap, extract_features, load_examples
from qwen_vl_classifier.classifier.probabilities import log_odds
from qwen_vl_classifier.classifier.ranking import auroc
from qwen_vl_classifier.data.targets import labels_of
from qwen_vl_classifier.errors import CheckpointError, ConfigError
from qwen_vl_classifier.evaluation.intervals import bounds
from qwen_vl_classifier.files.whole import write_file
from qwen_vl_classifier.labelling.choosing import Chooser
from qwen_vl_classifier.labelling.live_estimate import live_estimate
from qwen_vl_classifier.labelling.live_head import LiveHead, fit_live_head
from qwen_vl_classifier.labelling.pool_features import PoolFeatures
from qwen_vl_classifier.training.probe.search import ZERO_SHOT_TAP
from qwen_vl_classifier.training.splitting import groups_of
from qwen_vl_classifier.training.uncertainty import resampled

Order = Literal["loop", "random"]
Float = npt.NDArray[np.float64]

ORDERS: tuple[Order, ...] = ("loop", "random")
GAIN = 0.95  # of what all labels gain, that is to be reached
HELD = 2  # measurements in a row that have to reach it: one alone may be chance
WITHOUT_GOAL = 300  # labels where there is nothing to reach, for the intervals alone
_GROWTH = 1.1  # of the number of labels, after which the head that chooses is fitted anew; a person is slower than that
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a set.

    Attributes:
        features: float32, shape (n, taps, hidden).
        labels: Shape (n,), 0 or 1.
        groups: Shape (n,).
        start: Shape (n,), margins of zero-shot; `None` where the backbone has none.
    """

    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    start: Float | None


@dataclass(frozen=True, slots=True)
class Goal:
    """What all labels of a pool give.

    Attributes:
        start: AUROC on dev before any label: that of zero-shot, or 0.5.
        full: AUROC on dev of a head that was trained on all labels, with the ends of its 95 % interval.
    """

    start: float
    full: tuple[float, float, float]

    @property
    def target(self) -> float:
        """The AUROC to reach."""
        return 0.5 + GAIN * (self.full[0] - 0.5)

    @property
    def exists(self) -> bool:
        """Whether all labels of the pool give more than chance, and more than what is there before any label."""
        return self.full[1] > 0.5 and self.start < self.target


class LabelSet:
    """A data set whose train rows are the pool and whose dev rows are the judge.

    Args:
        folder: Holds train.jsonl and dev.jsonl.
        backbone: Reads the features.
        taps: Those that a head may read.
        store: Keeps the features.
    """

    def __init__(self, folder: Path, backbone: Backbone, taps: Sequence[Tap], store: FeatureStore) -> None:
        self.name = folder.name
        self.taps = list(taps)
        self._folder = folder
        self._backbone = backbone
        self._store = store

    @cached_property
    def train(self) -> Part:
        """The pool."""
        return self._read("train")

    @cached_property
    def dev(self) -> Part:
        """The judge."""
        return self._read("dev")

    @cached_property
    def pool(self) -> PoolFeatures:
        """The features of the pool."""
        return PoolFeatures(self.train.features, self.taps, self.train.groups)

    def _read(self, part: str) -> Part:
        examples = load_examples(self._folder / f"{part}.jsonl", require_labels=True)
        labels = np.array(labels_of(examples, what=part), dtype=np.int64)
        zero_shot = self._zero_shot()
        read = self.taps if zero_shot is None else list(dict.fromkeys([*self.taps, ZERO_SHOT_TAP]))
        features = extract_features(examples, self._backbone, read, store=self._store, progress=False)
        start = None
        if zero_shot is not None:
            start = log_odds(zero_shot.probabilities_of(features[:, read.index(ZERO_SHOT_TAP)])[:, 1])
        own = np.ascontiguousarray(features[:, : len(self.taps)])
        return Part(own, labels, groups_of(examples), start)

    def _zero_shot(self) -> Classifier | None:
        try:
            self._backbone.check_taps([ZERO_SHOT_TAP])
            return Classifier.zero_shot(self._backbone)
        except (CheckpointError, ConfigError):  # of a backbone without a language head
            return None

    def judged(self, head: LiveHead) -> Float:
        """Return the margins of the dev rows."""
        return head.margins_of(self.dev.features[:, self.taps.index(head.tap)], self.dev.start)

    def goal(self) -> Goal:
        """Train on all labels of the pool, and measure on dev."""
        rows = np.arange(len(self.train.labels))
        head = fit_live_head(self.pool, rows, self.train.labels, start=self.train.start)
        assert head is not None  # both classes have labels
        margins, (labels, groups) = self.judged(head), (self.dev.labels, self.dev.groups)
        draws = [auroc(margins, labels, line) for weights in resampled(groups, _RESAMPLES, seed=0) for line in weights]
        start = 0.5 if self.dev.start is None else _auroc(self.dev.start, labels)
        return Goal(start, (_auroc(margins, labels), *bounds(np.array(draws))))

    def label(self, order: Order, seed: int, goal: Goal, *, random_share: float) -> dict[str, Any]:
        """Label rows in an order until the goal is reached, and return what was measured on the way, ready for JSON.

        Rows at random are the loop with a random share of 1. What is measured on dev is a head that was searched and
        fitted anew with exactly the labels so far, in both orders alike. The live estimate is that of the same head.

        Args:
            order: How rows are chosen.
            seed: Of the random share and the folds.
            goal: What is to be reached.
            random_share: Of the loop.
        """
        labels, start, groups = self.train.labels, self.train.start, self.train.groups
        share = random_share if order == "loop" else 1.0
        chooser = Chooser(self.pool, random_share=share, seed=seed)
        passed = np.zeros(len(labels), dtype=np.bool_)
        counts: dict[str, int] = {}
        rows: list[int] = []
        head: LiveHead | None = None
        points = [{"labels": 0, "auroc": goal.start}]
        seconds: list[float] = []
        most = len(labels) if goal.exists else min(len(labels), WITHOUT_GOAL)
        measured = set(counts_to_measure(most))
        fitted = 0
        while len(rows) < most and not _reached(points, goal):
            began = time.process_time()
            choice = chooser.choose(passed, counts, heads=[head], start=start)[0]
            rows.append(choice.row)
            passed[choice.row] = True
            counts[choice.source] = counts.get(choice.source, 0) + 1
            if order == "loop" and len(rows) >= _GROWTH * fitted:
                head = fit_live_head(self.pool, rows, labels[rows], start=start, before=head, seed=seed)
                fitted = len(rows)
                seconds.append(time.process_time() - began)
            if len(rows) in measured:
                found = fit_live_head(self.pool, rows, labels[rows], start=start, seed=seed)
                points.append({"labels": len(rows), **self._measure(found, chooser.random.counted(passed), groups)})
        return {
            "set": self.name,
            "order": order,
            "seed": seed,
            "rows": len(labels),
            "goal": asdict(goal),
            "points": points,
            "seconds": seconds,
            "questions": counts,
            **circumstances(),
        }

    def _measure(self, head: LiveHead | None, counted: npt.NDArray[np.bool_], groups: Any) -> dict[str, Any]:
        if head is None:
            return {"auroc": 0.5}
        margins = self.judged(head)
        right = (margins >= 0) == (self.dev.labels == 1)
        estimate = live_estimate(head, counted, groups)
        return {
            "auroc": _auroc(margins, self.dev.labels),
            "accuracy": float(right.mean()),
            "tap": str(head.tap),
            "kind": head.kind,
            "estimate": {"accuracy": estimate.accuracy, "auroc": estimate.auroc},
        }


def counts_to_measure(most: int) -> list[int]:
    """Return the numbers of labels at which a run is measured: steps of ten, and of about 15 % later."""
    counts, count = [], 10
    while count < most:
        counts.append(count)
        count += max(10, round(0.015 * count) * 10)
    return [*counts, most]


def needed(record: dict[str, Any]) -> int | None:
    """Return the number of labels from which a run has reached its goal; `None` where it has not."""
    goal, points = Goal(**record["goal"]), record["points"]
    for number in range(len(points)):
        if _reached(points[: number + HELD], goal):
            return int(points[number]["labels"])
    return None


def _reached(points: Sequence[dict[str, Any]], goal: Goal) -> bool:
    """Tell whether the last measurements reach the goal."""
    return goal.exists and all(point["auroc"] >= goal.target for point in points[-HELD:])


def _auroc(margins: Float, labels: npt.NDArray[np.int64]) -> float:
    return auroc(margins, labels, np.ones(len(labels)))


class RunFolder:
    """A folder of what is done: one JSON file for each run.

    Args:
        folder: Made if missing.
        settings: What all runs share; runs that were made with others are done again.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        self._settings = settings
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, order: Order, seed: int) -> dict[str, Any] | None:
        """Return what is kept of a run, or `None` if it is not done."""
        path = self._path(name, order, seed)
        if not path.exists():
            return None
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept if kept.pop("settings", None) == self._settings else None

    def add(self, record: dict[str, Any]) -> None:
        """Keep the record of a run."""
        path = self._path(record["set"], record["order"], record["seed"])
        write_file(path, json.dumps({"settings": self._settings, **record}))

    def _path(self, name: str, order: Order, seed: int) -> Path:
        return self._folder / f"{name}-{order}-{seed}.json"
