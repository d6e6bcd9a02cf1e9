"""`/v1/moderations`: what OpenAI's clients ask, answered by classifiers as categories."""

from __future__ import annotations

import re
import uuid

from fastapi import APIRouter, Request

from qwen_vl_classifier.serving.admission import admitted, only_scored
from qwen_vl_classifier.serving.items import Ask, Scored
from qwen_vl_classifier.serving.observability import add_to_log
from qwen_vl_classifier.serving.openapi import ASKING, statuses, takes
from qwen_vl_classifier.serving.schemas.examples import ask_of_parts
from qwen_vl_classifier.serving.schemas.moderations import (
    EXAMPLES,
    AppliedType,
    ModerationAnswer,
    ModerationRequest,
    ModerationResult,
)
from qwen_vl_classifier.serving.service import Service

# Clients send one of OpenAI's own names unless they are told otherwise.
_OPENAI_NAME = re.compile(r"(?:omni|text)-moderation-[a-z0-9-]{1,32}", re.ASCII)

router = APIRouter(tags=["shims"])


@router.post(
    "/v1/moderations",
    operation_id="moderate",
    responses=statuses(*ASKING),
    openapi_extra=takes(ModerationRequest, EXAMPLES),
)
async def moderate(request: Request) -> ModerationAnswer:
    """Ask classifiers as OpenAI's moderation endpoint is asked: each is a category, true where its label is 1."""
    with admitted(request) as visit:
        content = await visit.json(ModerationRequest)
        served = visit.service.names
        foreign = content.model is not None and content.model not in served and _OPENAI_NAME.fullmatch(content.model)
        names = list(served) if content.model is None or foreign else visit.names(content.model)
        asks = _asks(content)
        visit.bounded(len(asks), "input")
        add_to_log(items=len(asks), models=len(names))
        outcomes = await visit.wait(visit.service.classify(asks, names, visit.deadline))
        results = [
            _result(visit.service, ask, scored)
            for ask, scored in zip(asks, only_scored(outcomes, "input"), strict=True)
        ]
    return ModerationAnswer(id=f"modr-{uuid.uuid4().hex}", model=",".join(names), results=results)


def _asks(content: ModerationRequest) -> list[Ask]:
    if isinstance(content.input, str):
        return [Ask(content.input)]
    parts = [part for part in content.input if not isinstance(part, str)]
    if parts:
        return [ask_of_parts(parts)]
    return [Ask(text) for text in content.input if isinstance(text, str)]


def _result(service: Service, ask: Ask, scored: Scored) -> ModerationResult:
    labels = {
        name: bool(service.models[name].decision_of(pair[1]).label) for name, pair in scored.probabilities.items()
    }
    applied: list[AppliedType] = ["text", "image"] if ask.images else ["text"]
    return ModerationResult(
        flagged=any(labels.values()),
        categories=labels,
        category_scores={name: pair[1] for name, pair in scored.probabilities.items()},
        category_applied_input_types=dict.fromkeys(labels, applied),
    )
