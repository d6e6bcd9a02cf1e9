"""Make a classifier of the answers, and a report that is honest about it, while the page still answers."""

from __future__ import annotations

import logging
import shlex
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.classifier.artifact import check_replaceable, read_manifest
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.classifier.panel_folder import is_panel, read_panel
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import PLAIN_NAMES
from qwen_vl_classifier.errors import ArtifactError, QwenVLClassifierError, one_line
from qwen_vl_classifier.evaluation.evaluation import evaluate
from qwen_vl_classifier.evaluation.panels.panel_evaluation import evaluate_panel
from qwen_vl_classifier.evaluation.report import write_report
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.bounded import read_file
from qwen_vl_classifier.labelling.answers.labelled_rows import SAMPLED
from qwen_vl_classifier.labelling.asking import PLAIN_LABEL, LabelSpec
from qwen_vl_classifier.training.probe.panel_training import train_panel
from qwen_vl_classifier.training.probe.probe import train
from qwen_vl_classifier.training.probe.random_rows import RANDOM
from qwen_vl_classifier.training.splitting import groups_of

FEWEST_MEASURED = 20
"""Rows drawn at random that a report needs."""

_LABELLED = "labelled"  # in a training record: the data set that the classifier was made from
_MEASURED_SHARE = 0.5  # of the rows drawn at random, for the report
_MOST_REPORT = 256 << 20  # bytes
_TWIN = (
    "Measured on a twin: a classifier that was trained in the same way without these rows, which were drawn at random. "
    "The saved classifier has learned from these rows too, so it cannot be measured on them. It had more rows, and "
    "should be a little better than this report says."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `Finishing` has made.

    Attributes:
        classifier: The folder of the classifier.
        report: The page of its report, or `None`.
        summary: What training found, for a terminal.
        without: Why there is no report; empty where there is one.
    """

    classifier: Path
    report: Path | None
    summary: str
    without: str


class Finishing:
    """Trains on answers in a thread of its own, once after another.

    The classifier is saved beside the data set as `STEM-classifier`, which replaces only what was made from the same
    data set, and the report as `STEM-report`.

    Args:
        backbone: What reads the rows.
        labels: What was asked.
        one_of: Whether each row has exactly one of the labels.
        out: The data set.
        store: Where features are kept, if anywhere.
        config: How to train; by default the full search.
        train_command: How to train on the data set again, for the page.
    """

    def __init__(
        self,
        backbone: Backbone,
        labels: Sequence[LabelSpec],
        *,
        one_of: bool,
        out: Path,
        store: FeatureStore | None,
        config: TrainConfig | None = None,
        train_command: str = "",
    ) -> None:
        self._backbone, self._labels, self._one_of = backbone, tuple(labels), one_of
        self._out, self._store = out, store
        self._config = replace(config or TrainConfig(), sampled_column=SAMPLED)
        self._train_command = train_command
        self.folder = out.with_name(f"{out.stem}-classifier")
        self.report_folder = out.with_name(f"{out.stem}-report")
        self._is_plain = not one_of and [label.name for label in labels] == [PLAIN_LABEL]
        self._thread: threading.Thread | None = None
        self._state, self._message = "no", ""
        self.outcome: Outcome | None = None
        """What was made last, or `None`."""

    @property
    def is_running(self) -> bool:
        """Whether it is training."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, labelled: Sequence[Example]) -> None:
        """Begin to train on labelled rows, unless training goes on already."""
        if self.is_running:
            return
        self._state, self._message = "running", f"Training on {len(labelled):,} rows"
        self._thread = threading.Thread(target=self._run, args=(list(labelled),), name="finishing", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when training is over."""
        if self._thread is not None:
            self._thread.join()

    def state(self) -> dict[str, Any]:
        """Describe it for the page."""
        done = self.outcome if self._state == "done" else None
        return {
            "state": self._state,
            "message": self._message,
            "classifier": None if done is None else str(done.classifier),
            "report": done is not None and done.report is not None,
            "command": None if done is None else shlex.join(["qwen-vl-classifier", "serve", str(done.classifier)]),
            "train": self._train_command,
        }

    def report(self) -> str | None:
        """Return the page of the report, once there is one."""
        done = self.outcome
        if done is None or done.report is None:
            return None
        try:
            return read_file(done.report, most=_MOST_REPORT).decode("utf-8", "replace")
        except OSError:
            return None

    def _run(self, labelled: list[Example]) -> None:
        try:
            self.outcome = self._finish(labelled)
        except QwenVLClassifierError as error:
            self._state, self._message = "failed", one_line(error)
        except Exception as error:
            _log.exception("training failed")
            reason = one_line(f"{type(error).__name__}: {error}", 200)
            self._state, self._message = "failed", f"training failed ({reason}); the terminal has more"
        else:
            self._state, self._message = "done", self.outcome.without

    def _finish(self, labelled: list[Example]) -> Outcome:
        self._check_ours()
        classifier, summary = self._train(labelled)
        classifier.training[_LABELLED] = self._out.name
        classifier.save(self.folder)
        parts = twin_parts(labelled, self._values(labelled), seed=self._config.seed)
        if isinstance(parts, str):
            return Outcome(self.folder, None, summary, parts)
        rest, held_out = ([labelled[row] for row in rows] for rows in parts)
        self._message = f"The classifier is saved. Training a twin without {len(held_out):,} rows, to measure it"
        twin, _ = self._train(rest)
        self._message = f"Measuring the twin on {len(held_out):,} rows"
        page = self._report(twin, held_out, rest)
        return Outcome(self.folder, page, summary, "")

    def _train(self, rows: list[Example]) -> tuple[Classifier | Panel, str]:
        """Train on rows; return what came of it, and what is to be said of it."""
        how: dict[str, Any] = {"backbone": self._backbone, "config": self._config, "store": self._store}
        if self._is_plain:
            label, *_ = self._labels
            names = None if (label.no, label.yes) == PLAIN_NAMES else (label.no, label.yes)
            found = train(rows, label_names=names, progress=False, **how)
            return found.classifier, str(found)
        labels = None if self._one_of else [label.name for label in self._labels]  # of classes, those that were given
        several = train_panel(rows, labels=labels, one_of=self._one_of, progress=False, **how)
        return several.panel, str(several)

    def _report(self, twin: Classifier | Panel, held_out: list[Example], rest: list[Example]) -> Path:
        if isinstance(twin, Panel):
            evaluation: dict[str, Any] = evaluate_panel(twin, held_out, store=self._store)
            evaluation["measured"]["panel"] = f"twin of {self.folder.name}"
        else:
            evaluation = evaluate(twin, held_out, training=rest, store=self._store)
            evaluation["measured"]["classifier"] = f"twin of {self.folder.name}"
        evaluation["measured"]["data"] = str(self._out)
        evaluation["notes"].insert(0, _TWIN)
        return write_report(evaluation, self.report_folder, examples=held_out)

    def _values(self, labelled: Sequence[Example]) -> list[dict[str, Any]]:
        """Return for each row its label by name, for each label that it has."""
        if self._is_plain:
            return [{PLAIN_LABEL: row.label} for row in labelled]
        if self._one_of:
            return [{PLAIN_LABEL: row.fields[PLAIN_LABEL]} for row in labelled]
        names = [label.name for label in self._labels]
        return [{name: row.fields[name] for name in names if row.fields.get(name) is not None} for row in labelled]

    def _check_ours(self) -> None:
        """Refuse to replace what was not made from this data set.

        Raises:
            ArtifactError: It was not.
        """
        check_replaceable(self.folder, panel=not self._is_plain)
        if not self.folder.exists():
            return
        read = read_panel if is_panel(self.folder) else read_manifest
        try:
            made_from = read(self.folder).training.get(_LABELLED)
        except ArtifactError:
            made_from = None
        if made_from != self._out.name:
            raise ArtifactError(
                f"{self.folder}: was not made from {self._out.name}, and is not replaced; move it away and finish again"
            )


def twin_parts(
    labelled: Sequence[Example], values: Sequence[dict[str, Any]], *, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | str:
    """Choose rows to measure a twin on, and rows to train it on: whole in groups.

    Half of the rows that were drawn at random are held out, and 20 at least. Rows that were chosen and share a group
    with one of them are in neither part.

    Args:
        labelled: The rows.
        values: For each row its labels by name, for those that it has.
        seed: Of the choice.

    Returns:
        The numbers of the rows to train on and of those to measure on; or why there are no such parts, in a sentence.
    """
    at_random = np.array([row.fields.get(SAMPLED) == RANDOM for row in labelled], dtype=np.bool_)
    needed = f"A report needs {FEWEST_MEASURED} rows drawn at random, with every class among them"
    groups = groups_of(labelled)
    most = max(FEWEST_MEASURED, round(_MEASURED_SHARE * int(at_random.sum())))
    order = np.random.default_rng(seed).permutation(np.unique(groups[at_random]))
    sizes = np.array([int((at_random & (groups == group)).sum()) for group in order])
    held_groups = order[: int(np.searchsorted(np.cumsum(sizes), most)) + 1]
    inside = np.isin(groups, held_groups)
    held_out, rest = np.flatnonzero(inside & at_random), np.flatnonzero(~inside)
    if len(held_out) < FEWEST_MEASURED:
        return f"No report yet. {needed}; so far there are {int(at_random.sum()):,} such rows."
    for rows, what in ((held_out, "measure on"), (rest, "train a twin on")):
        found = _classes(values[int(row)] for row in rows)
        for name, classes in _classes(values).items():
            lacking = sorted(map(str, classes - found.get(name, set())))
            if lacking:
                return f"No report yet. {needed}; the rows to {what} lack the class {lacking[0]!r}."
    return rest, held_out


def _classes(values: Iterable[dict[str, Any]]) -> dict[str, set[Any]]:
    """Return which classes of each label occur."""
    found: dict[str, set[Any]] = {}
    for row in values:
        for name, value in row.items():
            found.setdefault(name, set()).add(value)
    return found
