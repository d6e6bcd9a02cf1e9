"""Learn one label of rows that were read: what `train` does for its label, and `train_panel` for each of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.abstention import abstention_band
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.classifier.score_distribution import distribution_record
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.targets import classes_of
from qwen_vl_classifier.errors import CheckpointError, ConfigError
from qwen_vl_classifier.training.overlap import Contents, Novelty, may_have_seen
from qwen_vl_classifier.training.probe.candidates import candidate_taps
from qwen_vl_classifier.training.probe.estimate import held_out_estimate
from qwen_vl_classifier.training.probe.fitting import FeatureRows, estimate_on_new_texts, fit_rows
from qwen_vl_classifier.training.probe.random_rows import check_random_rows
from qwen_vl_classifier.training.probe.read_rows import ReadRows
from qwen_vl_classifier.training.probe.result import TrainResult
from qwen_vl_classifier.training.probe.search import ZERO_SHOT_TAP
from qwen_vl_classifier.training.splitting import RowNumbers, holdout
from qwen_vl_classifier.training.weighting import row_weights


@dataclass(frozen=True, slots=True)
class Setup:
    """What is tried, for every label alike.

    Attributes:
        backbone: What reads the features.
        taps: Where they are read to be compared.
        read: All taps that the pass reads, those first.
        baseline: The zero-shot classifier, if it is tried.
        notes: For the user.
        config: Options.
        progress: Show progress bars on what takes more than two seconds.
    """

    backbone: Backbone
    taps: list[Tap]
    read: list[Tap]
    baseline: Classifier | None
    notes: list[str]
    config: TrainConfig
    progress: bool

    @classmethod
    def of(cls, backbone: Backbone, config: TrainConfig, *, keep_taps: Sequence[Tap] = (), progress: bool) -> Setup:
        """Find out what is to be tried.

        Raises:
            ConfigError: A tap that the backbone does not have.
        """
        taps = candidate_taps(config.taps, backbone, exportable=config.exportable)
        baseline, notes = _zero_shot(backbone, config)
        others = candidate_taps("auto", backbone) if config.exportable else []
        read = list(dict.fromkeys([*taps, *([ZERO_SHOT_TAP] if baseline else []), *others, *keep_taps]))
        return cls(backbone, taps, read, baseline, notes + config.unused(), config, progress)


@dataclass(frozen=True, slots=True)
class LabelRows:
    """The rows that have a value of one label.

    Attributes:
        source: The rows that were read.
        rows: Which of them, rising.
        targets: Shape (rows,), labels or probabilities of class 1.
        soft: Whether probabilities may be among them.
    """

    source: ReadRows
    rows: RowNumbers
    targets: Float
    soft: bool = False

    def take(self, chosen: RowNumbers) -> LabelRows:
        """Return some of these rows."""
        return replace(self, rows=self.rows[chosen], targets=self.targets[chosen])

    def features(self) -> FeatureRows:
        """Return the rows as training takes them."""
        return self.source.labelled(self.rows, self.targets)


@dataclass(frozen=True, slots=True)
class LearnedLabel:
    """What training found for one label.

    Attributes:
        result: The classifier, with what was tried.
        rows: Which of the rows that were read it was trained on.
        scores: Shape (rows,): calibrated probabilities of class 1, out of fold.
    """

    result: TrainResult
    rows: RowNumbers
    scores: Float


def learn_label(
    given: LabelRows, validation: LabelRows | None, setup: Setup, *, label_names: tuple[str, str]
) -> LearnedLabel:
    """Choose tap and head, train and calibrate them, set the threshold, and estimate how good they are.

    Args:
        given: Rows of both classes.
        validation: Rows that have no say in the choice, if there are any.
        setup: What is tried.
        label_names: What class 0 and class 1 are called.

    Raises:
        DataError: Too few rows or groups, or an invalid weight.
        TrainingError: A head reached no finite loss, or an objective or error rate is out of reach.
    """
    config, notes = setup.config, list(setup.notes)
    everything = given.features()
    used = np.flatnonzero(everything.weights)  # the others say nothing
    held_out = None
    if validation is not None:
        held_out = validation.features()
    elif config.target_error_rate:
        labelled = zip(given.source.some(given.rows[used]), given.targets[used].tolist(), strict=True)
        counted = [replace(example, label=target) for example, target in labelled]
        kept, out = holdout(counted, config.validation_share, config.seed, soft=given.soft, by=config.group_by)
        used, held_out = used[kept], everything.take(used[out])
    rows, more_notes = check_random_rows(everything.take(used), config, validated=validation is not None)
    notes += more_notes
    facts = given.source.facts(given.rows[used])

    fitted = fit_rows(rows, setup.taps, config, baseline=setup.baseline, progress=setup.progress)
    found = fitted.search
    classifier = Classifier(
        setup.backbone,
        found.best.tap,
        fitted.head,
        fitted.spec,
        label_names=label_names,
        temperature=fitted.calibration.temperature,
        isotonic=fitted.calibration.isotonic,
        threshold=fitted.threshold,
    )
    tested = [] if validation is None else validation.source.some(validation.rows)
    if held_out is not None and tested:
        estimate = held_out_estimate(
            classifier.probabilities_of(held_out.at(classifier.tap))[:, 1],
            classifier.threshold,
            held_out.targets,
            held_out.weights,
            held_out.groups,
            seed=config.seed,
        )
        novelty = Novelty.between(facts.contents, Contents.of(tested))
    else:
        estimate = fitted.estimate(rows, config)
        novelty = Novelty.of(facts.contents, found.parts)
    estimate |= {"group_by": config.group_by, "stands_for": str(novelty), "at_random": rows.measured is not None}
    classifier.average = facts.average
    if may_have_seen({"rows_sketch": facts.sketch}, tested):
        notes.append(
            "some validation rows are also training rows, so results look better than they are; give other rows"
        )
    left_out = [*given.source.left_out, *(validation.source.left_out if validation else ())]
    notes += [bad.note(total) for bad, total in left_out]
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
        "data": facts.data,
        "rows_sketch": facts.sketch,
        **({"text": facts.text} if facts.text else {}),
        **({"left_out": [bad.to_json(total) for bad, total in left_out]} if left_out else {}),
    }
    if fitted.unrestricted is not None:
        best, *_ = fitted.unrestricted.table
        classifier.training["exportable"] = {
            "log_loss": found.table[0]["log_loss"],
            "unrestricted": {name: best[name] for name in ("tap", "head", "log_loss")},
        }
    # Weights of classes are left out: they say what errors cost, not which rows there will be.
    own_weights = row_weights(facts.examples, rows.targets, column=config.weight_column)
    on = slice(None) if rows.measured is None else rows.measured
    classifier.training |= distribution_record(fitted.scores[on], own_weights[on])
    if not tested and novelty.many_texts_repeat and config.group_by not in ("text", "both"):
        classifier.training["estimate_new_texts"] = estimate_on_new_texts(
            found.best, fitted.calibration, fitted.threshold, rows, facts.examples, facts.contents, config
        )
    if config.target_error_rate and held_out:
        probability = classifier.probabilities_of(held_out.at(classifier.tap))[:, 1]
        classes = classes_of(held_out.targets)
        band = abstention_band(probability, classes, classifier.threshold, config.target_error_rate)
        classifier.abstention = band.band
        classifier.training["abstention"] = band.to_json()
    result = TrainResult(classifier, found.table, classifier.training["held_out_rows"], estimate)
    return LearnedLabel(result, given.rows[used], fitted.scores)


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
