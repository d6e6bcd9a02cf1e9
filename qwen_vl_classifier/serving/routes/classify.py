"""`/v1/classify`: JSON, messages of a chat or a form, one classifier or several."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request

from qwen_vl_classifier.serving.admission import Admission, admitted, refused
from qwen_vl_classifier.serving.forms import Part
from qwen_vl_classifier.serving.items import DEFECT, Ask, ItemError, Scored
from qwen_vl_classifier.serving.observability import add_to_log
from qwen_vl_classifier.serving.openapi import ASKING, statuses, takes
from qwen_vl_classifier.serving.problems import RefusedError
from qwen_vl_classifier.serving.schemas.classify import (
    EXAMPLES,
    ClassifyAnswer,
    ClassifyForm,
    ClassifyRequest,
    ClassifyResult,
    ErrorOfItem,
    Usage,
)
from qwen_vl_classifier.serving.schemas.examples import ask_of, ask_of_messages
from qwen_vl_classifier.serving.service import Service

router = APIRouter(tags=["classify"])


@router.post(
    "/v1/classify",
    operation_id="classify",
    response_model_exclude_none=True,
    responses=statuses(*ASKING),
    openapi_extra=takes(ClassifyRequest, EXAMPLES, form=ClassifyForm),
)
@router.post("/classify", include_in_schema=False, response_model_exclude_none=True)
async def classify(request: Request) -> ClassifyAnswer:
    """Classify examples; of several, one that cannot be classified has an `error` in its own place."""
    with admitted(request) as visit:
        asked, asks = await _read(visit)
        names = visit.names(asked.names)
        add_to_log(items=len(asks), models=len(names))
        outcomes = await visit.wait(visit.service.classify(asks, names, visit.deadline))
        if asked.alone and isinstance(outcomes[0], ItemError):
            raise refused(outcomes[0])
        if all(isinstance(outcome, ItemError) and outcome.code == "internal_error" for outcome in outcomes):
            raise RefusedError(500, "internal_error", DEFECT)  # there is nothing to show, by no fault of the caller
        return _answer(visit.service, outcomes, names, several=isinstance(asked.names, list))


@dataclass(frozen=True, slots=True)
class _Asked:
    """Who is asked, and whether for one example alone, whose error is then the request's."""

    names: str | list[str] | None
    alone: bool


async def _read(visit: Admission) -> tuple[_Asked, list[Ask | ItemError]]:
    """Read a body of any of the three forms."""
    if visit.is_form():
        ask, names = _of_form(await visit.form())
        return _Asked(names, alone=True), [ask]
    content = await visit.json(ClassifyRequest)
    if content.messages is not None:
        return _Asked(content.model, alone=True), [ask_of_messages(content.messages)]
    items = content.input or []
    visit.bounded(len(items), "input")
    return _Asked(content.model, alone=False), [ask_of(item) for item in items]


def _of_form(parts: Sequence[Part]) -> tuple[Ask, str | list[str] | None]:
    """Return the example of a form, and the models that it asks.

    Raises:
        RefusedError: 400, fields that are not known or not there, or text that is no UTF-8.
    """
    texts: dict[str, list[str]] = {"text": [], "model": []}
    images: list[str | bytes] = []
    for part in parts:
        if part.name == "image":
            images.append(part.data if part.is_file else _utf8(part))
        elif part.name in texts:
            texts[part.name].append(_utf8(part))
        else:
            raise _invalid_form("a field is not known; wanted image, text and model")
    if len(texts["text"]) != 1:
        raise _invalid_form(f"there are {len(texts['text'])} fields text; wanted one")
    names = texts["model"]
    return Ask(texts["text"][0], tuple(images)), names[0] if len(names) == 1 else names or None


def _utf8(part: Part) -> str:
    try:
        return part.data.decode()
    except UnicodeDecodeError:
        raise _invalid_form("a field is no text in UTF-8; send pictures as files of the field image") from None


def _invalid_form(why: str) -> RefusedError:
    return RefusedError(400, "invalid_form", why)


def _answer(
    service: Service, outcomes: Sequence[Scored | ItemError], names: Sequence[str], *, several: bool
) -> ClassifyAnswer:
    tokens = sum(outcome.tokens for outcome in outcomes if isinstance(outcome, Scored))
    return ClassifyAnswer(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=list(names) if several else names[0],
        data=[
            _result(service, index, outcome, name, several) for index, outcome in enumerate(outcomes) for name in names
        ],
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )


def _result(service: Service, index: int, outcome: Scored | ItemError, name: str, several: bool) -> ClassifyResult:
    model = name if several else None
    if isinstance(outcome, ItemError):
        error = ErrorOfItem(code=outcome.code, status=outcome.status, message=outcome.message)
        return ClassifyResult(index=index, model=model, error=error)
    classifier = service.models[name]
    probabilities = outcome.probabilities[name]
    prediction = classifier.decision_of(probabilities[1])
    return ClassifyResult(
        index=index,
        model=model,
        label=1 if prediction.label else 0,
        probs=list(probabilities),
        score=prediction.probability,
        threshold=classifier.threshold,
        decision=prediction.decision,
    )
