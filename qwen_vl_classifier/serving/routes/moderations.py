"""`/v1/moderations`: OpenAI's shapes, with one category for each classifier and for each label of a panel."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Request
from pydantic import BaseModel, Discriminator, Field, Tag

from qwen_vl_classifier.serving.http.incoming import admitted, only_scored
from qwen_vl_classifier.serving.http.openapi import CLASSIFYING, problems, takes
from qwen_vl_classifier.serving.items import Item, ItemResult
from qwen_vl_classifier.serving.models.label_names import label_model
from qwen_vl_classifier.serving.models.model_set import ModelSet
from qwen_vl_classifier.serving.observability.logs import add_to_log
from qwen_vl_classifier.serving.schemas import PICTURE, ImagePart, Part, StrictModel, TextPart, item_of_parts

AppliedType: TypeAlias = Literal["text", "image"]

# Clients send one of OpenAI's own names unless they are told otherwise.
_OPENAI_NAME = re.compile(r"(?:omni|text)-moderation-[a-z0-9-]{1,32}", re.ASCII)


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return "<text>"
    return "<parts>" if value and isinstance(value[0], dict) else "<texts>"


class ModerationRequest(StrictModel):
    """What to classify: one text, several texts, or one example of text and pictures as parts of a message."""

    model: str | None = Field(
        default=None, description="a name that /v1/models lists; all of them if it is missing or one of OpenAI's own"
    )
    input: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[str], Field(fail_fast=True, min_length=1), Tag("<texts>")]
        | Annotated[list[Part], Field(fail_fast=True, min_length=1), Tag("<parts>")],
        Discriminator(_kind),
    ]


class ModerationResult(BaseModel):
    """The results of all classifiers for one example."""

    flagged: bool = Field(description="whether any category is true")
    categories: dict[str, bool] = Field(
        description="for each classifier whether its label is 1; labels of a panel are PANEL/LABEL"
    )
    category_scores: dict[str, float] = Field(description="for each classifier the calibrated probability of class 1")
    category_applied_input_types: dict[str, list[AppliedType]]


class ModerationAnswer(BaseModel):
    """Results in the order of the request's input."""

    id: str
    model: str = Field(description="the names of the classifiers, with commas")
    version: str = Field(description="of each of them, as /v1/models lists it, with commas")
    results: list[ModerationResult]


_EXAMPLES: dict[str, Any] = {
    "text": {"summary": "One text", "value": {"input": "It is red."}},
    "texts": {"summary": "Two texts", "value": {"input": ["It is red.", "It is blue."]}},
    "picture": {
        "summary": "A picture and a text",
        "value": {
            "input": [
                {"type": "image_url", "image_url": {"url": PICTURE}},
                {"type": "text", "text": "It is red."},
            ]
        },
    },
}

router = APIRouter(tags=["moderations"])


@router.post(
    "/v1/moderations",
    operation_id="moderate",
    responses=problems(*CLASSIFYING),
    openapi_extra=takes(ModerationRequest, _EXAMPLES),
)
async def moderate(request: Request) -> ModerationAnswer:
    """Classify as OpenAI's moderation endpoint does: each classifier is a category, true where its label is 1."""
    with admitted(request) as incoming:
        model, items = await incoming.json(ModerationRequest, lambda content: (content.model, _items(content.input)))
        served = incoming.served.names
        foreign = model is not None and model not in served and _OPENAI_NAME.fullmatch(model)
        names = incoming.names(served if model is None or foreign else model)
        incoming.check_count(len(items), "input")
        add_to_log(items=len(items), models=len(names))
        outcomes = await incoming.wait(incoming.service.classify(items, names, incoming.admitted, incoming.served))
        results = [
            _result(incoming.served, names, item, scored)
            for item, scored in zip(items, only_scored(outcomes, "input"), strict=True)
        ]
    versions = [incoming.served.version_of(name).digest for name in names]
    return ModerationAnswer(
        id=f"modr-{uuid.uuid4().hex}", model=",".join(names), version=",".join(versions), results=results
    )


def _items(given: str | list[str] | list[TextPart | ImagePart]) -> list[Item]:
    if isinstance(given, str):
        return [Item(given)]
    parts = [part for part in given if not isinstance(part, str)]
    return [item_of_parts(parts)] if parts else [Item(text) for text in given if isinstance(text, str)]


def _result(served: ModelSet, names: Sequence[str], item: Item, scored: ItemResult) -> ModerationResult:
    scores: dict[str, float] = {}
    labels: dict[str, bool] = {}
    for name in names:
        if name in scored.panels:
            found = {label_model(name, label): one for label, one in scored.panels[name].labels.items()}
        else:
            found = {name: served.models[name].decision_of(scored.probabilities[name][1])}
        scores |= {category: one.probability for category, one in found.items()}
        labels |= {category: bool(one.label) for category, one in found.items()}
    applied: list[AppliedType] = ["text", "image"] if item.images else ["text"]
    return ModerationResult(
        flagged=any(labels.values()),
        categories=labels,
        category_scores=scores,
        category_applied_input_types=dict.fromkeys(labels, applied),
    )
