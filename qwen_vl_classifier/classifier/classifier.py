"""Classifier: backbone + tap + head, with one `predict_proba`, however they were trained."""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from qwen_vl_classifier.backbone.adapters import write_adapter
from qwen_vl_classifier.backbone.backbone import Backbone, as_backbone
from qwen_vl_classifier.backbone.devices import aligned
from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.classifier.abstention import abstention_band
from qwen_vl_classifier.classifier.artifact import (
    ADAPTER,
    BACKBONE,
    Manifest,
    read_head_weights,
    read_manifest,
    replacing,
    write_manifest,
)
from qwen_vl_classifier.classifier.average_picture import AVERAGE, read_average
from qwen_vl_classifier.classifier.calibration import (
    Calibration,
    Curve,
    fit_calibration,
)
from qwen_vl_classifier.classifier.head import NUM_CLASSES, HeadSpec, fold_line, load_head_weights
from qwen_vl_classifier.classifier.model_card import accuracy_text, answer_facts, training_text
from qwen_vl_classifier.classifier.own_backbone import check_backbone, load_backbone
from qwen_vl_classifier.classifier.probabilities import check_numbers
from qwen_vl_classifier.classifier.reference_feature import make_reference
from qwen_vl_classifier.classifier.rethresholding import checked_threshold, record_at_threshold
from qwen_vl_classifier.classifier.score_distribution import RECORDED, distribution_record
from qwen_vl_classifier.classifier.thresholds import choose_threshold
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Decision, Prediction
from qwen_vl_classifier.data.labels import PLAIN_NAMES
from qwen_vl_classifier.data.loading import Source, as_examples
from qwen_vl_classifier.data.targets import labels_of
from qwen_vl_classifier.errors import ConfigError, shown
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.html_pieces import fact_card
from qwen_vl_classifier.objectives import Objective

_log = logging.getLogger(__name__)

DEFAULT_THRESHOLD = 0.5

_ZERO_SHOT, _CALIBRATED_ZERO_SHOT = "zero-shot", "calibrated zero-shot"  # methods of a training record
_LIBRARIES = ("qwen-vl-classifier", "torch", "transformers")


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that compute features, for a saved folder."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


