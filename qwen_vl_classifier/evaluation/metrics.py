"""Numbers from labels and probabilities, by scikit-learn's definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, roc_auc_score


def compute_metrics(
    labels: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64], threshold: float = 0.5
) -> dict[str, Any]:
    """Compute the metrics of a binary classifier.

    Args:
        labels: Shape (n,), 0 or 1, at least one.
        probabilities: Shape (n,), of class 1.
        threshold: Probability from which the predicted label is 1.

    Returns:
        `rows`, `positives`, `majority_accuracy` (that of always answering the more frequent label), `threshold`,
        `accuracy`, `f1` (of class 1; 0 where it is undefined), `auroc` (`None` where only one class occurs),
        `log_loss` (natural logarithm) and `confusion` (counts by name).
    """
    predicted = (probabilities >= threshold).astype(np.int64)
    matrix = confusion_matrix(labels, predicted, labels=[0, 1])
    positives = int(labels.sum())
    return {
        "rows": len(labels),
        "positives": positives,
        "majority_accuracy": max(positives, len(labels) - positives) / len(labels),
        "threshold": float(threshold),
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, zero_division=0)),
        "auroc": float(roc_auc_score(labels, probabilities)) if 0 < positives < len(labels) else None,
        "log_loss": float(log_loss(labels, np.stack([1 - probabilities, probabilities], axis=1), labels=[0, 1])),
        "confusion": {
            "true_negative": int(matrix[0, 0]),
            "false_positive": int(matrix[0, 1]),
            "false_negative": int(matrix[1, 0]),
            "true_positive": int(matrix[1, 1]),
        },
    }


def metrics_table(metrics: dict[str, Any]) -> str:
    """Lay metrics out for a terminal of 80 columns."""
    auroc = "n/a (one class only)" if metrics["auroc"] is None else f"{metrics['auroc']:.4f}"
    confusion = metrics["confusion"]
    return "\n".join(
        [
            f"rows       {metrics['rows']} ({metrics['positives']} of class 1)",
            f"accuracy   {metrics['accuracy']:.4f}   (always the majority class: {metrics['majority_accuracy']:.4f})",
            f"F1         {metrics['f1']:.4f}",
            f"AUROC      {auroc}",
            f"log loss   {metrics['log_loss']:.4f}",
            f"at threshold {metrics['threshold']:.3g}:   predicted 0   predicted 1",
            f"  label 0            {confusion['true_negative']:>9}   {confusion['false_positive']:>11}",
            f"  label 1            {confusion['false_negative']:>9}   {confusion['true_positive']:>11}",
        ]
    )
