"""From logits to probabilities that mean what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

FloatArray = npt.NDArray[np.floating[Any]]

_TEMPERATURES = (0.05, 20.0)


def probabilities(logits: FloatArray, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Apply a temperature and softmax.

    Args:
        logits: Shape (n, 2).
        temperature: Above 1 makes probabilities less sure, below 1 more.

    Returns:
        float64, shape (n, 2), each line summing to 1.
    """
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    # Two classes: the logistic function of the difference, written so that neither side overflows.
    positive = np.exp(-np.logaddexp(0.0, scaled[:, 0] - scaled[:, 1]))
    negative = np.exp(-np.logaddexp(0.0, scaled[:, 1] - scaled[:, 0]))
    both: npt.NDArray[np.float64] = np.stack([negative, positive], axis=1)
    both /= both.sum(axis=1, keepdims=True)
    return both


def fit_temperature(logits: FloatArray, labels: npt.NDArray[np.int64]) -> float:
    """Find the temperature with the least log loss (Guo et al., 2017, arXiv:1706.04599, section 4.2).

    Labels are taken as Platt (1999, "Probabilistic outputs for support vector machines", section 2.1) takes them: with
    n rows of its class, a label is right with probability (n + 1) / (n + 2). Without that, a dozen rows that are all
    right would be proof of certainty.

    Args:
        logits: Shape (n, 2), of examples that the head was not trained on.
        labels: Shape (n,), 0 or 1.
    """
    wide = np.asarray(logits, dtype=np.float64)
    margin = (wide[:, 1] - wide[:, 0]) * np.where(labels == 1, 1.0, -1.0)
    count = np.bincount(labels, minlength=2)[labels]
    right = (count + 1) / (count + 2)

    def log_loss(log_temperature: float) -> float:
        scaled = margin / np.exp(log_temperature)
        return float((right * np.logaddexp(0.0, -scaled) + (1 - right) * np.logaddexp(0.0, scaled)).mean())

    low, high = np.log(_TEMPERATURES)
    return float(np.exp(minimize_scalar(log_loss, bounds=(low, high), method="bounded").x))
