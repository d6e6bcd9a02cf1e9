"""Train a head on features that were read once: the frozen-base stage of the original API, in seconds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qwen_vl_classifier.backbone.backbone import Backbone, as_backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.abstention import abstention_band
from qwen_vl_classifier.classifier.average_picture import average_of
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.classifier.score_distribution import distribution_record
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example, shared_text
from qwen_vl_classifier.data.labels import class_names_of
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.data.targets import classes_of, targets_of
from qwen_vl_classifier.errors import CheckpointError, ConfigError
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.training.overlap import (
    Contents,
    Novelty,
    alike_pairs,
    distinct_pictures,
    looks_of_pictures,
    may_have_seen,
    row_hashes,
    sketch,
)
from qwen_vl_classifier.training.probe.candidates import candidate_taps
from qwen_vl_classifier.training.probe.estimate import held_out_estimate
from qwen_vl_classifier.training.probe.fitting import FeatureRows, estimate_on_new_texts, fit_rows
from qwen_vl_classifier.training.probe.random_rows import check_random_rows, random_rows
from qwen_vl_classifier.training.probe.result import TrainResult
from qwen_vl_classifier.training.probe.search import ZERO_SHOT_TAP
from qwen_vl_classifier.training.splitting import check_grouping, grouping_of, groups_of, holdout
from qwen_vl_classifier.training.weighting import row_weights


def train(
    train_examples: Source,
    validation: Source | None = None,
    *,
    backbone: Backbone | str | os.PathLike[str],
    config: TrainConfig | None = None,
    store: FeatureStore | None = None,
    label_names: tuple[str, str] | None = None,
    keep_taps: Sequence[Tap] = (),
    progress: bool = True,
) -> TrainResult:
    """Train heads on frozen features, and return the best as a calibrated classifier with its estimates.

    Features of all taps come from one pass. Tap and head are chosen by cross-validation, whole in pictures and groups
    (`search`); calibration and threshold are fitted on the out-of-fold answers of the chosen one, which is then trained
    on all rows. What it reaches on new rows is estimated with a correction for the choice (`search_estimate`).

    Args:
        train_examples: Labelled examples of both classes, anything that `load_examples` takes; labels may be soft, from
            0 to 1.
        validation: Labelled examples of both classes that do not influence the choice: they give the estimate, and the
            band in which to abstain. `None` estimates from the training rows, and holds out a share of them for the
            band where there is to be one.
        backbone: What reads the features, or its name, as `Backbone.load` takes it; it is not changed.
        config: Options.
        store: Where features are kept, if anywhere.
        label_names: What class 0 and class 1 are called; `None` calls them by the words that the data has for them.
        keep_taps: Further taps that the same pass reads for the store, so that a later run that tries them needs none.
        progress: Show progress bars on what takes more than two seconds.

    Raises:
        DataError: Missing labels, one class only, too few examples, or an invalid weight.
        ConfigError: A tap that the backbone does not have.
        TrainingError: A head reached no finite loss, or an objective or error rate is out of reach.
    """
    config = config or TrainConfig()
    most = config.max_errors
    train_examples = as_examples(train_examples, class_names=label_names, soft_labels=True, max_errors=most)
    label_names = label_names or class_names_of(train_examples)
    if validation is not None:
        validation = as_examples(validation, class_names=label_names, max_errors=most)
    check_grouping(train_examples, config.group_by)
    backbone = as_backbone(backbone)
    taps = candidate_taps(config.taps, backbone, exportable=config.exportable)
    baseline, notes = _zero_shot(backbone, config)
    notes += config.unused()
    others = candidate_taps("auto", backbone) if config.exportable else []
    read = list(dict.fromkeys([*taps, *([ZERO_SHOT_TAP] if baseline else []), *others, *keep_taps]))
    reading = _Reading(backbone, read, config, store, progress)
    parts = _parted(reading, train_examples, validation)
    held_out, used = parts.held_out, parts.used
    rows, more_notes = check_random_rows(parts.rows, config, validated=validation is not None)
    notes += more_notes

    fitted = fit_rows(rows, taps, config, baseline=baseline, progress=progress)
    found = fitted.search
    classifier = Classifier(
        backbone,
        found.best.tap,
        fitted.head,
        fitted.spec,
        label_names=label_names,
        temperature=fitted.calibration.temperature,
        isotonic=fitted.calibration.isotonic,
        threshold=fitted.threshold,
    )
    if validation is None or held_out is None:
        estimate = fitted.estimate(rows, config)
    else:
        estimate = held_out_estimate(
            classifier.probabilities_of(held_out.at(classifier.tap))[:, 1],
            classifier.threshold,
            held_out.targets,
            held_out.weights,
            held_out.groups,
            seed=config.seed,
        )
    contents = Contents.of(used)
    if parts.validation:
        novelty = Novelty.between(contents, Contents.of(parts.validation))
    else:
        novelty = Novelty.of(contents, found.parts)
    estimate |= {"group_by": config.group_by, "stands_for": str(novelty), "at_random": rows.measured is not None}
    looks, first_rows = looks_of_pictures(distinct_pictures(used, contents.pictures))
    groups = groups_of(used, pictures=contents.pictures)
    classifier.average = average_of(looks)
    rows_sketch = sketch(row_hashes(used, contents.pictures))
    if may_have_seen({"rows_sketch": rows_sketch}, parts.validation):
        notes.append(
            "some validation rows are also training rows, so results look better than they are; give other rows"
        )
    classifier.training = {
        "method": "probe",
        "chosen": found.best.head,
        "training_rows": len(used),
        "held_out_rows": len(held_out.targets) if held_out else 0,
        "folds": found.folds,
        "estimate": estimate,
        "calibration": fitted.record,
        "threshold": {"objective": config.objective, "threshold": classifier.threshold},
        "options": _options(config),
        "notes": notes,
        "table": found.table,
        "data": {**contents.counts(), "alike": alike_pairs(looks, groups[first_rows].tolist())},
        "rows_sketch": rows_sketch,
    }
    if fitted.unrestricted is not None:
        best, *_ = fitted.unrestricted.table
        classifier.training["exportable"] = {
            "log_loss": found.table[0]["log_loss"],
            "unrestricted": {name: best[name] for name in ("tap", "head", "log_loss")},
        }
    if text := shared_text(used):
        classifier.training["text"] = text
    # Weights of classes are left out: they say what errors cost, not which rows there will be.
    own_weights = row_weights(used, rows.targets, column=config.weight_column)
    on = slice(None) if rows.measured is None else rows.measured
    classifier.training |= distribution_record(fitted.scores[on], own_weights[on])
    if parts.left_out:
        notes += [bad.note(total) for bad, total in parts.left_out]
        classifier.training["left_out"] = [bad.to_json(total) for bad, total in parts.left_out]
    if not parts.validation and novelty.many_texts_repeat and config.group_by not in ("text", "both"):
        classifier.training["estimate_new_texts"] = estimate_on_new_texts(
            found.best, fitted.calibration, fitted.threshold, rows, used, contents, config
        )
    if config.target_error_rate and held_out:
        probability = classifier.probabilities_of(held_out.at(classifier.tap))[:, 1]
        classes = classes_of(held_out.targets)
        band = abstention_band(probability, classes, classifier.threshold, config.target_error_rate)
        classifier.abstention = band.band
        classifier.training["abstention"] = band.to_json()
    return TrainResult(classifier, found.table, classifier.training["held_out_rows"], estimate)


@dataclass(frozen=True, slots=True)
class _Reading:
    """How examples become rows."""

    backbone: Backbone
    taps: Sequence[Tap]
    config: TrainConfig
    store: FeatureStore | None
    progress: bool

    def check(self, examples: Sequence[Example], what: str, *, soft: bool) -> BadRows:
        """Check labels, weights and the headers of pictures; return the rows to leave out."""
        bad = BadRows(self.config.max_errors, what=f"{what} rows", can_leave_out=True, given=examples)
        _weights(examples, targets_of(examples, what=what, soft=soft), self.config)
        read_sizes(examples, bad, progress=self.progress)
        bad.check(len(examples))
        return bad

    def rows(
        self, examples: Sequence[Example], bad: BadRows, what: str, *, soft: bool
    ) -> tuple[FeatureRows, Sequence[Example]]:
        """Read the features; return them with the examples that can be used."""
        features = extract_features(
            examples, self.backbone, self.taps, store=self.store, bad=bad, progress=self.progress
        )
        bad.check(len(examples))
        kept = bad.without(examples)
        targets = targets_of(kept, what=what, soft=soft)
        weights = _weights(kept, targets, self.config)
        groups, across = grouping_of(kept, self.config.group_by)
        measured = random_rows(kept, self.config.sampled_column)
        return FeatureRows(self.taps, features, targets, weights, groups, across, measured), kept


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the data is split into.

    Attributes:
        rows: What the search sees.
        held_out: What is held out of it, if anything.
        used: The examples of `rows`.
        validation: The validation examples, where such are given.
        left_out: Rows that cannot be used, if any, each with the number of rows of its data set.
    """

    rows: FeatureRows
    held_out: FeatureRows | None
    used: list[Example]
    validation: Sequence[Example]
    left_out: list[tuple[BadRows, int]]


