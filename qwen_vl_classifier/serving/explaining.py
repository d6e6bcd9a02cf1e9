"""Explanations among passes: few of them, never beside a pass, and none for callers who have gone."""

from __future__ import annotations

import asyncio
import io
import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import QueueFullError
from qwen_vl_classifier.serving.worker import Worker

if TYPE_CHECKING:  # they bring torch
    from qwen_vl_classifier.evaluation.explanation import Baseline, Explanation, Method
    from qwen_vl_classifier.serving.groups import Group

_MOST = 4  # that run or wait; each takes as long as dozens of passes


class Explainer:
    """Explain answers in the thread in which passes run.

    Args:
        model_worker: Where passes run, one at a time.
        drawing_worker: Where to draw.
    """

    def __init__(self, *, model_worker: Worker, drawing_worker: Worker) -> None:
        self._model_worker = model_worker
        self._drawing_worker = drawing_worker
        self._alone = asyncio.Semaphore(1)
        self._running: set[asyncio.Task[Explanation]] = set()

    async def explain(
        self,
        group: Group,
        name: str,
        text: str,
        images: Sequence[Image.Image],
        method: Method,
        baseline: Baseline | None = None,
    ) -> tuple[Explanation, bytes]:
        """Explain one answer. One whose caller is cancelled ends before its next pass through the model.

        Args:
            group: Where the classifier is.
            name: The classifier's name.
            text: The example's words.
            images: Its pictures.
            method: As in `evaluation.explain`.
            baseline: As there.

        Returns:
            The explanation, and a PNG file of its heat maps and words.

        Raises:
            QueueFullError: Others wait already.
            ConfigError: Method or baseline does not fit the classifier.
            OutOfMemoryError: It does not fit into memory.
            ArithmeticError: It is not a number.
        """
        if len(self._running) >= _MOST:
            raise QueueFullError(f"{len(self._running)} others wait for explanations already; try again later")
        gone = threading.Event()
        example = Example(tuple(images), text)

        async def work() -> Explanation:
            # One of them at a time waits for its turn among the passes, so that a pass waits for one at most.
            async with self._alone, self._model_worker.turn:
                return await self._model_worker.run(group.explain, name, example, method, gone, baseline)

        task = asyncio.create_task(work())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may be that nobody asks
        try:
            # A caller who goes away must not give the model's turn to another before its thread is free.
            explanation = await asyncio.shield(task)
        finally:
            gone.set()
        if not math.isfinite(explanation.rest):  # what all other contributions leave of the log odds
            raise ArithmeticError("an explanation is not a number")
        return explanation, await self._drawing_worker.run(_draw, images, explanation)


def _draw(images: Sequence[Image.Image], explanation: Explanation) -> bytes:
    from qwen_vl_classifier.evaluation.explanation_picture import draw_explanation

    stream = io.BytesIO()
    draw_explanation(images, explanation).save(stream, "PNG")
    return stream.getvalue()
