"""Heads, estimates and learning curves that follow the answers, computed apart from the requests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.errors import QwenVLClassifierError, one_line
from qwen_vl_classifier.labelling.choosing import Mask
from qwen_vl_classifier.labelling.learning_curve import LearningCurve, learning_curve
from qwen_vl_classifier.labelling.live_estimate import LiveEstimate, live_estimate
from qwen_vl_classifier.labelling.live_head import LiveHead, fit_live_head
from qwen_vl_classifier.labelling.pool_features import PoolFeatures
from qwen_vl_classifier.training.splitting import RowNumbers

_CURVE_GROWTH = 1.1  # of the number of labels, after which the learning curve is computed again


@dataclass(frozen=True, slots=True)
class Task:
    """The labels of one head.

    Attributes:
        rows: Rows with a label, in the order of their answers.
        labels: 0 or 1 for each.
        counted: Shape (n,): the rows that are a random sample.
    """

    rows: RowNumbers
    labels: RowNumbers
    counted: Mask

    def has_labels_of(self, other: Task | None) -> bool:
        """Tell whether a head of the other would be the same."""
        return other is not None and np.array_equal(self.rows, other.rows) and np.array_equal(self.labels, other.labels)


class Refitting:
    """The present head of each label, and what is known about it. One thread refits; others may read at any time.

    Args:
        pool: Features of all rows.
        number: How many heads.
        start: Margins from before any answer for each head, or `None`.
        seed: Of all that is random.

    Attributes:
        heads: The heads; `None` where only one class has labels.
        labels: How many labels the heads were trained on.
        seconds: How long the last refit took, without learning curves.
        problem: What went wrong in the last refit, or "".
    """

    def __init__(self, pool: PoolFeatures, number: int, *, start: Sequence[Float | None] = (), seed: int = 0) -> None:
        self.heads: list[LiveHead | None] = [None] * number
        self.labels = 0
        self.seconds: float | None = None
        self.problem = ""
        self._pool, self._seed = pool, seed
        self._start = [*start, *[None] * (number - len(start))]
        self._done: list[Task | None] = [None] * number
        self._estimates: list[LiveEstimate | None] = [None] * number
        self._curves: list[LearningCurve | None] = [None] * number
        self._measured = [0] * number  # labels of which each curve is

    def refit(self, tasks: Sequence[Task], publish: Callable[[], None]) -> None:
        """Fit the heads whose labels have changed, then estimate how good they are.

        Args:
            tasks: The labels of each head.
            publish: Called when all heads are fitted.
        """
        began = time.perf_counter()
        self.problem = ""
        for number, task in enumerate(tasks):
            before, head = self._done[number], self.heads[number]
            try:
                if not task.has_labels_of(before):
                    start = self._start[number]
                    head = fit_live_head(self._pool, task.rows, task.labels, start=start, before=head, seed=self._seed)
                elif before is not None and np.array_equal(task.counted, before.counted):
                    continue
                estimate = None
                if head is not None:
                    estimate = live_estimate(head, task.counted, self._pool.groups, seed=self._seed)
            except QwenVLClassifierError as error:
                self.problem, head, estimate = one_line(error), None, None
            self.heads[number], self._estimates[number], self._done[number] = head, estimate, task
            if head is None:
                self._curves[number], self._measured[number] = None, 0
        self.labels = max((len(task.rows) for task in tasks), default=0)
        self.seconds = time.perf_counter() - began
        publish()

    def measure(self, at_rest: bool) -> None:
        """Compute the learning curves of heads that have enough more labels.

        Args:
            at_rest: Whether no answers are waiting for a refit: then curves are brought up to date in any case.
        """
        for number, (head, task) in enumerate(zip(self.heads, self._done, strict=True)):
            if head is None or task is None:
                continue
            labels = len(task.rows)
            if labels == self._measured[number] or (
                not at_rest and labels < _CURVE_GROWTH * max(1, self._measured[number])
            ):
                continue
            try:
                curve = learning_curve(self._pool, head, task.counted, start=self._start[number], seed=self._seed)
            except QwenVLClassifierError as error:
                self.problem, curve = one_line(error), None
            self._curves[number], self._measured[number] = curve, labels

    def to_json(self, number: int) -> dict[str, Any]:
        """Describe what is known about a head, for the page: `estimate` and `curve`, `None` where not known."""
        estimate, curve = self._estimates[number], self._curves[number]
        found: dict[str, Any] = {"estimate": None, "curve": None}
        if estimate is not None:
            found["estimate"] = asdict(estimate)
        if curve is not None:
            found["curve"] = asdict(curve)
            found["curve"]["next_50"] = found["curve"].pop("gain_of_next_50")
        plain: dict[str, Any] = _plain(found)
        return plain


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it: what is not a number is not known."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (np.generic, float)):
        value = value.item() if isinstance(value, np.generic) else value
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return value
