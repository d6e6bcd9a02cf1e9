"""How validation goes during a run: features of its rows, its results so far, and which was best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import TrainerState

from qwen_vl_classifier.backbone.windows import windows
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.training.finetuning.kept_tokens import KeptTokens
from qwen_vl_classifier.training.finetuning.step import TrainableClassifier

VALIDATION_LOSS = "eval_log_loss"
VALIDATION_ACCURACY = "eval_accuracy"
TRAINING_LOSS = "eval_training_loss"


def features_of(
    examples: Sequence[Example], model: TrainableClassifier, kept: KeptTokens | None
) -> npt.NDArray[np.float32]:
    """Read the features of examples by the backbone that trains, shape (examples, hidden).

    Args:
        examples: Validation rows.
        model: With the backbone, and the tap where features are read.
        kept: Keeps what a frozen vision tower makes of pictures, if anything does.
    """
    backbone, tap = model.backbone, model.tap
    if kept is None:
        return np.asarray(backbone.encode(examples, [tap])[:, 0])
    features = np.empty((len(examples), backbone.hidden_size), dtype=np.float32)
    bad = BadRows()
    for window in windows(backbone.processor, examples, bad, group=True, read=kept.read):
        encoded = backbone.encode_prepared(window.prepared, [tap], tokens_of=kept.tokens_of)
        features[window.positions] = encoded[:, 0]
    bad.check(len(examples))
    return features


def evaluations(state: TrainerState) -> list[dict[str, Any]]:
    """Return the results of validation so far, in order, the start first."""
    return [entry for entry in state.log_history if VALIDATION_LOSS in entry]


def best_of(state: TrainerState) -> dict[str, Any]:
    """Return the evaluation with the least validation loss, the earliest of several."""
    return min(evaluations(state), key=lambda entry: entry[VALIDATION_LOSS])


def is_exhausted(state: TrainerState, patience: int) -> bool:
    """Tell whether the last `patience` evaluations were all no better than one before; 0 never is."""
    seen = evaluations(state)
    return bool(patience and seen and len(seen) - 1 - seen.index(best_of(state)) >= patience)
