"""What a report says, as one JSON-able dictionary; how it looks is the template's business."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_vl_classifier.evaluation.report.curves import histogram, reliability, roc

_SHOWN_ROWS = 10
_SHOWN_CHARACTERS = 600


def summarise(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Summarise an evaluation for a reader.

    Args:
        evaluation: As `evaluate` returns it.

    Returns:
        `sentences`, the answer in words; `classifier` and `metrics` as they came; the curves `roc`, `reliability`
        and `histogram`; and two lists of up to ten rows, `wrong` (the surest mistakes first) and `uncertain` (the
        nearest to the threshold first), with texts as they came, but cut where they are very long.
    """
    metrics, predictions = evaluation["metrics"], evaluation["predictions"]
    threshold = metrics["threshold"]
    labels = np.array([row["label"] for row in predictions], dtype=np.int64)
    probabilities = np.array([row["probability"] for row in predictions], dtype=np.float64)
    wrong = [row for row in predictions if (row["probability"] >= threshold) != bool(row["label"])]
    return {
        "sentences": _sentences(metrics, predictions),
        "classifier": evaluation["classifier"],
        "metrics": metrics,
        "roc": roc(labels, probabilities),
        "reliability": reliability(labels, probabilities),
        "histogram": histogram(labels, probabilities),
        "wrong": _rows(sorted(wrong, key=lambda row: -abs(row["probability"] - row["label"]))),
        "uncertain": _rows(sorted(predictions, key=lambda row: abs(row["probability"] - threshold))),
    }


def percent(share: float) -> str:
    """Write a share between 0 and 1 as a percentage with one decimal, never rounding up to 100 %."""
    value = round(100 * share, 1)
    return f"{min(value, 99.9) if share < 1 else value:.1f} %"


def _sentences(metrics: dict[str, Any], predictions: list[dict[str, Any]]) -> list[str]:
    rows, positives = metrics["rows"], metrics["positives"]
    examples = f"{rows:,} examples" if rows != 1 else "1 example"
    sentences = [
        f"Right on {percent(metrics['accuracy'])} of {examples}; always answering the majority class would be "
        f"right on {percent(metrics['majority_accuracy'])}."
    ]
    if positives in (0, rows):
        sentences.append(f"Every example is of class {int(positives > 0)}, so this says nothing about the other class.")
    abstained = sum(row["decision"] == "abstain" for row in predictions)
    if abstained:
        sentences.append(
            f"It abstains on {abstained:,} of them; here these count by the side of the threshold they are on."
        )
    return sentences


def _rows(predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for row in predictions[:_SHOWN_ROWS]:
        text = row["text"]
        cut = len(text) > _SHOWN_CHARACTERS
        rows.append({**row, "text": text[:_SHOWN_CHARACTERS] + " …" if cut else text})
    return rows
