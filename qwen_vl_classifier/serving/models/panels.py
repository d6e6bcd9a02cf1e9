"""Classifiers by backbone: those of one backbone share its passes, others have passes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TypeAlias

from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
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
        backbone: Theirs.
        processor: Makes examples ready for the backbone; it may be shared with another panel.
    """

    def __init__(self, classifiers: dict[str, Classifier]) -> None:
        self.classifiers = classifiers
        self.backbone = Panel(list(classifiers.values())).backbone
        self.processor: Processor = self.backbone.processor

    def without(self, name: str) -> ServedPanel | None:
        """Return a panel of all other classifiers, or `None` if there are none."""
        others = {other: classifier for other, classifier in self.classifiers.items() if other != name}
        if not others:
            return None
        panel = ServedPanel(others)
        panel.processor = self.processor
        if "label_reader" in vars(self):
            panel.label_reader = self.label_reader
        return panel

    def score(self, scorings: Sequence[Scoring]) -> list[Probabilities]:
        """Run one pass, no deeper than the classifiers that are named read, and their heads."""
        chosen = {name: self.classifiers[name] for _, names in scorings for name in names}
        taps = sorted({classifier.tap for classifier in chosen.values()})
        features = self.backbone.encode_prepared([example for example, _ in scorings], taps)
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
        return LabelReader(self.backbone)

    def score_example(self, example: Example, names: Sequence[str]) -> Probabilities:
        """Score one example with some of the classifiers, from its pictures on."""
        (found,) = self.score([(self.processor.encode(example), tuple(names))])
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
