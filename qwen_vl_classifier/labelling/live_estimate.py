"""How good the head is on new rows while people answer, from the rows that were drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.probabilities import logits_of, probabilities
from qwen_vl_classifier.labelling.live_head import LiveHead
from qwen_vl_classifier.training.probe.estimate import INFLATION, held_out_estimate
from qwen_vl_classifier.training.splitting import RowNumbers

Figure = tuple[float, float, float]
"""A value, and the ends of its 95 % interval."""

FEWEST_ROWS = 10
"""With fewer rows drawn at random nothing is estimated."""

_SAMPLES = 200  # bootstrap samples, for the calibration error alone


@dataclass(frozen=True, slots=True)
class LiveEstimate:
    """How good a head is on new rows of the same kind.

    Attributes:
        rows: Number of labelled rows that were drawn at random.
        majority: Accuracy of always giving the more frequent answer; `None` without rows.
        accuracy: `None` where the rows are too few or of one class; likewise the others.
        auroc: Area under the ROC curve.
        log_loss: Mean log loss.
        ece: Expected calibration error, without what chance adds.
    """

    rows: int
    majority: float | None = None
    accuracy: Figure | None = None
    auroc: Figure | None = None
    log_loss: Figure | None = None
    ece: Figure | None = None


def live_estimate(head: LiveHead, counted: npt.NDArray[np.bool_], groups: RowNumbers, *, seed: int = 0) -> LiveEstimate:
    """Estimate how good a head is on new rows that a person can answer.

    Only rows drawn at random are used, each by its out-of-fold answer. Intervals are as wide as those of `train`, which
    allow for heads that share rows.

    Args:
        head: With its out-of-fold answers.
        counted: Shape (n,): the rows of the pool that are a random sample of it (`RandomShare.counted`).
        groups: Shape (n,): rows of one number belong together.
        seed: Of the bootstrap.
    """
    random = counted[head.rows]
    labels = head.labels[random].astype(np.float64)
    if not len(labels):
        return LiveEstimate(0)
    majority = float(max(labels.mean(), 1 - labels.mean()))
    if not head.folds or len(labels) < FEWEST_ROWS or majority == 1:
        return LiveEstimate(len(labels), majority)
    _, own = np.unique(groups[head.rows[random]], return_inverse=True)
    found = held_out_estimate(
        probabilities(logits_of(head.out_of_fold[random]))[:, 1],
        0.5,
        labels,
        np.ones(len(labels)),
        own.astype(np.int64),
        seed=seed,
        samples=_SAMPLES,
        inflation=INFLATION,
    )

    def figure(name: str) -> Figure:
        return found[name]["mean"], found[name]["low"], found[name]["high"]

    return LiveEstimate(len(labels), majority, figure("accuracy"), figure("auroc"), figure("log_loss"), figure("ece"))
