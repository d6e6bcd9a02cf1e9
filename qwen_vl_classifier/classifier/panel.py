"""Panel: several classifiers that share one backbone and its passes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.classifier.artifact import read_manifest
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.probabilities import check_numbers
from qwen_vl_classifier.data.loading import Source
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore


class Panel:
    """Several classifiers that share a backbone: one pass serves them all.

    Args:
        classifiers: At least one, all with the same backbone.

    Raises:
        ConfigError: No classifiers, or different backbones.
    """

    def __init__(self, classifiers: Sequence[Classifier]) -> None:
        if not classifiers:
            raise ConfigError("a panel of no classifiers: give at least one")
        first = classifiers[0].backbone
        for classifier in classifiers[1:]:
            if classifier.backbone is not first and classifier.backbone.fingerprint != first.fingerprint:
                raise ConfigError(
                    f"a panel shares one pass, but its classifiers read {first.name} and "
                    f"{classifier.backbone.name} (or other settings of it); make one panel for each backbone"
                )
        self.classifiers = tuple(classifiers)
        deepest = LAST_NORM if any(c.tap.layer == LAST_NORM for c in classifiers) else None
        self.backbone = next(
            (c.backbone for c in classifiers if c.tap.layer == deepest),
            max((c.backbone for c in classifiers), key=lambda backbone: backbone.num_layers),
        )

    @classmethod
    def load(
        cls,
        folders: Sequence[str | os.PathLike[str]],
        *,
        device: str = "auto",
        model: str | os.PathLike[str] | None = None,
        max_text_tokens: int | None = None,
    ) -> Panel:
        """Load saved classifiers, their backbone once and no deeper than the deepest tap.

        Args:
            folders: Where they were saved.
            device: As in `Backbone.load`.
            model: Where the backbone is now, as in `Classifier.load`.
            max_text_tokens: As in `Backbone.load`.

        Raises:
            ArtifactError: A folder holds no classifier, or a backbone is not the one that it was saved with.
            ConfigError: No folders, or different backbones.
        """
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
        return cls(
            [
                first if index == deepest else Classifier.load(folder, backbone=first.backbone)
                for index, folder in enumerate(folders)
            ]
        )

    def predict_proba(
        self, examples: Source, *, store: FeatureStore | None = None, progress: bool = False
    ) -> npt.NDArray[np.float64]:
        """Return the probability of class 1 by each classifier: float64, shape (n, classifiers).

        Raises:
            ArtifactError: A probability is not a number.
        """
        features = extract_features(examples, self.backbone, self.taps, store=store, progress=progress)
        return check_numbers(self.probabilities_of(features))

    @property
    def taps(self) -> list[Tap]:
        """The taps at which the classifiers read, each once, in a fixed order."""
        return sorted({classifier.tap for classifier in self.classifiers})

    def probabilities_of(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return the probability of class 1 by each classifier from features read at `taps`.

        Args:
            features: Shape (n, taps, hidden).

        Returns:
            Shape (n, classifiers).
        """
        taps = self.taps
        return np.stack([c.probabilities_of(features[:, taps.index(c.tap)])[:, 1] for c in self.classifiers], axis=1)