def _parted(reading: _Reading, examples: Sequence[Example], validation: Sequence[Example] | None) -> _Parts:
    """Read the rows and split them."""
    config = reading.config
    soft = any(example.label not in (0, 1, None) for example in examples)
    given = (examples, reading.check(examples, "training", soft=soft))
    given_apart = None if validation is None else (validation, reading.check(validation, "validation", soft=False))
    everything, examples = reading.rows(*given, "training", soft=soft)
    used = np.flatnonzero(everything.weights)  # the others say nothing
    held_out = None
    if given_apart is not None:
        held_out, validation = reading.rows(*given_apart, "validation", soft=False)
    elif config.target_error_rate:
        counted = [examples[int(row)] for row in used]
        kept, out = holdout(counted, config.validation_share, config.seed, soft=soft, by=config.group_by)
        used, held_out = used[kept], everything.take(used[out])
    left_out = [(bad, len(rows)) for rows, bad in (given, given_apart or ((), BadRows())) if bad]
    return _Parts(everything.take(used), held_out, [examples[int(row)] for row in used], validation or (), left_out)


def _weights(examples: Sequence[Example], targets: Float, config: TrainConfig) -> Float:
    return row_weights(examples, targets, column=config.weight_column, class_weight=config.class_weight)


def _zero_shot(backbone: Backbone, config: TrainConfig) -> tuple[Classifier | None, list[str]]:
    """Return the zero-shot classifier if it is to be tried and can be, and otherwise a note that says why not."""
    if not {"zero-shot", "calibrated"} & {*config.head_names}:
        return None, []
    try:
        backbone.check_taps([ZERO_SHOT_TAP])
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are none of our business
            return Classifier.zero_shot(backbone, yes=config.yes, no=config.no), []
    except (CheckpointError, ConfigError) as error:
        return None, [f"no zero-shot baseline: {error}"]


def _options(config: TrainConfig) -> dict[str, Any]:
    """Return the options as JSON has them: keys are texts."""
    options = asdict(config)
    if isinstance(config.class_weight, dict):
        options["class_weight"] = {str(label): weight for label, weight in config.class_weight.items()}
    return options
