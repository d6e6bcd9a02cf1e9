"""Evaluate a panel on labelled rows: every label, their means, and where a row has one of several classes, these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.data.targets import MISSING, label_matrix
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.evaluation.checks import CHECKS, Altered, plan_checks
from qwen_vl_classifier.evaluation.curves import reliability
from qwen_vl_classifier.evaluation.data_checks import label_issues, trained_on
from qwen_vl_classifier.evaluation.evaluation import describe, measured, picture_name, telling_rows
from qwen_vl_classifier.evaluation.metrics import Labels, Probabilities
from qwen_vl_classifier.evaluation.panels.class_figures import ClassMeasure, class_figures
from qwen_vl_classifier.evaluation.panels.label_figures import measure_labels
from qwen_vl_classifier.evaluation.panels.panel_checks import judge_panel_checks
from qwen_vl_classifier.evaluation.panels.panel_verdict import panel_notes, panel_sentence
from qwen_vl_classifier.evaluation.report.pictures import SMALL_SIDE
from qwen_vl_classifier.evaluation.scoring_pass import Scorer, ThumbnailKeeper, score_once
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.html_pieces import page_frame
from qwen_vl_classifier.training.overlap import row_hashes
from qwen_vl_classifier.training.splitting import check_grouping, groups_of

PANEL_EVALUATION_VERSION = 1

NAMED_ROWS = 12
"""Rows of each kind that an evaluation names of a label."""

_SHARED_FACTS = ("backbone", "family", "fingerprint")


class PanelEvaluation(dict[str, Any]):
    """A plain dictionary that can be written as JSON; beside it, what a report shows of the pictures.

    Attributes:
        thumbnails: For each row that a report may show, small pictures, so that none is opened again for it.
    """

    thumbnails: Mapping[int, Sequence[dict[str, Any]]] = MappingProxyType({})

    def __repr__(self) -> str:
        """Summarise it in one line; `dict(evaluation)` shows all of it."""
        if not self:
            return "<PanelEvaluation: empty>"
        return f"<PanelEvaluation of {self['rows']['total']:,} rows: {self['sentence']}>"

    def _repr_html_(self) -> str:
        """Return the report in a frame, for notebooks."""
        from qwen_vl_classifier.evaluation.report import render_report  # nothing else here needs templates

        return page_frame(render_report(self), f"Report: {self['sentence']}")


def evaluate_panel(
    panel: Panel,
    examples: Source,
    *,
    config: EvaluateConfig | None = None,
    label_column: str = "label",
    store: FeatureStore | None = None,
    progress: bool = False,
) -> PanelEvaluation:
    """Evaluate all labels of a panel in one pass over the rows; each picture is opened once.

    A label is measured on the rows that have a value of it. Means over labels (macro figures) weigh every label alike;
    their intervals come from resamples in which all labels have the same rows.

    Args:
        panel: What to evaluate.
        examples: Rows with a column for each label: anything that `load_examples` takes; empty cells are labels that
            are not known. Where a row has exactly one of several classes, `label_column` may name it instead.
        config: Options: checks, resamples, groups and how many rows may be left out. There are no slices.
        label_column: The column that names the class, where a row has exactly one of several.
        store: Where features are kept, if anywhere.
        progress: Show a progress bar.

    Returns:
        `panel_evaluation_version` and what `docs/reference/files.md` describes key by key.

    Raises:
        ConfigError: An option is out of its range, or columns to slice by.
        DataError: No examples, labels that cannot be read, or no row with a label.
        ImageError: More pictures cannot be opened than `config.max_errors` allows; the message lists the rows.
    """
    config = config or EvaluateConfig()
    if config.slice_columns:
        raise ConfigError(
            f"{spelled('slice_by', config.slice_by)} with a panel; slices are for one classifier; leave it out, or "
            "evaluate the classifier of one label"
        )
    about = measured(examples)
    examples = as_examples(examples, read_labels=False, max_errors=config.max_errors)
    given, bad = len(examples), BadRows(config.max_errors, can_leave_out=True, given=examples)
    labels = label_matrix(examples, panel.names, one_of=panel.one_of, label_column=label_column, bad=bad)
    check_grouping(examples, config.group_by)
    sizes = read_sizes(examples, bad, progress=progress)
    bad.check(given)
    planned: dict[str, Altered | str] = dict.fromkeys(CHECKS, "switched off")
    if config.checks:
        usable = np.array([row for row in range(given) if row not in bad and (labels[row] != MISSING).any()], dtype=int)
        planned = plan_checks(examples, sizes, usable, most_rows=config.check_rows, seed=config.seed)
    keeper = ThumbnailKeeper(SMALL_SIDE)
    scored = score_once(Scorer.of(panel), examples, planned, bad, thumbnails=keeper, store=store, progress=progress)
    bad.check(given)
    good = np.array([row not in bad for row in range(given)])
    examples, labels, probabilities = bad.without(examples), labels[good], scored.own[good]
    groups = groups_of(examples, config.group_by)
    if not (labels != MISSING).any():
        raise DataError("no row that can be used has a label; expected rows with values of the labels")
    checks = judge_panel_checks(
        planned,
        scored.altered,
        labels,
        probabilities,
        groups,
        panel.names,
        positions=np.where(good, np.cumsum(good) - 1, -1),
    )
    figures = panel_figures(
        panel.names,
        labels,
        probabilities,
        groups,
        thresholds=None if panel.one_of else [classifier.threshold for classifier in panel.classifiers],
        resamples=config.resamples,
        seed=config.seed,
        progress=progress,
    )
    evaluation = PanelEvaluation()
    evaluation |= {
        "panel_evaluation_version": PANEL_EVALUATION_VERSION,
        "sentence": "",
        "notes": [],
        "measured": {"panel": None} | about,
        "rows": _row_counts(examples, labels, groups),
        **figures,
        "checks": checks,
        "trained_on": _seen(panel, examples),
        "panel": describe_panel(panel),
        "predictions": _predictions(panel, examples, labels, probabilities, groups),
    }
    evaluation["sentence"] = panel_sentence(evaluation)
    evaluation["notes"] = panel_notes(evaluation)
    if config.group_by != "image":
        evaluation["notes"].append(f"intervals draw rows together by {config.group_by}")
    if bad:
        evaluation["notes"].append(bad.note(given))
        evaluation["left_out"] = bad.to_json(given)
    made = {row: keeper.of(examples[row]) for row in sorted(named_rows(evaluation))}
    evaluation.thumbnails = {row: pictures for row, pictures in made.items() if pictures is not None}
    return evaluation


def describe_panel(panel: Panel) -> dict[str, Any]:
    """Describe what a panel is made of: its backbone, and what decides about each label."""
    each = [describe(classifier) for classifier in panel.classifiers]
    return {
        **{name: each[0][name] for name in _SHARED_FACTS},
        "one_of": panel.one_of,
        "temperature": panel.temperature,
        "labels": [
            {"name": name} | {key: value for key, value in facts.items() if key not in _SHARED_FACTS}
            for name, facts in zip(panel.names, each, strict=True)
        ],
    }


def named_rows(evaluation: Mapping[str, Any]) -> set[int]:
    """Return the numbers of the rows that an evaluation names, of which a report may show pictures."""
    rows = {row for label in evaluation["labels"] for rows in label["examples"].values() for row in rows}
    pairs: Iterable[Mapping[str, Any]] = evaluation["one_of"]["confused"] if evaluation["one_of"] else ()
    return rows.union(*(pair["rows"] for pair in pairs))


def panel_figures(
    names: Sequence[str],
    labels: Labels,
    probabilities: Probabilities,
    groups: npt.NDArray[np.int64],
    *,
    thresholds: Sequence[float] | None,
    resamples: int,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure labels, their means, and where a row has one of several classes, these.

    Args:
        names: Of the labels.
        labels: Shape (n, labels): 0, 1 or `MISSING`.
        probabilities: Shape (n, labels); of classes, each line sums to 1.
        groups: Shape (n,), numbers of groups.
        thresholds: Of each label; `None` where a row has one of several classes, and the likeliest is the answer.
        resamples: How many.
        seed: Of the resamples.
        progress: Show a progress bar if it takes more than two seconds.

    Returns:
        `one_of`, `macro`, `micro_accuracy`, `exact_match` and `labels` of an evaluation.

    Raises:
        DataError: No row says which class it is of.
    """
    answered = None
    of_classes = None
    if thresholds is None:
        answered = probabilities.argmax(axis=1)[:, None] == np.arange(len(names))
        classes = np.where((labels == 1).any(axis=1), labels.argmax(axis=1), MISSING)
        if not (classes != MISSING).any():
            raise DataError("no row says which class it is of; expected rows with a class")
        of_classes = ClassMeasure(classes, probabilities)
    cuts = thresholds or [0.5] * len(names)
    made = measure_labels(
        labels,
        probabilities,
        cuts,
        groups,
        answered=answered,
        further=[of_classes] if of_classes else [],
        resamples=resamples,
        seed=seed,
        progress=progress,
    )
    one_of = None
    if of_classes:
        macro = made.macro["metrics"]
        one_of = class_figures(of_classes, made.draws[0], names, groups, rows=len(labels), macro=macro)
    entries = []
    for column, (name, entry) in enumerate(zip(names, made.labels, strict=True)):
        rows = np.flatnonzero(labels[:, column] != MISSING)
        own, likely = labels[rows, column], probabilities[rows, column]
        answers = likely >= cuts[column] if answered is None else answered[rows, column]
        entries.append(
            {"name": name}
            | entry
            | {
                "threshold": thresholds[column] if thresholds else None,
                "reliability": reliability(own, likely) if len(rows) else None,
                "examples": _examples(rows, own, likely, answers, cuts[column], entry["skill"]),
            }
        )
    return {"one_of": one_of, "macro": made.macro, **made.shares, "labels": entries}


