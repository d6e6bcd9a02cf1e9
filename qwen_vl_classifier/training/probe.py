"""Train a head on features that were read once: the frozen-base stage of the original API, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qwen_vl_classifier.backbone.loading import Backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.abstention import abstention_band
from qwen_vl_classifier.classifier.calibration import (
    Calibration,
    Method,
    calibration_record,
    fit_calibration,
    fit_platt,
    margins_of,
)
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.head import HeadSpec, fold_line
from qwen_vl_classifier.classifier.thresholds import choose_threshold
from qwen_vl_classifier.config.train import TrainConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import CheckpointError, ConfigError
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.training.candidates import Candidate, candidate_taps
from qwen_vl_classifier.training.estimate import held_out_estimate, search_estimate
from qwen_vl_classifier.training.heads import Standardised, linear_head, mlp_head
from qwen_vl_classifier.training.result import TrainResult
from qwen_vl_classifier.training.scores import Float, logits_of
from qwen_vl_classifier.training.search import ZERO_SHOT_TAP, Search, search
from qwen_vl_classifier.training.sketch import overlap, sketch
from qwen_vl_classifier.training.splitting import classes_of, groups_of, holdout, targets_of
from qwen_vl_classifier.training.weighting import class_weights, example_weights


def train(
    train_examples: Sequence[Example],
    validation: Sequence[Example] | None = None,
    *,
    backbone: Backbone,
    config: TrainConfig | None = None,
    store: FeatureStore | None = None,
    label_names: tuple[str, str] = ("0", "1"),
    progress: bool = True,
) -> TrainResult:
    """Train heads on frozen features and keep the best, calibrated, with what is known of it.

    Features of all taps come from one pass. Tap and head are chosen by cross-validation, whole in pictures and groups
    (`search`); calibration and threshold are fitted on the out-of-fold answers of the chosen one, which is then trained
    on all rows. What it reaches on new rows is estimated so that the choice is paid for (`search_estimate`).

    Args:
        train_examples: Labelled examples of both classes; labels may be soft, from 0 to 1.
        validation: Labelled examples of both classes that have no say in the choice: they give the estimate, and the
            band in which to abstain. `None` estimates from the training rows, and holds out a share of them for the
            band where there is to be one.
        backbone: What reads the features; it is not changed.
        config: Options.
        store: Where features are kept, if anywhere.
        label_names: What class 0 and class 1 are called.
        progress: Show progress bars on what takes more than two seconds.

    Raises:
        DataError: Missing labels, one class only, too few examples, or a weight that is none.
        ConfigError: A tap that the backbone does not have.
        TrainingError: A head reached no finite loss, or an objective or error rate is out of reach.
    """
    config = config or TrainConfig()
    taps = candidate_taps(config.taps, backbone)
    asked, notes = _zero_shot(backbone, config)
    read = list(dict.fromkeys([*taps, *([ZERO_SHOT_TAP] if asked else [])]))
    reading = _Reading(backbone, read, config, store, progress)
    rows, held_out, used = _parted(reading, train_examples, validation)

    zero_shot = margins_of(asked.logits_of(rows.at(ZERO_SHOT_TAP))) if asked else None
    found = search(
        rows.features[:, : len(taps)],
        rows.targets,
        rows.groups,
        taps,
        config,
        weights=rows.weights,
        zero_shot=zero_shot,
        progress=progress,
    )
    head, spec = _refit(found.best, rows, zero_shot, asked, config)
    classifier = Classifier(backbone, found.best.tap, head, spec, label_names=label_names)
    calibration = _calibrate(classifier, found.best, rows, zero_shot, config)
    if validation is None or held_out is None:
        estimate = _estimate_from_search(found, rows, classifier, config)
    else:
        estimate = _estimate_from_rows(held_out, classifier, config)
    seen = sketch(used)
    if validation is not None and overlap(seen, validation):
        notes.append("some of the validation rows are training rows, which flatters the figures; give other rows")
    classifier.training = {
        "method": "probe",
        "chosen": found.best.head,
        "training_rows": len(used),
        "held_out_rows": len(held_out.targets) if held_out else 0,
        "folds": found.folds,
        "estimate": estimate,
        "calibration": calibration,
        "threshold": {"objective": config.objective, "threshold": classifier.threshold},
        "options": _options(config),
        "notes": notes,
        "table": found.table,
        "rows_sketch": seen,
    }
    if config.max_error and held_out:
        probability = classifier.probabilities_of(held_out.at(classifier.tap))[:, 1]
        band = abstention_band(probability, classes_of(held_out.targets), classifier.threshold, config.max_error)
        classifier.abstention = band.band
        classifier.training["abstention"] = band.to_json()
    return TrainResult(classifier, found.table, classifier.training["held_out_rows"], estimate)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows with all that training needs of them.

    Attributes:
        taps: Where the features were read.
        features: Shape (n, taps, hidden).
        targets: Shape (n,), the probability of class 1.
        weights: Shape (n,).
        groups: Shape (n,).
    """

    taps: Sequence[Tap]
    features: npt.NDArray[np.float32]
    targets: Float
    weights: Float
    groups: npt.NDArray[np.int64]

    def at(self, tap: Tap) -> npt.NDArray[np.float32]:
        """Return the features of one tap, shape (n, hidden)."""
        return self.features[:, self.taps.index(tap)]

    def take(self, rows: npt.NDArray[np.int64]) -> _Rows:
        """Return some of the rows."""
        if len(rows) == len(self.targets):  # features may fill much of the memory: they are not copied
            return self
        return _Rows(self.taps, self.features[rows], self.targets[rows], self.weights[rows], self.groups[rows])


