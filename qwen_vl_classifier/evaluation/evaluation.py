"""Evaluate a classifier on labelled examples: one plain dictionary that can be written as JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import numpy as np

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.model_card import training_facts
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.classifier.probabilities import log_odds
from qwen_vl_classifier.classifier.score_distribution import recorded_distribution
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.data.picture_checks import decode_all, read_sizes
from qwen_vl_classifier.data.targets import labels_of
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.evaluation.checks import CHECKS, Altered, judge_checks, plan_checks
from qwen_vl_classifier.evaluation.curves import curves, threshold_table
from qwen_vl_classifier.evaluation.data_checks import check_data
from qwen_vl_classifier.evaluation.intervals import metric_intervals
from qwen_vl_classifier.evaluation.metrics import Labels, Measure, Probabilities, baselines, compute_metrics, confusion
from qwen_vl_classifier.evaluation.scoring_pass import Scorer, ThumbnailKeeper, score_once
from qwen_vl_classifier.evaluation.slices import measure_slices, slices_of_rows, slicings
from qwen_vl_classifier.evaluation.verdict import notes_of, sentence_of, skill_of
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.html_pieces import page_frame
from qwen_vl_classifier.training.splitting import check_grouping, groups_of

SCHEMA_VERSION = 2

WINDOW_EXAMPLES = 48
_CLOSE = math.log(3)  # to the threshold, in log odds


class Evaluation(dict[str, Any]):
    """A plain dictionary that can be written as JSON; beside it, what a report shows of the pictures.

    Attributes:
        thumbnails: For each row that a report may show, small pictures, so that none is opened again for it.
    """

    thumbnails: Mapping[int, Sequence[dict[str, Any]]] = MappingProxyType({})

    def __repr__(self) -> str:
        """Summarise it in one line; `dict(evaluation)` shows all of it."""
        return f"<Evaluation of {self['rows']['total']:,} rows: {self['sentence']}>" if self else "<Evaluation: empty>"

    def _repr_html_(self) -> str:
        """Return the report in a frame, for notebooks."""
        from qwen_vl_classifier.evaluation.report import render_report  # nothing else here needs templates

        return page_frame(render_report(self), f"Report: {self['sentence']}")


def evaluate(
    classifier: Classifier,
    examples: Source,
    *,
    config: EvaluateConfig | None = None,
    training: Source | None = None,
    store: FeatureStore | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a classifier; each picture is opened once.

    Args:
        classifier: What to evaluate.
        examples: At least one, all with labels: anything that `load_examples` takes. Labels may be the words of
            `classifier.label_names`.
        config: Options: slices, checks, resamples and more.
        training: What it was trained on, to look for the same rows and pictures among the examples.
        store: Where features are kept, if anywhere.
        progress: Show a progress bar.

    Returns:
        `schema_version` and what `docs/reference/files.md` describes key by key.

    Raises:
        ConfigError: An option is out of its range, or it is a panel.
        DataError: No examples, one without a label, or a column to slice by that no row has.
        ImageError: More pictures cannot be opened than `config.max_errors` allows; the message lists the rows. All
            headers are read before anything is computed; what only decoding shows is an error after the pass.
    """
    if isinstance(classifier, Panel):
        raise ConfigError(
            f"evaluate was given a panel of {len(classifier.classifiers)} labels; expected one classifier; call "
            "evaluate_panel with it"
        )
    config = config or EvaluateConfig()
    about = measured(examples)
    most = config.max_errors
    examples = as_examples(examples, class_names=classifier.label_names, max_errors=most)
    if training is not None:
        training = as_examples(training, class_names=classifier.label_names, soft_labels=True, max_errors=most)
    labels_of(examples, what="evaluation", both=False)
    check_grouping(examples, config.group_by)
    given = len(examples)
    bad = BadRows(most, can_leave_out=True, given=examples)
    bad_training = BadRows(most, what="training rows", can_leave_out=True, given=training or ())
    # Before the pass, which may take hours: this refuses pictures without a sound header, and columns that are missing.
    sizes = read_sizes(examples, bad, progress=progress)
    bad.check(given)
    if training is not None:
        read_sizes(training, bad_training, progress=progress, title="read training headers")
        bad_training.check(len(training))
    slicings(bad.without(examples), config.slice_columns, fewest=config.slice_rows, sizes=bad.without(sizes))
    planned: dict[str, Altered | str] = dict.fromkeys(CHECKS, "switched off")
    if config.checks:
        usable = np.array([row for row in range(given) if row not in bad])
        planned = plan_checks(examples, sizes, usable, most_rows=config.check_rows, seed=config.seed)
    thumbnails = ThumbnailKeeper()
    notes: list[str] = []
    scorer = Scorer.of(classifier)
    scored = score_once(scorer, examples, planned, bad, thumbnails=thumbnails, store=store, progress=progress)
    bad.check(given)
    if training is not None:
        decode_all(training, bad_training, progress=progress, title="decode training pictures")
        bad_training.check(len(training))
        notes += [bad_training.note(len(training))] if bad_training else []
        training = bad_training.without(training)
    good = np.array([row not in bad for row in range(given)])
    positions = np.where(good, np.cumsum(good) - 1, -1)
    examples, probabilities = bad.without(examples), scored.own[good, 0]
    labels, groups = labels_of(examples, what="evaluation", both=False), groups_of(examples, config.group_by)
    cut = slicings(examples, config.slice_columns, fewest=config.slice_rows, sizes=bad.without(sizes))
    threshold = classifier.threshold
    values = compute_metrics(labels, probabilities, threshold)
    measure = Measure(labels, probabilities, threshold)
    answers = [classifier.decision_of(float(probability)) for probability in probabilities]
    right = np.array([answer.label for answer in answers]) == labels
    checks = judge_checks(
        planned,
        {name: found[:, 0] for name, found in scored.altered.items()},
        labels,
        probabilities,
        groups,
        positions=positions,
        threshold=threshold,
        resamples=config.resamples,
        seed=config.seed,
    )
    metrics = metric_intervals(measure, values, groups, resamples=config.resamples, seed=config.seed, progress=progress)
    guesses = baselines(labels)
    data = check_data(
        examples,
        labels,
        probabilities,
        training=training,
        record=classifier.training,
        beats_guessing=skill_of(metrics, guesses) != "none",
    )
    slices = measure_slices(cut, right, labels == 1, groups)
    own_slices = slices_of_rows(cut, slices, len(labels))
    evaluation = Evaluation()
    evaluation |= {
        "schema_version": SCHEMA_VERSION,
        "sentence": "",
        "notes": [],
        "measured": {"classifier": None} | about,
        "rows": {
            "total": len(labels),
            "positives": int(labels.sum()),
            "negatives": int(len(labels) - labels.sum()),
            "groups": int(groups.max()) + 1,
            "with_picture": sum(bool(example.images) for example in examples),
            "abstained": sum(answer.decision == "abstain" for answer in answers),
        },
        "metrics": metrics,
        "baselines": guesses,
        "confusion": confusion(labels, probabilities, threshold),
        "classifier": describe(classifier),
        "curves": curves(labels, probabilities, threshold, classifier.abstention),
        "thresholds": threshold_table(labels, probabilities, threshold),
        "slices": slices,
        "checks": checks,
        "data": data,
        "examples": telling_rows(labels, probabilities, threshold)
        | {"mislabelled": [entry["row"] for entry in data["label_issues"]["shown"][:WINDOW_EXAMPLES]]},
        "predictions": [
            {
                "row": row,
                "id": example.id,
                "text": example.text,
                "label": int(labels[row]),
                "probability": answer.probability,
                "decision": answer.decision,
                "image": picture_name(example),
                "group": int(groups[row]),
                "slices": own_slices[row],
            }
            for row, (example, answer) in enumerate(zip(examples, answers, strict=True))
        ],
    }
    distribution = recorded_distribution(classifier.training, name=classifier.backbone.name)
    if distribution is not None:
        index, chance = distribution.compare(distribution.counts_of(probabilities))
        evaluation["score_drift"] = {"psi": index, "chance": chance, "training_rows": sum(distribution.counts)}
    evaluation["sentence"] = sentence_of(evaluation)
    evaluation["notes"] = notes_of(evaluation) + [slicing.note for slicing in cut if slicing.note] + notes
    if config.group_by != "image":
        evaluation["notes"].append(f"intervals draw rows together by {config.group_by}")
    if bad:
        evaluation["notes"].append(bad.note(given))
        evaluation["left_out"] = bad.to_json(given)
    shown = {row for rows in evaluation["examples"].values() for row in rows}
    made = {row: thumbnails.of(examples[row]) for row in shown}
    evaluation.thumbnails = {row: pictures for row, pictures in made.items() if pictures is not None}
    return evaluation


