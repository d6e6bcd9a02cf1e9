"""Classifiers by backbone: those of one backbone share its passes, others have passes of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.data.example import Example, PanelPrediction
from qwen_vl_classifier.evaluation.explanation import Baseline, Method, PlannedExplanation
from qwen_vl_classifier.serving.decisions.label_reader import LabelReader
from qwen_vl_classifier.serving.models.label_names import label_model

Probabilities: TypeAlias = dict[str, tuple[float, float]]
"""Of class 0 and of class 1, by the classifier's name."""

Scoring: TypeAlias = tuple[EncodedExample, tuple[str, ...]]
"""One example as the backbone reads it, and the names of what scores it, or labels of an answer."""


class ServedPanel:
    """Classifiers that share a backbone.

    Args:
        classifiers: By name; at least one, and all of one backbone.
        saved: Panels that were saved as such, by name. The classifiers of their labels are among `classifiers`, by the
            names of `label_model`.

    Attributes:
        classifiers: The same.
        saved: The same.
        backbone: Theirs.
        processor: Makes examples ready for the backbone; it may be shared with another panel.
    """

    def __init__(self, classifiers: dict[str, Classifier], saved: Mapping[str, Panel] | None = None) -> None:
        self.classifiers = classifiers
        self.saved = dict(saved or {})
        self.backbone = Panel(list(classifiers.values())).backbone
        self.processor: Processor = self.backbone.processor

    def has(self, name: str) -> bool:
        """Tell whether a name is that of a classifier or saved panel in this panel."""
        return name in self.classifiers or name in self.saved

    def without(self, name: str) -> ServedPanel | None:
        """Return a panel of all others than a classifier or saved panel, or `None` if there are none."""
        gone = {name, *(label_model(name, label) for label in self.saved[name].names)} if name in self.saved else {name}
        others = {other: classifier for other, classifier in self.classifiers.items() if other not in gone}
        if not others:
            return None
        panel = ServedPanel(others, {other: saved for other, saved in self.saved.items() if other != name})
        panel.processor = self.processor
        if "label_reader" in vars(self):
            panel.label_reader = self.label_reader
        return panel

    def score(self, scorings: Sequence[Scoring]) -> list[Probabilities]:
        """Run one pass, no deeper than the classifiers that are named read, and their heads."""
        rows_of: dict[str, list[int]] = {}
        for row, (_, names) in enumerate(scorings):
            for name in names:
                rows_of.setdefault(name, []).append(row)
        taps = sorted({tap for name in rows_of for tap in self._taps_of(name)})
        features = self.backbone.encode_prepared([example for example, _ in scorings], taps)
        found: list[Probabilities] = [{} for _ in scorings]
        for name, rows in rows_of.items():
            places = [taps.index(tap) for tap in self._taps_of(name)]
            for row, scores in zip(rows, self._read(name, features[rows][:, places]), strict=True):
                found[row] |= scores
        return found

    def _taps_of(self, name: str) -> list[Tap]:
        return self.saved[name].taps if name in self.saved else [self.classifiers[name].tap]

    def _read(self, name: str, features: npt.NDArray[np.float32]) -> list[Probabilities]:
        """Return what a classifier or saved panel reads from features at its taps, shape (n, taps, hidden)."""
        if name not in self.saved:
            pairs = self.classifiers[name].probabilities_of(features[:, 0]).tolist()
            return [{name: (first, second)} for first, second in pairs]
        saved = self.saved[name]
        models = [label_model(name, label) for label in saved.names]
        lines = saved.own_probabilities_of(features).tolist()
        return [{model: (1 - value, value) for model, value in zip(models, line, strict=True)} for line in lines]

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


def answer_of(name: str, panel: Panel, found: Probabilities) -> PanelPrediction:
    """Return the answer of a saved panel from the probabilities of its labels, each for itself.

    Args:
        name: The name under which it is served.
        panel: The panel.
        found: With a probability for each of its labels.
    """
    own = np.array([[found[label_model(name, label)][1] for label in panel.names]])
    (answer,) = panel.decisions_of(panel.joint_probabilities(own))
    return answer
