"""Explanations behind the service: planned, run pass by pass between batches, and drawn."""

from __future__ import annotations

import asyncio
import io
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ConfigError, DeadlineError
from qwen_vl_classifier.serving.admission import Admission, AdmittedExplanation, AdmittedRequest
from qwen_vl_classifier.serving.items import Item, ItemError, error_of
from qwen_vl_classifier.serving.preparing import Preparation
from qwen_vl_classifier.serving.worker import Steps, Worker

if TYPE_CHECKING:  # they bring torch
    from qwen_vl_classifier.evaluation.explanation import Baseline, Explanation, Method, PlannedExplanation
    from qwen_vl_classifier.serving.models.panels import ServedPanel

T = TypeVar("T")


class Explainer:
    """Explain answers, each pass in a turn of its own.

    Args:
        config: The bounds of a pass.
        admission: Lets explanations in.
        preparation: Opens their pictures.
        steps: Runs their passes.
        most_cost: Tells the most tokens that a pass may have now.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        admission: Admission,
        preparation: Preparation,
        steps: Steps,
        most_cost: Callable[[], int],
    ) -> None:
        self._config = config
        self._admission = admission
        self._preparation = preparation
        self._steps = steps
        self._most_cost = most_cost
        self._drawing = Worker("draw")

    def stop(self) -> None:
        """End the thread that draws after the calls that it has."""
        self._drawing.stop()

    async def explain(
        self,
        item: Item,
        panel: ServedPanel,
        model: str,
        method: Method,
        request: AdmittedRequest,
        baseline: Baseline | None,
    ) -> tuple[Explanation, bytes] | ItemError:
        """Explain the answer of one classifier of a panel for one item that was checked: see `Service.explain`."""
        try:
            with self._admission.explanation(request) as admitted:
                async with asyncio.timeout_at(request.deadline):
                    images = await self._preparation.open_pictures(item, request)
                    if isinstance(images, ItemError):
                        return images
                    example = Example(tuple(images), item.text)
                    limits = self._config.max_batch_tokens, self._most_cost()
                    planned = await self._preparation.worker.run(
                        panel.plan_explanation, model, example, method, baseline, *limits
                    )
                    request.hold_picture(planned.nbytes)
                    explanation = await self._run_passes(planned, admitted)
                    if not math.isfinite(explanation.rest):  # what all other contributions leave of the log odds
                        raise ArithmeticError("an explanation is not a number")
                    return explanation, await self._drawing.run(_draw, images, explanation)
        except TimeoutError:
            raise DeadlineError("the explanation was not ready before the deadline; try again") from None
        except ConfigError as error:  # method or baseline does not fit the classifier
            return ItemError("invalid_item", str(error))
        except Exception as error:
            return error_of(error)

    async def _run_passes(self, planned: PlannedExplanation, admitted: AdmittedExplanation) -> Explanation:
        """Run the passes of an explanation, each in a turn of its own; none begins once the caller is gone."""
        admitted.begin(planned.costs)
        for cost in planned.costs:
            explanation, seconds = await self._steps.run(lambda: _timed(planned.run_pass))
            admitted.finish(cost, seconds)
        assert explanation is not None, "it comes with the last pass"
        return explanation


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    started = time.monotonic()
    return function(), time.monotonic() - started


def _draw(images: Sequence[Image.Image], explanation: Explanation) -> bytes:
    from qwen_vl_classifier.evaluation.explanation_picture import draw_explanation

    stream = io.BytesIO()
    draw_explanation(images, explanation).save(stream, "PNG")
    return stream.getvalue()
