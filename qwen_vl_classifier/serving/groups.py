"""Classifiers by backbone: those that read one backbone share its passes, others have passes of their own."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.classifier.artifact import read_manifest
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import DeadlineError
from qwen_vl_classifier.evaluation.explanation import Baseline, Explanation, Method, explain

Probabilities: TypeAlias = dict[str, tuple[float, float]]
"""Of class 0 and of class 1, by the classifier's name."""


Question: TypeAlias = tuple[EncodedExample, tuple[str, ...]]
"""One example as the backbone reads it, and the names of the classifiers that are asked about it."""


class Group:
    """Classifiers that share a backbone.

    Args:
        classifiers: By name; at least one, and all of one backbone.

    Attributes:
        classifiers: The same.
        processor: Makes examples ready for the backbone; it may be shared with another group.
    """

    def __init__(self, classifiers: dict[str, Classifier]) -> None:
        self.classifiers = classifiers
        self._backbone = Panel(list(classifiers.values())).backbone
        self.processor: Processor = self._backbone.processor

    def score(self, questions: Sequence[Question]) -> list[Probabilities]:
        """Run one pass, no deeper than those who are asked read, and the heads that are asked."""
        asked = {name: self.classifiers[name] for _, names in questions for name in names}
        taps = sorted({classifier.tap for classifier in asked.values()})
        features = self._backbone.encode_prepared([example for example, _ in questions], taps)
        answers: list[Probabilities] = [{} for _ in questions]
        for name, classifier in asked.items():
            rows = [row for row, (_, names) in enumerate(questions) if name in names]
            probabilities = classifier.probabilities_of(features[rows, taps.index(classifier.tap)])
            for row, (first, second) in zip(rows, probabilities.tolist(), strict=True):
                answers[row][name] = (first, second)
        return answers

    def score_example(self, example: Example) -> Probabilities:
        """Ask all classifiers about one example, from its pictures on."""
        (answer,) = self.score([(self.processor.encode(example), tuple(self.classifiers))])
        return answer

    def explain(
        self, name: str, example: Example, method: Method, gone: threading.Event, baseline: Baseline | None = None
    ) -> Explanation:
        """Explain one answer, or stop before the next pass once its caller has gone.

        Raises:
            ConfigError: Method or baseline does not fit the classifier.
            DeadlineError: The caller has gone.
        """

        def check(*_: Any) -> None:
            if gone.is_set():
                raise DeadlineError("nobody waits for the explanation any more")

        check()
        model: Any = self._backbone.model
        hook = model.language_model.layers[0].register_forward_pre_hook(check)
        try:
            return explain(self.classifiers[name], example, method=method, baseline=baseline)
        finally:
            hook.remove()


def load_groups(
    folders: dict[str, str], device: str, model: str | None = None, max_text_tokens: int | None = None
) -> list[Group]:
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
    groups = []
    for names in by_backbone.values():
        chosen = [folders[name] for name in names]
        panel = Panel.load(chosen, device=device, model=model, max_text_tokens=max_text_tokens)
        groups.append(Group(dict(zip(names, panel.classifiers, strict=True))))
    _share_processors(groups)
    return groups


def _share_processors(groups: Sequence[Group]) -> None:
    """Let groups whose processors do the same have the same one, so that its work is done once for all of them.

    A classifier on a backbone and one on a fine-tuned copy of it read the same tokens and patches.
    """
    processors: dict[str, Processor] = {}
    for group in groups:
        own = group.processor
        key = json.dumps([own.fingerprint(), own.image_token_id, own.video_token_id], sort_keys=True)
        group.processor = processors.setdefault(key, own)
