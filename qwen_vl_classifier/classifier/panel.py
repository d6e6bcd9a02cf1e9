"""Panel: several classifiers that share one backbone and its passes, for several labels or one of several classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qwen_vl_classifier.backbone.devices import aligned
from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.classifier.artifact import read_manifest, replacing
from qwen_vl_classifier.classifier.calibration import Calibration
from qwen_vl_classifier.classifier.classifier import Classifier, library_versions
from qwen_vl_classifier.classifier.head import HeadStack
from qwen_vl_classifier.classifier.model_card import accuracy_text, panel_card
from qwen_vl_classifier.classifier.panel_folder import (
    TEMPERATURES,
    PanelManifest,
    folder_names,
    names_problem,
    read_panel,
    write_panel,
)
from qwen_vl_classifier.classifier.probabilities import Float, check_numbers, one_of_probabilities, probabilities
from qwen_vl_classifier.classifier.reference_feature import make_reference
from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import PanelPrediction, Prediction
from qwen_vl_classifier.data.loading import Source
from qwen_vl_classifier.errors import ArtifactError, ConfigError, first_of, shown
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.html_pieces import fact_card, row_table

_MOST_NAMED = 5  # labels in a representation
_SHOWN_LABELS = 20  # in a notebook


class Panel:
    """Several classifiers that share a backbone: one pass serves them all.

    They answer for several labels of a row, each for itself, or say which one of several classes a row has. Make one
    with `train_panel` or `Panel.load`, or of any classifiers with the same backbone.

    Args:
        classifiers: At least one, all with the same backbone.
        names: What their labels are called, all different; by default "1", "2" and so on.
        one_of: Whether every row has exactly one of the labels. Their probabilities then sum to 1.
        temperature: Of these probabilities, as in `one_of_probabilities`.
        training: The record of its training.

    Raises:
        ConfigError: No classifiers, different backbones, impossible names, or one class alone to choose from.

    Attributes:
        classifiers: The same.
        names: The same.
        one_of: The same.
        temperature: The same.
        training: The same.
        backbone: The one that reaches as deep as any classifier reads.
    """

    def __init__(
        self,
        classifiers: Sequence[Classifier],
        *,
        names: Sequence[str] | None = None,
        one_of: bool = False,
        temperature: float = 1.0,
        training: dict[str, Any] | None = None,
    ) -> None:
        if not classifiers:
            raise ConfigError("a panel of no classifiers: give at least one")
        first = classifiers[0].backbone
        for classifier in classifiers[1:]:
            if classifier.backbone is not first and classifier.backbone.fingerprint != first.fingerprint:
                raise ConfigError(
                    f"a panel shares one pass, but its classifiers read {first.name} and "
                    f"{classifier.backbone.name} (or other settings of it); make one panel for each backbone"
                )
        if names is None:
            names = [str(number) for number in range(1, len(classifiers) + 1)]
        elif problem := names_problem(names):
            raise ConfigError(f"names of a panel: {problem}")
        if len(names) != len(classifiers):
            raise ConfigError(f"a panel of {len(classifiers)} classifiers with {len(names)} names; give one for each")
        if one_of and len(names) == 1:
            raise ConfigError("a panel with one_of=True and one class; expected at least two to choose from")
        if not is_number(temperature, *TEMPERATURES):
            raise ConfigError(f"temperature {shown(temperature)} of a panel; expected a number above 0")
        self.classifiers = tuple(classifiers)
        self.names = tuple(names)
        self.one_of = one_of
        self.temperature = float(temperature)
        self.training = training or {}
        deepest = LAST_NORM if any(c.tap.layer == LAST_NORM for c in classifiers) else None
        self.backbone = next(
            (c.backbone for c in classifiers if c.tap.layer == deepest),
            max((c.backbone for c in classifiers), key=lambda backbone: backbone.num_layers),
        )

    def __repr__(self) -> str:
        what = f"one of {len(self.names)} classes" if self.one_of else f"{len(self.names)} labels"
        names = first_of([shown(name) for name in self.names], most=_MOST_NAMED)
        return f"<Panel: {what} ({names}) on {shown(self.backbone.name)}>"

    def _repr_html_(self) -> str:
        """Return a card with a table of the labels, for notebooks."""
        card = fact_card(
            "Panel of classifiers of image + text",
            {
                "answers": "exactly one of these classes" if self.one_of else "each label for itself",
                "labels": len(self.names),
                "backbone": self.backbone.name,
                **({"temperature": f"{self.temperature:.4g}"} if self.one_of else {}),
            },
        )
        rows = [
            [name, str(one.tap), one.spec.kind, f"{one.threshold:.4g}", accuracy_text(one.training.get("estimate"))]
            for name, one in zip(self.names[:_SHOWN_LABELS], self.classifiers, strict=False)
        ]
        more = len(self.names) - len(rows)
        notes = [f"and {more} more"] if more else []
        return card + row_table(("label", "tap", "head", "threshold", "on new rows"), rows, numbers=(3,), notes=notes)

    @classmethod
    def load(
        cls,
        folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        device: str = "auto",
        model: str | os.PathLike[str] | None = None,
        max_text_tokens: int | None = None,
    ) -> Panel:
        """Load a saved panel, or saved classifiers: their backbone once, and no deeper than the deepest tap.

        Args:
            folders: Where the panel was saved; or a list of the folders of classifiers, which are then called "1", "2"
                and so on.
            device: As in `Backbone.load`.
            model: Where the backbone is now, as in `Classifier.load`.
            max_text_tokens: As in `Backbone.load`.

        Raises:
            ArtifactError: A folder holds no panel or classifier, or a backbone is not the one that it was saved with.
            ConfigError: No folders, or different backbones.
        """
        saved: PanelManifest | None = None
        if isinstance(folders, (str, os.PathLike)):
            saved = read_panel(folders)
            folders = saved.folders
        if not folders:
            raise ConfigError("a panel of no classifiers: give at least one folder")
        manifests = [read_manifest(folder) for folder in folders]

        def depth(index: int) -> float:
            layer = manifests[index].tap.layer
            return float("inf") if layer == LAST_NORM else layer

        deepest = max(range(len(folders)), key=depth)
        for folder, manifest in zip(folders, manifests, strict=True):
            if manifest.backbone["fingerprint"] != manifests[deepest].backbone["fingerprint"]:
                raise ConfigError(
                    f"a panel shares one pass, but {folders[deepest]} and {folder} read different backbones; "
                    "make one panel for each backbone"
                )
        first = Classifier.load(folders[deepest], device=device, model=model, max_text_tokens=max_text_tokens)
        classifiers = [
            first if index == deepest else Classifier.load(folder, backbone=first.backbone)
            for index, folder in enumerate(folders)
        ]
        if saved is None:
            return cls(classifiers)
        return cls(
            classifiers,
            names=saved.names,
            one_of=saved.one_of,
            temperature=saved.temperature,
            training=saved.training,
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Save as a folder: `panel.json`, and the classifier of each label in a folder of its own.

        An older panel of that name is replaced in one step.

        Returns:
            The folder.

        Raises:
            ArtifactError: The folder holds something else or cannot be written, or the backbone was fine-tuned.
        """
        folder = Path(folder)
        for name, classifier in zip(self.names, self.classifiers, strict=True):
            backbone = classifier.backbone
            if classifier.finetuned or backbone.changed or backbone.adapter is not None:
                raise ArtifactError(
                    f"{folder}: the backbone of {shown(name)} was fine-tuned or has an adapter, and a panel folder "
                    "holds heads alone; save each classifier for itself, and load them together with Panel.load"
                )
        inner = folder_names(self.names)
        references = {one.tap: make_reference(one.backbone, one.tap) for one in self.classifiers}
        manifest = PanelManifest(
            self.names,
            tuple(map(Path, inner)),
            one_of=self.one_of,
            temperature=self.temperature,
            training=self.training,
            versions=library_versions(),
        )
        with replacing(folder, panel=True) as partial:
            written = []
            for name, classifier in zip(inner, self.classifiers, strict=True):
                (partial / name).mkdir()
                reference = references[classifier.tap]
                written.append(
                    classifier.write_head(partial / name, classifier.backbone, finetuned=False, reference=reference)
                )
            (partial / "README.md").write_text(panel_card(manifest, written), encoding="utf-8")
            write_panel(partial, manifest)
        return folder

    def predict_proba(
        self,
        examples: Source,
        *,
        store: FeatureStore | None = None,
        progress: bool = False,
        bad: BadRows | None = None,
    ) -> Float:
        """Return the probability of each label: float64, shape (n, labels); with `one_of`, each line sums to 1.

        Args:
            examples: What to classify: anything that `load_examples` takes. Labels are not looked at.
            store: Where features are kept, if anywhere.
            progress: Show a progress bar.
            bad: As in `Classifier.predict_proba`.

        Raises:
            ArtifactError: A probability is not a number.
        """
        features = extract_features(examples, self.backbone, self.taps, store=store, progress=progress, bad=bad)
        return check_numbers(self.probabilities_of(features))

    def predict(self, examples: Source) -> npt.NDArray[np.int64]:
        """Return the classes of each example.

        Returns:
            Shape (n, labels): 1 where the probability of a label reaches its threshold. With `one_of`, shape (n,): the
            number of the likeliest class in `names`, from 0.
        """
        found = self.predict_proba(examples)
        if self.one_of:
            chosen: npt.NDArray[np.int64] = found.argmax(axis=1).astype(np.int64)
            return chosen
        labels: npt.NDArray[np.int64] = (found >= [one.threshold for one in self.classifiers]).astype(np.int64)
        return labels

    def decide(self, examples: Source, *, progress: bool = False, bad: BadRows | None = None) -> list[PanelPrediction]:
        """Return the answers for each example; arguments are as in `predict_proba`."""
        return self.decisions_of(self.predict_proba(examples, progress=progress, bad=bad))

    def decisions_of(self, found: Float) -> list[PanelPrediction]:
        """Turn probabilities, as `predict_proba` returns them, into answers: one for each line."""
        return [self._chosen(row) if self.one_of else self._decided(row) for row in found.tolist()]

    @property
    def taps(self) -> list[Tap]:
        """The taps at which the classifiers read, each once, in a fixed order."""
        return sorted({classifier.tap for classifier in self.classifiers})

    def probabilities_of(self, features: npt.NDArray[np.float32]) -> Float:
        """Return what `predict_proba` does, from features read at `taps`.

        Args:
            features: Shape (n, taps, hidden).

        Returns:
            Shape (n, labels).
        """
        return self.joint_probabilities(self.own_probabilities_of(features))

    def joint_probabilities(self, own: Float) -> Float:
        """Return what `predict_proba` does, from what `own_probabilities_of` returned."""
        return one_of_probabilities(own, self.temperature) if self.one_of else own

    def own_probabilities_of(self, features: npt.NDArray[np.float32]) -> Float:
        """Return the probability of class 1 by each classifier for itself, whatever `one_of` says.

        Arguments and shapes are as in `probabilities_of`.
        """
        found = np.empty((len(features), len(self.classifiers)))
        for tap, columns, heads in self._stacks:
            if len(columns) == 1:  # to the last bit what the classifier says by itself
                found[:, columns[0]] = self.classifiers[columns[0]].probabilities_of(features[:, tap])[:, 1]
            else:
                found[:, columns] = self._calibrated(_logits_of(heads, features[:, tap]), columns)
        return found

    @cached_property
    def _stacks(self) -> list[tuple[int, list[int], HeadStack]]:
        """Heads of one shape at one tap: the tap's number, theirs, and the heads."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, one in enumerate(self.classifiers):
            groups.setdefault((one.tap, one.spec, next(one.head.parameters()).device), []).append(number)
        taps = self.taps
        return [
            (taps.index(tap), columns, HeadStack([self.classifiers[number].head for number in columns]))
            for (tap, *_), columns in groups.items()
        ]

    def _calibrated(self, logits: npt.NDArray[np.float32], columns: Sequence[int]) -> Float:
        """Calibrate logits of shape (n, columns, 2); return probabilities of class 1, shape (n, columns)."""
        chosen = [self.classifiers[number] for number in columns]
        scaled = logits.astype(np.float64) / np.array([one.temperature for one in chosen])[:, None]
        found = probabilities(scaled.reshape(-1, 2))[:, 1].reshape(logits.shape[:2])
        for number, one in enumerate(chosen):
            if one.isotonic is not None:
                found[:, number] = Calibration(one.temperature, one.isotonic).apply(logits[:, number])[:, 1]
        return found

    def _decided(self, row: Sequence[float]) -> PanelPrediction:
        answers = zip(self.names, self.classifiers, row, strict=True)
        return PanelPrediction({name: one.decision_of(probability) for name, one, probability in answers})

    def _chosen(self, row: Sequence[float]) -> PanelPrediction:
        chosen = int(np.argmax(row))
        labels = {
            name: Prediction(
                int(number == chosen),
                probability,
                "yes" if number == chosen else "no",
                one.label_names[int(number == chosen)],
            )
            for number, (name, one, probability) in enumerate(zip(self.names, self.classifiers, row, strict=True))
        }
        return PanelPrediction(labels, self.names[chosen], row[chosen])


@torch.inference_mode()
def _logits_of(heads: HeadStack, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return logits, shape (n, heads, 2); as `Classifier.logits_of`, NaN where a feature is not finite."""
    logits: npt.NDArray[np.float32] = heads.logits_of(aligned(features)).cpu().numpy()
    logits[~np.isfinite(features).all(axis=1)] = np.nan
    return logits
