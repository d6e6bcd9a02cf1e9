"""Finish fine-tuning: calibrate what was trained, set its threshold and band, and compare it with the start.

Whatever is measured here is measured as the classifier that is handed back would answer: by its own probabilities.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.adapters import merge_adapter
from qwen_vl_classifier.classifier.abstention import abstention_band, check_rows
from qwen_vl_classifier.classifier.calibration import (
    Calibration,
    fit_calibration,
)
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.probabilities import log_loss
from qwen_vl_classifier.classifier.score_distribution import distribution_record
from qwen_vl_classifier.classifier.thresholds import choose_threshold
from qwen_vl_classifier.config.finetune import FinetuneConfig
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.targets import classes_of
from qwen_vl_classifier.errors import ConfigError, DataError, TrainingError
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.objectives import Objective
from qwen_vl_classifier.training.finetuning.training_batches import LabelledRows
from qwen_vl_classifier.training.overlap import may_have_seen
from qwen_vl_classifier.training.splitting import groups_of, holdout
from qwen_vl_classifier.training.weighting import row_weights

_ACCURACY = "accuracy"
_SMALLEST_DIFFERENCE, _SMALLEST_SHARE = 1e-4, 0.01  # of two log losses: absolute, and as a share of the start's


@dataclass(frozen=True, slots=True)
class Answers:
    """What the threshold and the band of the result are chosen for.

    Attributes:
        objective: What its threshold is chosen for.
        target_error_rate: Target error rate over all rows; 0 never abstains.
        label_names: What class 0 and class 1 are called.
        requested: Which of these were set, and not taken over from the start.
    """

    objective: str
    target_error_rate: float
    label_names: tuple[str, str]
    requested: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, start: Classifier | None, config: FinetuneConfig, label_names: tuple[str, str] | None) -> Answers:
        """Return what was set, and what the start does where nothing was.

        Raises:
            ConfigError: The classes are named the other way round than in the start.
        """
        before = start.label_names if start else ("0", "1")
        if start and label_names and (label_names[0] == before[1] or label_names[1] == before[0]):
            raise ConfigError(
                f"class 1 is {label_names[1]!r} and class 0 {label_names[0]!r}, but the start calls class 1 "
                f"{before[1]!r} and class 0 {before[0]!r}; expected the same names for the same classes"
            )
        rate = config.target_error_rate
        given = {"objective": config.objective, "target_error_rate": rate, "label_names": label_names}
        return cls(
            objective=str(Objective.parse(config.objective or objective_of(start))),
            target_error_rate=target_error_rate_of(start) if rate is None else rate,
            label_names=label_names or before,
            requested=frozenset(name for name, value in given.items() if value is not None),
        )


def objective_of(start: Classifier | None) -> str:
    """Return what the threshold of a start was chosen for, by its record; accuracy where that is unknown."""
    entry = start.training.get("threshold") if start else None
    try:
        return str(Objective.parse(entry["objective"])) if isinstance(entry, dict) else _ACCURACY
    except (KeyError, AttributeError, ConfigError):
        return _ACCURACY


def target_error_rate_of(start: Classifier | None) -> float:
    """Return the error rate that the band of a start was made for, by its record; 0 without a band."""
    entry = start.training.get("abstention") if start and start.abstention else None
    # Classifiers of before the first release have the rate under its earlier name.
    value = entry.get("target_error_rate", entry.get("max_error")) if isinstance(entry, dict) else None
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1 else 0.0


@dataclass(frozen=True, slots=True)
class Measure:
    """How good a classifier is on the validation rows, by its own probabilities.

    Attributes:
        probability: Shape (n, 2).
        log_loss: Weighted mean.
        accuracy: Weighted share of rows whose likelier class is right.
    """

    probability: npt.NDArray[np.float64]
    log_loss: float
    accuracy: float

    @classmethod
    def of(cls, classifier: Classifier, rows: LabelledRows, *, store: FeatureStore | None = None) -> Measure:
        """Measure `predict_proba` of a classifier."""
        return cls.by(classifier.predict_proba(rows.examples, store=store), rows)

    @classmethod
    def by(cls, probability: npt.NDArray[np.float64], rows: LabelledRows) -> Measure:
        """Measure probabilities, shape (n, 2)."""
        loss = log_loss(probability[:, 1], rows.targets, weights=rows.weights)
        return cls(probability, loss, rows.accuracy(probability))


def finish(
    classifier: Classifier,
    validation: LabelledRows,
    baseline: Measure,
    answers: Answers,
    notes: list[str],
    config: FinetuneConfig,
) -> bool:
    """Calibrate what was trained, if it then answers better than the start, and choose its threshold.

    A calibration is kept only where it helps, on rows that it was not fitted on; what it is worth is in the record
    under `calibration` either way. The log loss of the classifier as it is now is there as `validation_log_loss`,
    beside that of the start, `start_log_loss`.

    Args:
        classifier: Changed in place: calibration, threshold and record.
        validation: LabelledRows of both classes that chose the state.
        baseline: Of the start.
        answers: How it is to answer.
        notes: Gets a sentence where that is out of reach.
        config: Of the fine-tuning.

    Returns:
        Whether its log loss on the validation rows is below that of the start.
    """
    features = extract_features(validation.examples, classifier.backbone, [classifier.tap], progress=False)[:, 0]
    logits = classifier.logits_of(features)
    counted = np.flatnonzero(validation.weights)
    targets, weights = validation.targets[counted].astype(np.float64), validation.weights[counted].astype(np.float64)
    groups = groups_of([validation.examples[row] for row in counted.tolist()], config.group_by)
    fit = fit_calibration(
        logits[counted],
        targets,
        weights=weights,
        groups=groups,
        isotonic=not classifier.trained_exportable,
        seed=config.seed,
    )
    record, plain = fit.record, Calibration()
    # Each with its log loss on rows that it was not fitted on; on all of them it may do worse than the start.
    ways = list({fit.calibration: record["log_loss_after"], plain: record["log_loss_before"]}.items())
    for calibration, unseen in ways:
        measure = Measure.by(calibration.apply(logits), validation)
        if max(unseen, measure.log_loss) < baseline.log_loss:
            break
    else:
        best = min(Measure.by(calibration.apply(logits), validation).log_loss for calibration, _ in ways)
        notes.append(
            f"the best state has log loss {best:.4f} on the validation rows, as it would be saved, and the start "
            f"{baseline.log_loss:.4f}"
        )
        return False
    if calibration == plain:
        notes.append("no calibration: none helps on validation rows that it was not fitted on")
        record |= {"method": "none", "ece_after": record["ece_before"], "log_loss_after": record["log_loss_before"]}
    classifier.temperature, classifier.isotonic = calibration.temperature, calibration.isotonic
    classifier.training |= {
        "validation_log_loss": measure.log_loss,
        "validation_accuracy": measure.accuracy,
        "start_log_loss": baseline.log_loss,
        "calibration": record,
    }
    # Weights of classes are left out: they say what errors cost, not which rows there will be.
    own_weights = row_weights(validation.examples, validation.targets.astype(np.float64), column=config.weight_column)
    classifier.training |= distribution_record(measure.probability[:, 1], own_weights)
    set_threshold(classifier, measure.probability, validation, answers.objective, notes)
    return True


def set_threshold(
    classifier: Classifier, probability: npt.NDArray[np.float64], rows: LabelledRows, objective: str, notes: list[str]
) -> None:
    """Choose the threshold of a classifier for an objective; where that is out of reach, for accuracy, and say so.

    Args:
        classifier: Its threshold and record are changed.
        probability: Shape (n, 2), of the rows.
        rows: Those to choose on.
        objective: What the threshold is to be good at.
        notes: Gets a sentence where the objective is out of reach.
    """
    counted = np.flatnonzero(rows.weights)
    classes = classes_of(rows.targets[counted].astype(np.float64))
    given: dict[str, Any] = {"weights": rows.weights[counted].astype(np.float64)}
    record: dict[str, Any] = {"objective": objective}
    try:
        classifier.threshold = choose_threshold(probability[counted, 1], classes, objective, **given)
    except TrainingError as error:  # no reason to lose what was trained
        notes.append(f"{error}; the threshold is that for {_ACCURACY}")
        record = {"objective": _ACCURACY, "asked": objective, "out_of_reach": str(error)}
        classifier.threshold = choose_threshold(probability[counted, 1], classes, _ACCURACY, **given)
    classifier.training["threshold"] = record | {"threshold": classifier.threshold}


def set_band(classifier: Classifier, rows: Sequence[Example], target_error_rate: float) -> None:
    """Set the band in which a classifier abstains on rows that were used for nothing else."""
    probability = classifier.predict_proba(rows)[:, 1]
    classes = classes_of(np.array([row.label for row in rows], dtype=np.float64))
    found = abstention_band(probability, classes, classifier.threshold, target_error_rate)
    classifier.abstention = found.band
    classifier.training["abstention"] = found.to_json()


def keep_start(
    start: Classifier,
    measured: Measure,
    validation: LabelledRows,
    band_rows: Sequence[Example],
    answers: Answers,
    notes: list[str],
) -> Classifier:
    """Return the start itself, or a copy if its threshold or band is to change.

    Args:
        start: No state was better.
        measured: Of the start, or of its head trained again without the validation rows, whose answers on them are
            those of a classifier that has not seen them.
        validation: The rows that this was measured on.
        band_rows: LabelledRows for the band in which to abstain.
        answers: How it is to answer.
        notes: Gets a sentence where that cannot be.
    """
    made = copy.copy(start)
    made.label_names = answers.label_names
    made.training = dict(start.training)
    earlier = len(notes)
    moved = "objective" in answers.requested and answers.objective != objective_of(start)
    if moved:
        set_threshold(made, measured.probability, validation, answers.objective, notes)
    if moved or answers.target_error_rate != target_error_rate_of(start):
        made.abstention = None
        made.training.pop("abstention", None)
        if answers.target_error_rate and may_have_seen(start.training, band_rows):
            notes.append(
                f"no abstention: the start was trained on the rows held out for {spelled('target_error_rate')}, which "
                f"says nothing about new rows; train it with this option instead"
            )
        elif answers.target_error_rate and band_rows:
            set_band(made, band_rows, answers.target_error_rate)
    if notes[earlier:]:
        made.training["notes"] = notes[earlier:]
    same = not moved and made.abstention == start.abstention and made.label_names == start.label_names
    return start if same and not notes[earlier:] else made


def part_band_rows(
    examples: Sequence[Example], answers: Answers, config: FinetuneConfig, notes: list[str]
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Hold out rows for the band in which to abstain, whole in pictures and groups, and return the others first.

    There are none where the result is never to abstain, or where it would merely follow the start and too few rows
    are there: then a note says so.

    Raises:
        DataError: Too few rows or groups to hold some out, for an error rate that was set.
        TrainingError: Too few rows for an error rate that was set.
    """
    if not answers.target_error_rate:
        return examples, []
    try:
        learn, out = holdout(examples, config.validation_share, config.seed, soft=True, by=config.group_by)
        check_rows(len(out), answers.target_error_rate)
    except (DataError, TrainingError) as error:
        if "target_error_rate" in answers.requested:
            raise
        notes.append(f"no abstention, though the start abstains: {error}")
        return examples, []
    if "target_error_rate" not in answers.requested:
        notes.append(
            f"{len(out)} training rows are held out for the band in which to abstain, as the start does; "
            f"{spelled('target_error_rate', 0)} trains on them and never abstains"
        )
    return [examples[row] for row in learn], [examples[row] for row in out]


def start_entry(look: dict[str, Any], baseline: Measure, notes: list[str]) -> dict[str, Any]:
    """Return the first entry of the history, of the start itself; what trains is a copy, which may differ."""
    copied, own = look["validation_log_loss"], baseline.log_loss
    if abs(copied - own) > max(_SMALLEST_DIFFERENCE, _SMALLEST_SHARE * own):
        notes.append(
            f"the start has log loss {own:.4f} on the validation rows; the copy that trains had {copied:.4f} before "
            "its first step: it is quantised, of another type or without the start's isotonic curve"
        )
    return look | {"validation_log_loss": own, "validation_accuracy": baseline.accuracy}


def freeze(classifier: Classifier, begun: Classifier, config: FinetuneConfig) -> None:
    """Freeze what was trained, as it will be used."""
    classifier.backbone.model.requires_grad_(False).eval()
    classifier.head.requires_grad_(False).eval()
    if config.merge:
        merge_adapter(classifier.backbone)
    classifier.backbone.mark_changed()
    classifier.finetuned = begun.finetuned or classifier.backbone.changed