class Classifier:
    """A binary classifier of image + text.

    Make one with `train`, `Classifier.load` or `Classifier.zero_shot`.

    Attributes:
        backbone: Turns examples into features.
        tap: Where features are read.
        head: Turns a feature into two logits.
        spec: The head's shape.
        temperature: Divides the logits before softmax.
        isotonic: Knots of a curve through which the probability of class 1 then goes, as in `Calibration`, or `None`.
        threshold: Probability of class 1 from which the label is 1.
        abstention: Band of probabilities, both ends included, in which `decide` abstains; `None` never abstains.
        label_names: What class 0 and class 1 are called.
        training: The record of its training.
        average: The average picture of the training rows, small and of mode RGB, or `None`; `explain` compares with it.
        finetuned: Whether the backbone's own weights differ from those of the checkpoint it was loaded from; an
            adapter (`backbone.adapter`) is not among them.
        classes_: The classes, in the order of the columns of `predict_proba`.
    """

    classes_ = (0, 1)

    def __init__(
        self,
        backbone: Backbone,
        tap: Tap,
        head: nn.Module,
        spec: HeadSpec,
        *,
        temperature: float = 1.0,
        isotonic: Curve | None = None,
        threshold: float = DEFAULT_THRESHOLD,
        abstention: tuple[float, float] | None = None,
        label_names: tuple[str, str] = ("0", "1"),
        training: dict[str, Any] | None = None,
        average: Image.Image | None = None,
        finetuned: bool = False,
    ) -> None:
        self.backbone = backbone
        self.tap = tap
        self.head = head.float().eval()
        self.spec = spec
        self.temperature = temperature
        self.isotonic = isotonic
        self.threshold = threshold
        self.abstention = abstention
        self.label_names = label_names
        self.training = training or {}
        self.average = average
        self.finetuned = finetuned

    def __repr__(self) -> str:
        negative, positive = map(shown, self.label_names)
        names = "" if self.label_names == PLAIN_NAMES else f"1 is {positive}, 0 is {negative}, "
        where = f"{self.spec.kind} head at {self.tap} of {shown(self.backbone.name)}"
        return f"<Classifier: {where}, {names}threshold {self.threshold:.4g}>"

    def _repr_html_(self) -> str:
        """Return a card for notebooks."""
        estimate = self.training.get("estimate")
        return fact_card(
            "Binary classifier of image + text",
            {
                "class 1": self.label_names[1],
                "class 0": self.label_names[0],
                "backbone": self.backbone.name,
                "layers": self.backbone.describe_layers(self.tap),
                "tap": str(self.tap),
                "head": self.spec.kind,
                "threshold": f"{self.threshold:.4g}",
                "abstains": "never" if self.abstention is None else "from {:.4g} to {:.4g}".format(*self.abstention),
                **answer_facts(self.training),
                **({"on new rows": text} if (text := accuracy_text(estimate)) else {}),
            },
        )

    @classmethod
    def zero_shot(cls, backbone: Backbone | str | os.PathLike[str], *, yes: str = "Yes", no: str = "No") -> Classifier:
        """Make a classifier without any labels: P(yes) / (P(yes) + P(no)) as the next token.

        It is a linear head on the last token after the final norm, whose weights are two rows of the language head.

        Args:
            backbone: One whose checkpoint has a language head, or its name, as `Backbone.load` takes it.
            yes: The word for class 1; one token.
            no: The word for class 0; one token.

        Raises:
            ConfigError: A word is not one token.
            CheckpointError: The checkpoint has no language head.
        """
        backbone = as_backbone(backbone)
        spec = HeadSpec("linear", backbone.hidden_size)
        head = spec.build()
        load_head_weights(
            head,
            {"weight": backbone.token_rows([no, yes]), "bias": torch.zeros(NUM_CLASSES)},
            source=backbone.name,
        )
        return cls(
            backbone,
            Tap(LAST_NORM, "last"),
            head,
            spec,
            label_names=(no, yes),
            training={"method": _ZERO_SHOT},
        )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str = "auto",
        backbone: Backbone | None = None,
        model: str | os.PathLike[str] | None = None,
        max_text_tokens: int | None = None,
    ) -> Classifier:
        """Load a saved classifier; it gives the probabilities that it gave when it was saved.

        Args:
            folder: Where it was saved.
            device: As in `Backbone.load`.
            backbone: A backbone that is loaded already, to share it; it must be the one of the classifier.
            model: Where the backbone is now, if not where it was when the classifier was trained. Where fine-tuning put
                the backbone into the classifier's own folder, it is not looked at.
            max_text_tokens: As in `Backbone.load`.

        Raises:
            ArtifactError: A file is missing, damaged or of another format, or the backbone is not the same.
            CheckpointError: The backbone cannot be loaded.
            MissingExtraError: It has an adapter or is quantised, and what that needs is not installed.
        """
        began = time.perf_counter()
        folder = Path(folder)
        manifest = read_manifest(folder)
        weights = read_head_weights(folder, manifest.head)
        head = manifest.head.build()
        load_head_weights(head, weights, source=str(folder))
        if backbone is None:
            backbone = load_backbone(folder, manifest, device, model, max_text_tokens)
        check_backbone(backbone, manifest, folder)
        _log.debug(
            "loaded classifier %s: %s head at %s, in %.1f s, backbone included",
            folder,
            manifest.head.kind,
            manifest.tap,
            time.perf_counter() - began,
        )
        return cls(
            backbone,
            manifest.tap,
            head,
            manifest.head,
            temperature=manifest.temperature,
            isotonic=manifest.isotonic,
            threshold=manifest.threshold,
            abstention=manifest.abstention,
            label_names=manifest.label_names,
            training=manifest.training,
            average=read_average(folder),
            finetuned=manifest.backbone["finetuned"],
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Save as a folder in format 1; an older classifier of that name is replaced in one step.

        Returns:
            The folder.

        Raises:
            ArtifactError: The folder holds something else or cannot be written, or a value is impossible; the
                classifier and what the folder holds stay as they are.
        """
        folder = Path(folder)
        finetuned = self.finetuned or self.backbone.changed
        backbone = self.backbone
        with replacing(folder) as partial:
            if finetuned:
                backbone = copy.copy(backbone)  # what cannot be saved must not change the one in use
                backbone.save(partial / BACKBONE)
            if backbone.adapter is not None:
                write_adapter(backbone, partial / ADAPTER)
            self.write_head(partial, backbone, finetuned=finetuned, reference=make_reference(backbone, self.tap))
        if finetuned:
            backbone.folder = folder / BACKBONE
            vars(self.backbone).update(vars(backbone))
            self.finetuned = True
        return folder

    def write_head(
        self, folder: Path, backbone: Backbone, *, finetuned: bool, reference: dict[str, str] | None
    ) -> Manifest:
        """Write what a saved classifier consists of, but for weights of its backbone, into an existing folder.

        Args:
            folder: Where to.
            backbone: The backbone as the folder describes it.
            finetuned: Whether its own weights were saved beside it.
            reference: What `make_reference` returned for the backbone and the tap.

        Returns:
            The content of its `classifier.json`.

        Raises:
            ArtifactError: A value that could not be read back.
            OSError: A file cannot be written.
        """
        if self.average is not None:
            self.average.save(folder / AVERAGE)
        described = {
            "name": backbone.name,
            "revision": backbone.revision,
            "family": backbone.family.model_type,
            "layers": backbone.describe_layers(self.tap),
            "fingerprint": backbone.fingerprint,
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "quantization": backbone.quantization,
            "finetuned": finetuned,
            "adapter": backbone.adapter is not None,
            "keeps_prompt": not backbone.processor.brings_template,
            "folder": None if backbone.local_folder is None else str(backbone.local_folder),
        }
        manifest = Manifest(
            backbone=described,
            tap=self.tap,
            pixel_limits=backbone.pixel_limits,
            prompt=backbone.processor.chat_template,
            head=self.spec,
            label_names=self.label_names,
            temperature=self.temperature,
            isotonic=self.isotonic,
            threshold=self.threshold,
            abstention=self.abstention,
            training=self.training,
            versions=library_versions(),
            reference=reference,
        )
        write_manifest(folder, manifest, self.head.state_dict())
        return manifest

    def calibrate(
        self,
        examples: Source,
        *,
        objective: str = "accuracy",
        target_error_rate: float | None = None,
        abstention_examples: Source | None = None,
        groups: npt.NDArray[np.integer[Any]] | None = None,
        store: FeatureStore | None = None,
        progress: bool = False,
    ) -> Classifier:
        """Make a classifier with the same head and new calibration, threshold and abstention band.

        The answers of a zero-shot classifier get a scale and a bias (`fit_platt`), folded into its head; those of any
        other a temperature or, from many examples, an isotonic curve. A new calibration is kept only where it is
        better than the present one on rows that it was not fitted on (`fit_calibration`). The results are in its
        `training` under `calibration`, `threshold`, `abstention` and `score_distribution`.

        Args:
            examples: With labels of both classes, anything that `load_examples` takes; the head must not have been
                trained on them.
            objective: What the threshold optimises, as in `Objective`.
            target_error_rate: Target error rate over all examples: abstain in a band around the threshold, so wide that
                the expected share of all examples that are decided wrongly is at most this; see `abstention_band`.
                `None` never abstains.
            abstention_examples: With labels, for the band and nothing else: its guarantee holds for examples that were
                used neither for the head nor in `examples`, and that share no picture with them.
            groups: Shape (examples,): examples of one group, such as one picture, count as belonging together.
            store: Where features are kept, if anywhere.
            progress: Show a progress bar.

        Raises:
            ConfigError: A malformed objective, or one of `target_error_rate` and `abstention_examples` without the
                other.
            DataError: Missing labels, or one class only.
            TrainingError: The objective is out of reach, or there are too few examples for the band.
        """
        goal = Objective.parse(objective)
        examples = as_examples(examples, class_names=self.label_names)
        if abstention_examples is not None:
            abstention_examples = as_examples(abstention_examples, class_names=self.label_names)
        if (target_error_rate is None) != (abstention_examples is None):
            raise ConfigError(
                f"target_error_rate {target_error_rate} with {len(abstention_examples or ())} abstention_examples; "
                "give both or neither: the band needs labelled examples that were used for nothing else"
            )
        labels = labels_of(examples, what="calibration")
        band_labels = labels_of(abstention_examples, what="abstention", both=False) if abstention_examples else None
        shared = len({id(example) for example in examples} & {id(example) for example in abstention_examples or ()})
        if shared:
            raise ConfigError(f"{shared} of the abstention_examples are among the examples; give others for the band")
        features = extract_features(examples, self.backbone, [self.tap], store=store, progress=progress)[:, 0]
        logits, made = check_numbers(self.logits_of(features)), copy.copy(self)
        fit = fit_calibration(
            logits,
            labels,
            groups=groups,
            start=Calibration(self.temperature, self.isotonic),
            zero_shot=self.training.get("method") in (_ZERO_SHOT, _CALIBRATED_ZERO_SHOT),
            isotonic=not self.trained_exportable,
        )
        made.temperature, made.isotonic = fit.calibration.temperature, fit.calibration.isotonic
        if fit.line:
            made.head = copy.deepcopy(self.head)
            fold_line(made.head, *fit.line)
        probability = made.probabilities_of(features)[:, 1]
        made.threshold = choose_threshold(probability, labels, goal)
        made.abstention = None
        made.training = {name: value for name, value in self.training.items() if name not in ("abstention", RECORDED)}
        made.training |= {
            "calibration": fit.record,
            "threshold": {"objective": str(goal), "threshold": made.threshold},
            **distribution_record(probability),
        }
        if fit.line:
            made.training["method"] = _CALIBRATED_ZERO_SHOT
        if target_error_rate is not None and abstention_examples is not None and band_labels is not None:
            probability = made.predict_proba(abstention_examples, store=store, progress=progress)[:, 1]
            found = abstention_band(probability, band_labels, made.threshold, target_error_rate)
            made.abstention = found.band
            made.training["abstention"] = found.to_json()
        return made

    def with_threshold(self, threshold: float, *, objective: str | None = None) -> Classifier:
        """Make a classifier with another threshold, and the same probabilities.

        It never abstains: a band belongs to the threshold for which it was computed. In its `training`, the estimates
        of accuracy become unknown, since they were made at the threshold before.

        Args:
            threshold: Probability of class 1 from which the label is 1, from 0 to 1.
            objective: What it was chosen for, for the record; `None` records that it was set by hand.

        Raises:
            ConfigError: It is not a number from 0 to 1, or the objective is malformed.

        Example:
            >>> strict = classifier.with_threshold(0.9)  # doctest: +SKIP
        """
        made = copy.copy(self)
        made.threshold, made.abstention = checked_threshold(threshold), None
        made.training = record_at_threshold(self.training, made.threshold, objective)
        return made

    def with_objective(
        self, objective: str, examples: Source, *, store: FeatureStore | None = None, progress: bool = False
    ) -> Classifier:
        """Make a classifier whose threshold is best for an objective on labelled examples.

        Its probabilities are the same, and it never abstains, as in `with_threshold`. `calibrate` chooses a threshold
        too, and fits the calibration again.

        Args:
            objective: "accuracy", "f1", "balanced", "recall>=R", "precision>=P" or "cost=FN:FP", as in `Objective`.
            examples: With labels, anything that `load_examples` takes; the head must not have been trained on them.
                On new examples, a recall or precision is met about as often as it is missed.
            store: Where features are kept, if anywhere.
            progress: Show a progress bar.

        Raises:
            ConfigError: A malformed objective.
            DataError: Missing labels.
            TrainingError: The objective is out of reach, or needs examples of a class that has none.

        Example:
            >>> careful = classifier.with_objective("recall>=0.95", "dev.jsonl")  # doctest: +SKIP
        """
        goal = Objective.parse(objective)
        examples = as_examples(examples, class_names=self.label_names)
        labels = labels_of(examples, what="threshold", both=False)
        probability = self.predict_proba(examples, store=store, progress=progress)[:, 1]
        return self.with_threshold(choose_threshold(probability, labels, goal), objective=objective)

    @property
    def trained_exportable(self) -> bool:
        """Whether it, or the classifier that fine-tuning started from, was trained with `exportable`."""
        record: Any = self.training
        while isinstance(record, dict):
            if "exportable" in record:
                return True
            record = record.get("start")
        return False

    @property
    def training_text(self) -> str | None:
        """The text that all training rows had, or `None`: where there is one, pictures can be given without a text."""
        return training_text(self.training)

    def predict_proba(
        self,
        examples: Source,
        *,
        store: FeatureStore | None = None,
        progress: bool = False,
        bad: BadRows | None = None,
    ) -> npt.NDArray[np.float64]:
        """Return calibrated probabilities.

        Args:
            examples: What to classify: anything that `load_examples` takes, such as examples, dicts, a DataFrame, or
                one example alone. Labels are not looked at.
            store: Where features are kept, if anywhere.
            progress: Show a progress bar.
            bad: Receives the examples that cannot be used, which are left out of the result. Examples that are in it
                already are skipped. Without it they are an error.

        Returns:
            float64, shape (n, 2): the probability of class 0 and of class 1.

        Raises:
            ArtifactError: A probability is not a number.
        """
        features = extract_features(examples, self.backbone, [self.tap], store=store, progress=progress, bad=bad)
        return check_numbers(self.probabilities_of(features[:, 0]))

    def predict(self, examples: Source) -> npt.NDArray[np.int64]:
        """Return the class of each example, shape (n,): 1 where its probability reaches the threshold."""
        return (self.predict_proba(examples)[:, 1] >= self.threshold).astype(np.int64)

    def decide(self, examples: Source, *, progress: bool = False, bad: BadRows | None = None) -> list[Prediction]:
        """Return label, probability of class 1 and decision of each example; arguments are as in `predict_proba`."""
        probabilities = self.predict_proba(examples, progress=progress, bad=bad)
        return [self.decision_of(float(p)) for p in probabilities[:, 1]]

    def decision_of(self, probability: float) -> Prediction:
        """Turn a probability of class 1 into label and decision."""
        label = int(probability >= self.threshold)
        decision: Decision = "yes" if label else "no"
        if self.abstention and self.abstention[0] <= probability <= self.abstention[1]:
            decision = "abstain"
        return Prediction(label, probability, decision, self.label_names[label])

    def probabilities_of(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return calibrated probabilities, shape (n, 2), from features of shape (n, hidden) read at the tap."""
        return Calibration(self.temperature, self.isotonic).apply(self.logits_of(features))

    @torch.inference_mode()
    def logits_of(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the head's logits, shape (n, 2), from features of shape (n, hidden) read at the tap.

        They are NaN where a feature is: an infinite one would make the head sure.
        """
        inputs = aligned(features)
        logits: npt.NDArray[np.float32] = self.head(inputs.to(next(self.head.parameters()).device)).cpu().numpy()
        logits[~np.isfinite(features).all(axis=1)] = np.nan
        return logits
