"""Train several labels, or one of several classes, on features that were read once for all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.backbone import Backbone, as_backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.calibration import fit_one_of_temperature
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.classifier.panel_folder import names_problem
from qwen_vl_classifier.classifier.probabilities import Float, one_of_probabilities
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.bad_rows import BadRows, Examples
from qwen_vl_classifier.data.example import Example, shared_text
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.data.targets import MISSING, check_label_columns, class_words, label_matrix
from qwen_vl_classifier.errors import ConfigError, DataError, TrainingError, first_of, shown
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.progress_bars import tqdm
from qwen_vl_classifier.training.probe.label_training import LabelRows, LearnedLabel, Setup, learn_label
from qwen_vl_classifier.training.probe.one_of_fit import ClassRows, cross_fitted, one_of_estimate
from qwen_vl_classifier.training.probe.panel_result import PanelTrainResult
from qwen_vl_classifier.training.probe.random_rows import FEWEST_GROUPS, random_rows
from qwen_vl_classifier.training.probe.read_rows import ReadRows, RowReader, bad_rows
from qwen_vl_classifier.training.splitting import RowNumbers, check_grouping, grouping_of
from qwen_vl_classifier.training.weighting import row_weights

_FEWEST_ROWS = 2  # of each class of a label: one to train on, and one held out
_BOTH = (0, 1)

Matrix = npt.NDArray[np.int64]


def train_panel(
    rows: Source,
    validation: Source | None = None,
    *,
    labels: Sequence[str] | None = None,
    one_of: bool = False,
    backbone: Backbone | str | os.PathLike[str],
    config: TrainConfig | None = None,
    store: FeatureStore | None = None,
    label_column: str = "label",
    keep_taps: Sequence[Tap] = (),
    progress: bool = True,
) -> PanelTrainResult:
    """Train a classifier for each of several labels, on features that are read once for all of them.

    Each label is learned as `train` learns it from the rows that have a value of it: with a tap, head, calibration,
    threshold and estimate of its own. With `one_of` every row has exactly one of the labels: the classifiers of each
    class against the rest then share a temperature, fitted on their out-of-fold answers, and their probabilities sum
    to 1.

    Args:
        rows: Anything that `load_examples` takes, read with `read_labels=False` or `one_of=True`: the labels are in the
            columns of their names, in `Example.fields`. A cell is 0, 1, a truth value, no or yes; an empty one is a
            missing label. Rows without any label are not used.
        validation: Rows with labels that do not influence the choice, as in `train`.
        labels: Names of the labels, and of their columns. `None`, with `one_of`: the classes are the words in the label
            column.
        one_of: Whether a row has exactly one of the labels.
        backbone: What reads the features, or its name, as `Backbone.load` takes it; it is not changed.
        config: Options, for every label alike.
        store: Where features are kept, if anywhere.
        label_column: Column of the class's name, where `labels` is `None`.
        keep_taps: As in `train`.
        progress: Show progress bars on what takes more than two seconds.

    Raises:
        ConfigError: No labels, impossible names, a tap that the backbone does not have, or `target_error_rate` with
            `one_of`.
        DataError: A column is missing, cells that are no labels, or a label with too few rows of a class: the message
            names all of these. No panel is trained without them, since what reads it expects every label.
        TrainingError: A head reached no finite loss, or an objective or error rate is out of reach.

    Example:
        >>> result = train_panel("parts.csv", labels=["scratch", "dirty"], backbone="builtin:tiny")  # doctest: +SKIP
        >>> result.panel.save("parts")  # doctest: +SKIP
    """
    config = config or TrainConfig()
    _check_options(labels, one_of, config)
    examples = as_examples(rows, read_labels=False, max_errors=config.max_errors)
    if labels is None:
        names = tuple(class_words(examples, label_column))
    else:
        names = tuple(labels)
        check_label_columns(examples, names)
    if problem := names_problem(names):
        raise ConfigError(f"{problem}; rename it in the data" if labels is None else f"{spelled('labels')}: {problem}")
    given = _Given.of(examples, names, config, "training", one_of=one_of, label_column=label_column)
    _check_counts(names, given.labels, one_of)
    check_grouping(given.examples, config.group_by)
    given_apart = None
    if validation is not None:
        apart = as_examples(validation, read_labels=False, max_errors=config.max_errors)
        given_apart = _Given.of(apart, names, config, "validation", one_of=one_of, label_column=label_column)
    backbone = as_backbone(backbone)
    setup = Setup.of(backbone, config, keep_taps=keep_taps, progress=progress)
    reader = RowReader(backbone, setup.read, config, store, progress)
    for part in filter(None, (given, given_apart)):
        reader.check(part.examples, part.bad)
    read = _Labelled.of(given, reader)
    held_out = None if given_apart is None else _Labelled.of(given_apart, reader)
    _check_counts(names, read.labels, one_of)

    alone = replace(setup, progress=False)  # one bar for all labels
    learned: dict[str, LearnedLabel] = {}
    for column, name in enumerate(tqdm(names, desc="labels", unit="label", delay=2, disable=not progress)):
        with _naming(name):
            learned[name] = learn_label(
                read.label(column),
                None if held_out is None else held_out.label(column),
                alone,
                label_names=(f"not {name}", name),
            )
    notes = [*given.notes, *(given_apart.notes if given_apart else ())]
    record: dict[str, Any] = {
        "method": "probe",
        "training_rows": len(read.rows.examples),
        "held_out_rows": len(held_out.rows.examples) if held_out else 0,
        "notes": notes,
    }
    if text := shared_text(read.rows.examples):
        record["text"] = text
    left_out = [*read.rows.left_out, *(held_out.rows.left_out if held_out else ())]
    if left_out:
        record["left_out"] = [bad.to_json(total) for bad, total in left_out]
    classifiers = [one.result.classifier for one in learned.values()]
    temperature = 1.0
    if one_of:
        if config.objective != TrainConfig().objective:
            notes.append(
                f"{spelled('objective', config.objective)} sets the threshold of each class against the rest; the "
                "panel chooses the likeliest class whatever it is"
            )
        temperature, record["one_of"] = _one_of(read, held_out, list(learned.values()), names, config)
    panel = Panel(classifiers, names=names, one_of=one_of, temperature=temperature, training=record)
    return PanelTrainResult(panel, {name: one.result for name, one in learned.items()})


def _check_options(labels: Sequence[str] | None, one_of: bool, config: TrainConfig) -> None:
    if labels is None and not one_of:
        raise ConfigError(
            f"no labels: give the columns of the labels with {spelled('labels')}, or {spelled('one_of', True)} where "
            "the label column names one of several classes"
        )
    if isinstance(labels, str):
        raise ConfigError(f"labels is the text {shown(labels)}; expected a list of names, such as [{shown(labels)}]")
    if one_of and labels is not None and len(labels) == 1:
        raise ConfigError(
            f"{spelled('one_of', True)} with the one label {shown(labels[0])}; expected at least two to choose from"
        )
    if one_of and config.target_error_rate:
        raise ConfigError(
            f"{spelled('target_error_rate', config.target_error_rate)} with {spelled('one_of', True)}: a choice of one "
            "of several classes never abstains; leave one of them out"
        )


@dataclass(frozen=True, slots=True)
class _Given:
    """Rows of a data set that have any label, before anything of them is read.

    Attributes:
        examples: The rows; rows that cannot be used are among them.
        labels: Shape (n, labels).
        bad: The rows that cannot be used.
        notes: On rows without any label.
    """

    examples: Sequence[Example]
    labels: Matrix
    bad: BadRows
    notes: list[str]

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        names: Sequence[str],
        config: TrainConfig,
        what: str,
        *,
        one_of: bool,
        label_column: str,
    ) -> _Given:
        """Read the labels, and leave out rows without any."""
        unreadable = BadRows()
        labels = label_matrix(examples, names, one_of=one_of, label_column=label_column, bad=unreadable)
        errors = {row.position: row.error for row in unreadable}
        kept = [row for row in range(len(examples)) if row in errors or (labels[row] != MISSING).any()]
        if not kept:
            raise DataError(f"none of the {len(examples):,} {what} rows has a label; label some of them")
        unread = examples.unread if isinstance(examples, Examples) else ()
        chosen = Examples(
            (
                examples[row] if examples[row].origin else replace(examples[row], origin=f"row {row + 1}")
                for row in kept
            ),
            unread,
        )
        bad = bad_rows(config, chosen, what)
        for position, row in enumerate(kept):
            if row in errors:
                bad.add(position, chosen[position], errors[row])
        bad.check(len(chosen))
        without = len(examples) - len(kept)
        notes = [f"{without:,} of {len(examples):,} {what} rows have no label and are not used"] if without else []
        return cls(chosen, labels[kept], bad, notes)


@dataclass(frozen=True, slots=True)
class _Labelled:
    """Rows that were read, with their labels.

    Attributes:
        rows: The rows that can be used.
        labels: Shape (n, labels).
    """

    rows: ReadRows
    labels: Matrix

    @classmethod
    def of(cls, given: _Given, reader: RowReader) -> _Labelled:
        """Read the features of all rows that can be used."""
        rows = reader.read(given.examples, given.bad)
        kept = [row for row in range(len(given.examples)) if row not in given.bad]
        return cls(rows, given.labels[kept])

    def label(self, column: int) -> LabelRows:
        """Return the rows that have a value of a label."""
        rows = np.flatnonzero(self.labels[:, column] != MISSING)
        return LabelRows(self.rows, rows, self.labels[rows, column].astype(np.float64))


def _check_counts(names: Sequence[str], labels: Matrix, one_of: bool) -> None:
    """Refuse labels of which a class has too few rows, all of them in one error.

    Raises:
        DataError: There are some.
    """
    counts = np.stack([(labels == value).sum(axis=0) for value in _BOTH], axis=1)
    few = [
        f"{shown(name)} ({ones:,} yes, {zeros:,} no)"
        for name, (zeros, ones) in zip(names, counts.tolist(), strict=True)
        if min(zeros, ones) < _FEWEST_ROWS
    ]
    if few:
        advice = "leave out the rows of this class" if one_of else f"take it out of {spelled('labels')}"
        raise DataError(
            f"too few rows to learn {first_of(few)}; expected at least {_FEWEST_ROWS} of each answer; label more rows, "
            f"or {advice}"
        )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the label in errors of its training."""
    try:
        yield
    except (DataError, TrainingError) as error:
        raise type(error)(f"label {shown(name)}: {error}") from error


