"""`/predict`: what clients of text-embeddings-inference (TEI) ask."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import ValidationError

from qwen_vl_classifier.serving.admission import admitted, only_asks, only_scored
from qwen_vl_classifier.serving.items import Ask, ItemError, Scored
from qwen_vl_classifier.serving.logs import note
from qwen_vl_classifier.serving.openapi import ASKING, statuses, takes
from qwen_vl_classifier.serving.problems import RefusedError, explain_invalid
from qwen_vl_classifier.serving.schemas.examples import ClassifyItem
from qwen_vl_classifier.serving.schemas.predict import EXAMPLES, PredictedClass, PredictRequest
from qwen_vl_classifier.serving.service import Service

router = APIRouter(tags=["shims"])


@router.post(
    "/predict",
    operation_id="predict",
    responses=statuses(*ASKING),
    openapi_extra=takes(PredictRequest, EXAMPLES),
)
async def predict(request: Request, model: str | None = None) -> list[PredictedClass] | list[list[PredictedClass]]:
    """Return both classes, the more probable one first; for a list of inputs, a list of these.

    Unlike TEI's, a list of two texts is two inputs and no pair. `model` may stand in the URL or in the body.
    """
    with admitted(request) as visit:
        content = await visit.json(PredictRequest)
        if model is not None and content.model is not None and model != content.model:
            raise RefusedError(400, "model_twice", "model differs between URL and body; give one", param="model")
        (name,) = visit.names(model if content.model is None else content.model)
        inputs = content.inputs if isinstance(content.inputs, list) else [content.inputs]
        visit.bounded(len(inputs), "inputs")
        asks = only_asks([_ask_of(value) for value in inputs], "inputs")
        note(items=len(asks))
        scored = only_scored(await visit.wait(visit.service.classify(asks, [name], visit.deadline)), "inputs")
        answers = [_classes(visit.service, one, name) for one in scored]
    return answers if isinstance(content.inputs, list) else answers[0]


def _ask_of(value: Any) -> Ask | ItemError:
    if isinstance(value, list) and len(value) == 1:  # TEI's own form of a batch: a list of lists of one text
        (value,) = value
    if isinstance(value, str):
        return Ask(value)
    try:
        return ClassifyItem.model_validate(value).ask()
    except ValidationError as error:
        return ItemError("invalid_item", explain_invalid(error))


def _classes(service: Service, scored: Scored, name: str) -> list[PredictedClass]:
    classes = [
        PredictedClass(score=probability, label=label)
        for probability, label in zip(scored.probabilities[name], service.models[name].label_names, strict=True)
    ]
    return sorted(classes, key=lambda one: one.score, reverse=True)
