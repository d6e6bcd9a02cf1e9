"""Evaluate a classifier on labelled examples: one plain dictionary that can be written as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.evaluation.metrics import compute_metrics
from qwen_vl_classifier.features.store import FeatureStore

SCHEMA_VERSION = 1


def evaluate(
    classifier: Classifier,
    examples: Sequence[Example],
    *,
    store: FeatureStore | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate a classifier.

    Args:
        classifier: What to evaluate.
        examples: At least one, all with labels.
        store: Where features are kept, if anywhere.
        progress: Show a progress bar.

    Returns:
        `schema_version`; `metrics` as `compute_metrics` has them; `classifier` (backbone, tap, head, label_names,
        threshold); and `predictions`, one object for each example: `row` (from 0), `id`, `text`, `label`,
        `probability` of class 1 and `decision`.

    Raises:
        DataError: No examples, or one without a label.
    """
    if not examples:
        raise DataError("no examples to evaluate on: give at least one")
    unlabelled = [row for row, example in enumerate(examples) if example.label not in (0, 1)]
    if unlabelled:
        first = examples[unlabelled[0]].label
        seen = "have no label" if first is None else f"have a label such as {first!r}"
        raise DataError(
            f"{len(unlabelled)} of {len(examples)} examples {seen}, first at row {unlabelled[0]}; "
            "evaluation needs a label of 0 or 1 in every row"
        )
    labels = np.array([example.label for example in examples], dtype=np.int64)
    probabilities = classifier.predict_proba(examples, store=store, progress=progress)[:, 1]
    return {
        "schema_version": SCHEMA_VERSION,
        "metrics": compute_metrics(labels, probabilities, classifier.threshold),
        "classifier": {
            "backbone": classifier.backbone.name,
            "tap": str(classifier.tap),
            "head": classifier.spec.kind,
            "label_names": list(classifier.label_names),
            "threshold": classifier.threshold,
            "temperature": classifier.temperature,
        },
        "predictions": [
            {
                "row": row,
                "id": example.id,
                "text": example.text,
                "label": example.label,
                "probability": float(probability),
                "decision": classifier.decision_of(float(probability)).decision,
            }
            for row, (example, probability) in enumerate(zip(examples, probabilities, strict=True))
        ],
    }
