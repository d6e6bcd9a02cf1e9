"""Classifiers by backbone: those of one backbone share its passes, others have passes of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TypeAlias

from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.classifier.artifact import read_manifest
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.evaluation.explanation import Baseline, Method, PlannedExplanation
from qwen_vl_classifier.serving.decisions.label_reader import LabelReader

Probabilities: TypeAlias = dict[str, tuple[float, float]]
"""Of class 0 and of class 1, by the classifier's name."""

Scoring: TypeAlias = tuple[EncodedExample, tuple[str, ...]]
"""One example as the backbone reads it, and the names of the classifiers that score it, or labels of an answer."""


class ServedPanel:
    """Classifiers that share a backbone.

    Args:
        classifiers: By name; at least one, and all of one backbone.

    Attributes:
        classifiers: The same.
        processor: Makes examples ready for the backbone; it may be shared with another panel.
    """

    def __init__(self, classifiers: dict[str, Classifier]) -> None:
        self.classifiers = classifiers
        self._backbone = Panel(list(classifiers.values())).backbone
        self.processor: Processor = self._backbone.processor

    def score(self, scorings: Sequence[Scoring]) -> list[Probabilities]:
        """Run one pass, no deeper than the classifiers that are named read, and their heads."""
        chosen = {name: self.classifiers[name] for _, names in scorings for name in names}
        taps = sorted({classifier.tap for classifier in chosen.values()})
        features = self._backbone.encode_prepared([example for example, _ in scorings], taps)
        found: list[Probabilities] = [{} for _ in scorings]
        for name, classifier in chosen.items():
            rows = [row for row, (_, names) in enumerate(scorings) if name in names]
            probabilities = classifier.probabilities_of(features[rows, taps.index(classifier.tap)])
            for row, (first, second) in zip(rows, probabilities.tolist(), strict=True):
                found[row][name] = (first, second)
        return found

    @cached_property
    def label_reader(self) -> LabelReader:
        """What answers questions in words by the backbone's own language head."""
        return LabelReader(self._backbone)

    def score_example(self, example: Example) -> Probabilities:
        """Score one example with all classifiers, from its pictures on."""
        (found,) = self.score([(self.processor.encode(example), tuple(self.classifiers))])
        return found

    def plan_explanation(
        self,
        name: str,
        example: Example,
        method: Method,
        baseline: Baseline | None,
        max_tokens: int,
        max_shared_tokens: int,
    ) -> PlannedExplanation:
        """Prepare the explanation of one answer; its passes are then run one at a time.

        Args:
            name: The classifier's name.
            example: The example.
            method: As in `evaluation.explain`.
            baseline: As in `evaluation.explain`.
            max_tokens: As for `PlannedExplanation`.
            max_shared_tokens: As for `PlannedExplanation`.
        """
        return PlannedExplanation(
            self.classifiers[name],
            example,
            method=method,
            baseline=baseline,
            max_tokens=max_tokens,
            max_shared_tokens=max_shared_tokens,
        )


def load_panels(
    folders: dict[str, str], device: str, model: str | None = None, max_text_tokens: int | None = None
) -> list[ServedPanel]:
    """Load saved classifiers, each backbone once and no deeper than the deepest of its classifiers reads.

    Args:
        folders: By the classifier's name.
        device: As in `Backbone.load`.
        model: Where the backbone is now, as in `Classifier.load`.
        max_text_tokens: As in `Backbone.load`.

    Raises:
        ArtifactError: A folder holds no classifier, or a backbone is not the one that it was saved with.
        CheckpointError: A backbone cannot be loaded.
    """
    by_backbone: dict[str, list[str]] = {}
    for name, folder in folders.items():
        by_backbone.setdefault(read_manifest(folder).backbone["fingerprint"], []).append(name)
    panels = []
    for names in by_backbone.values():
        chosen = [folders[name] for name in names]
        panel = Panel.load(chosen, device=device, model=model, max_text_tokens=max_text_tokens)
        panels.append(ServedPanel(dict(zip(names, panel.classifiers, strict=True))))
        panels[-1].label_reader  # noqa: B018  (its files are read now)
    _share_processors(panels)
    return panels


def _share_processors(panels: Sequence[ServedPanel]) -> None:
    """Let panels whose processors do the same have the same one, so that its work is done once for all of them.

    A classifier on a backbone and one on a fine-tuned copy of it read the same tokens and patches.
    """
    processors: dict[str, Processor] = {}
    for panel in panels:
        own = panel.processor
        key = json.dumps([own.fingerprint(), own.image_token_id, own.video_token_id], sort_keys=True)
        panel.processor = processors.setdefault(key, own)