def _one_of(
    read: _Labelled,
    held_out: _Labelled | None,
    learned: Sequence[LearnedLabel],
    names: Sequence[str],
    config: TrainConfig,
) -> tuple[float, dict[str, Any]]:
    """Fit the temperature on out-of-fold answers, and estimate what the choice among the classes reaches.

    Returns:
        The temperature, and the record: `temperature`, `rows` that it was fitted on, `log_loss_before` and
        `log_loss_after` of them, and `estimate`.
    """
    scores = np.full(read.labels.shape, np.nan)
    for column, one in enumerate(learned):
        scores[one.rows, column] = one.scores
    rows = np.flatnonzero((read.labels == 1).any(axis=1) & np.isfinite(scores).all(axis=1))
    if not len(rows):
        raise DataError(
            "no row has a value of every label; expected rows of which it is known which one of the classes they have"
        )
    out_of_fold = _class_rows(scores[rows], read, rows, config)
    temperature = fit_one_of_temperature(out_of_fold.shares, out_of_fold.classes, weights=out_of_fold.weights)
    measured = cross_fitted(out_of_fold, config.seed)
    record: dict[str, Any] = {
        "temperature": temperature,
        "rows": len(rows),
        "log_loss_before": replace(out_of_fold, shares=one_of_probabilities(out_of_fold.shares)).log_loss,
        "log_loss_after": measured.log_loss,
    }
    if held_out is not None:
        known = np.flatnonzero((held_out.labels == 1).any(axis=1))
        if not len(known):
            raise DataError("no validation row has one of the classes; expected the class of each row")
        classifiers = [one.result.classifier for one in learned]
        own = np.stack([one.probabilities_of(held_out.rows.at(one.tap, known))[:, 1] for one in classifiers], axis=1)
        measured = _class_rows(one_of_probabilities(own, temperature), held_out, known, config)
        measured = measured.take(np.flatnonzero(measured.weights))
    else:
        at_random = random_rows(read.rows.some(rows), config.sampled_column)
        if at_random is not None and len(np.unique(measured.groups[at_random])) >= FEWEST_GROUPS:
            measured = measured.take(np.flatnonzero(at_random))
    record["estimate"] = one_of_estimate(measured, names, held_out=held_out is not None, seed=config.seed)
    return temperature, record


def _class_rows(shares: Float, given: _Labelled, rows: RowNumbers, config: TrainConfig) -> ClassRows:
    """Return rows with their classes; weights of classes do not count: they say what errors cost, not what is there."""
    classes, examples = given.labels[rows].argmax(axis=1), given.rows.some(rows)
    groups, _ = grouping_of(examples, config.group_by)
    return ClassRows(
        shares, classes, row_weights(examples, classes.astype(np.float64), column=config.weight_column), groups
    )