@dataclass(frozen=True, slots=True)
class _Reading:
    """How examples become rows."""

    backbone: Backbone
    taps: Sequence[Tap]
    config: TrainConfig
    store: FeatureStore | None
    progress: bool

    def rows(self, examples: Sequence[Example], what: str, *, soft: bool) -> _Rows:
        """Check labels and weights, then read the features."""
        targets = targets_of(examples, what=what, soft=soft)
        weights = _weights(examples, targets, self.config)
        features = extract_features(examples, self.backbone, self.taps, store=self.store, progress=self.progress)
        return _Rows(self.taps, features, targets, weights, groups_of(examples))


def _parted(
    reading: _Reading, examples: Sequence[Example], validation: Sequence[Example] | None
) -> tuple[_Rows, _Rows | None, list[Example]]:
    """Return the rows that the search sees, those held out of it if any, and the examples of the former."""
    config = reading.config
    soft = any(example.label not in (0, 1, None) for example in examples)
    if validation is not None:
        targets_of(validation, what="validation", soft=False)  # before any pass
    everything = reading.rows(examples, "training", soft=soft)
    used = np.flatnonzero(everything.weights)  # the others say nothing
    held_out = None
    if validation is not None:
        held_out = reading.rows(validation, "validation", soft=False)
    elif config.max_error:
        kept, out = holdout([examples[int(row)] for row in used], config.validation_share, config.seed, soft=soft)
        used, held_out = used[kept], everything.take(used[out])
    return everything.take(used), held_out, [examples[int(row)] for row in used]


def _weights(examples: Sequence[Example], targets: Float, config: TrainConfig) -> Float:
    weights = example_weights(examples, config.weight_column)
    return weights * class_weights(targets, weights, config.class_weight)


def _zero_shot(backbone: Backbone, config: TrainConfig) -> tuple[Classifier | None, list[str]]:
    """Return the zero-shot classifier if it is wanted and can be asked, and what there is to say where it cannot."""
    if not {"zero-shot", "calibrated"} & {*config.head_names}:
        return None, []
    try:
        backbone.check_taps([ZERO_SHOT_TAP])
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are none of our business
            return Classifier.zero_shot(backbone, yes=config.yes, no=config.no), []
    except (CheckpointError, ConfigError) as error:
        return None, [f"no zero-shot baseline: {error}"]


def _refit(
    best: Candidate, rows: _Rows, zero_shot: Float | None, asked: Classifier | None, config: TrainConfig
) -> tuple[nn.Module, HeadSpec]:
    """Train the chosen head on all rows."""
    if best.head in ("zero-shot", "calibrated"):
        assert asked is not None
        assert zero_shot is not None
        if best.head == "calibrated":
            fold_line(asked.head, *fit_platt(zero_shot, rows.targets, weights=rows.weights))
        return asked.head, asked.spec
    data = Standardised.of(rows.at(best.tap))
    if best.l2 is not None:
        return linear_head(data, rows.targets, rows.weights, best.l2)
    return mlp_head(data, rows.targets, rows.weights, best.epochs or 1, config)


def _calibrate(
    classifier: Classifier, best: Candidate, rows: _Rows, zero_shot: Float | None, config: TrainConfig
) -> dict[str, Any]:
    """Fit calibration and threshold on out-of-fold answers; return the record of the calibration."""
    logits = logits_of(best.margins)
    known: dict[str, Any] = {"weights": rows.weights, "groups": rows.groups, "seed": config.seed}
    method: Method = "temperature"
    if best.head == "calibrated":  # its line is its calibration, and in its head
        assert zero_shot is not None
        method, before, fitted = "platt", logits_of(zero_shot), Calibration()
    else:
        before, fitted = logits, fit_calibration(logits, rows.targets, **known)
        method = "isotonic" if fitted.isotonic else "temperature"
    classifier.temperature, classifier.isotonic = fitted.temperature, fitted.isotonic
    classifier.threshold = choose_threshold(
        fitted.apply(logits)[:, 1], classes_of(rows.targets), config.objective, weights=rows.weights
    )
    return calibration_record(method, Calibration().apply(before), before, rows.targets, **known)


def _estimate_from_search(found: Search, rows: _Rows, classifier: Classifier, config: TrainConfig) -> dict[str, Any]:
    return search_estimate(
        np.stack([candidate.margins for candidate in found.candidates], axis=1),
        rows.targets,
        rows.weights,
        rows.groups,
        objective=config.objective,
        isotonic=classifier.isotonic is not None,
        seed=config.seed,
    )


def _estimate_from_rows(rows: _Rows, classifier: Classifier, config: TrainConfig) -> dict[str, Any]:
    return held_out_estimate(
        classifier.probabilities_of(rows.at(classifier.tap))[:, 1],
        classifier.threshold,
        rows.targets,
        rows.weights,
        rows.groups,
        seed=config.seed,
    )


def _options(config: TrainConfig) -> dict[str, Any]:
    """Return the options as JSON has them: keys are texts."""
    options = asdict(config)
    if isinstance(config.class_weight, dict):
        options["class_weight"] = {str(label): weight for label, weight in config.class_weight.items()}
    return options
