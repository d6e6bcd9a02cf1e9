"""Made-up pools whose middle tap knows the label."""

from __future__ import annotations

import numpy as np

from qwen_vl_classifier import Tap
from qwen_vl_classifier.labelling.pool_features import PoolFeatures

TAPS = (Tap(1, "mean"), Tap(2, "mean"), Tap(-1, "last"))


def made_up(
    rows: int = 300, *, seed: int = 0, strength: float = 1.5, positives: float = 0.5, width: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Return features at all taps, and labels."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(rows) < positives).astype(np.int64)
    features = rng.normal(size=(rows, len(TAPS), width)).astype(np.float32)
    features[:, 1, :3] += strength * (labels[:, None] - 0.5)
    return features * 3 + 5, labels


def separable(rows: int = 300, *, per_group: int = 1, **options: float) -> tuple[PoolFeatures, np.ndarray]:
    """Return a pool and its labels."""
    features, labels = made_up(rows, **options)
    return PoolFeatures(features, TAPS, np.arange(rows) // per_group), labels