def _examples(
    rows: npt.NDArray[np.int64],
    labels: Labels,
    probabilities: Probabilities,
    answers: npt.NDArray[np.bool_],
    threshold: float,
    skill: str | None,
) -> dict[str, list[int]]:
    """Name rows that are worth a look: mistakes, the surest first, doubtful rows, and labels that may be wrong."""
    if not len(rows):
        return {"wrong": [], "uncertain": [], "mislabelled": []}
    wrong = np.flatnonzero(answers != (labels == 1))
    surest = wrong[np.argsort(-np.abs(probabilities - labels)[wrong], kind="stable")]
    issues = label_issues(labels, probabilities, beats_guessing=skill != "none")["shown"]
    found: dict[str, list[int]] = {
        "wrong": surest.tolist(),
        "uncertain": telling_rows(labels, probabilities, threshold)["uncertain"],
        "mislabelled": [issue["row"] for issue in issues],
    }
    return {kind: [int(rows[place]) for place in some[:NAMED_ROWS]] for kind, some in found.items()}


def _row_counts(examples: Sequence[Example], labels: Labels, groups: npt.NDArray[np.int64]) -> dict[str, int]:
    known = labels != MISSING
    return {
        "total": len(examples),
        "groups": int(groups.max()) + 1,
        "with_picture": sum(bool(example.images) for example in examples),
        "complete": int(known.all(axis=1).sum()),
        "unlabelled": int((~known.any(axis=1)).sum()),
    }


def _seen(panel: Panel, examples: Sequence[Example]) -> dict[str, Any]:
    """Find rows that the panel was trained on, by the record of the label that tells most."""
    hashes = row_hashes(examples)
    found = [trained_on(hashes, classifier.training) for classifier in panel.classifiers]
    return max(found, key=lambda one: (one["known"], one["total"]))


def _predictions(
    panel: Panel,
    examples: Sequence[Example],
    labels: Labels,
    probabilities: Probabilities,
    groups: npt.NDArray[np.int64],
) -> list[dict[str, Any]]:
    found = []
    for row, (example, answer) in enumerate(zip(examples, panel.decisions_of(probabilities), strict=True)):
        entry: dict[str, Any] = {"row": row, "id": example.id, "text": example.text, "image": picture_name(example)}
        entry["group"] = int(groups[row])
        if panel.one_of:
            known = np.flatnonzero(labels[row] == 1)
            entry |= {"label": panel.names[known[0]] if len(known) else None, "answer": answer.label_name}
        else:
            entry |= {
                "labels": [None if label == MISSING else int(label) for label in labels[row]],
                "decisions": [one.decision for one in answer.labels.values()],
            }
        found.append(entry | {"probabilities": probabilities[row].tolist()})
    return found