def measured(source: Source) -> dict[str, Any]:
    """Say what is measured and when: `data`, the path of the rows or `None`, and `date`, ISO 8601 in UTC."""
    data = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    return {"data": data, "date": datetime.now(UTC).isoformat(timespec="seconds")}


def describe(classifier: Classifier) -> dict[str, Any]:
    """Describe what a classifier is made of and how it decides."""
    return {
        "backbone": classifier.backbone.name,
        "family": classifier.backbone.family.model_type,
        "layers": classifier.backbone.describe_layers(classifier.tap),
        "fingerprint": classifier.backbone.fingerprint,
        "tap": str(classifier.tap),
        "head": classifier.spec.kind,
        "label_names": list(classifier.label_names),
        "threshold": classifier.threshold,
        "temperature": classifier.temperature,
        "isotonic": classifier.isotonic is not None,
        "abstention": None if classifier.abstention is None else list(classifier.abstention),
        "training": training_facts(classifier.training),
    }


def telling_rows(labels: Labels, probabilities: Probabilities, threshold: float) -> dict[str, list[int]]:
    """List rows that are worth a look, at most 48 of each kind.

    Returns:
        `wrong`, the surest mistakes first, and `uncertain`, the nearest to the threshold first: rows whose odds are
        less than three times, and more than a third of, those of the threshold (from 0.25 to 0.75 around one half).
    """
    wrong = np.flatnonzero((probabilities >= threshold) != (labels == 1))
    surest = wrong[np.argsort(-np.abs(probabilities - labels)[wrong], kind="stable")]
    distance = np.abs(log_odds(probabilities) - log_odds(threshold))
    nearest = np.argsort(distance, kind="stable")[: int((distance < _CLOSE).sum())]
    return {"wrong": surest[:WINDOW_EXAMPLES].tolist(), "uncertain": nearest[:WINDOW_EXAMPLES].tolist()}


def picture_name(example: Example) -> str | None:
    """Return the path of an example's first picture; `None` for pictures that are not files."""
    source = example.images[0] if example.images else None
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
