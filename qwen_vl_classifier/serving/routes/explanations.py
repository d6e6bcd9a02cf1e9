"""`/v1/explain`: what moved one probability, as numbers and as a picture."""

from __future__ import annotations

import base64
from typing import Any, Literal, TypeAlias

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from qwen_vl_classifier.data.example import Decision
from qwen_vl_classifier.serving.http.incoming import admitted, check_classifier, refused
from qwen_vl_classifier.serving.http.openapi import CLASSIFYING, problems, takes
from qwen_vl_classifier.serving.items import ItemError
from qwen_vl_classifier.serving.schemas import PICTURE, ClassifyItem

# As in `evaluation.explanation`, which cannot be imported here: it brings torch.
ExplainMethod: TypeAlias = Literal["gradients", "tokens", "occlusion"]
ExplainBaseline: TypeAlias = Literal["average", "empty"]

_PNG = "image/png"


class ExplainRequest(ClassifyItem):
    """One example whose answer is to be explained."""

    model: str | None = Field(
        default=None,
        description="a name that /v1/models lists, PANEL/LABEL for a label of a panel; not needed if one is served",
    )
    method: ExplainMethod = Field(default="gradients", description="method; occlusion is slow")
    baseline: ExplainBaseline | None = Field(
        default=None,
        description="picture to compare with: the average training picture, or an empty one; null for the average if "
        "the classifier has one",
    )


class Contribution(BaseModel):
    """A word and its contribution."""

    word: str
    contribution: float


class ExplainAnswer(BaseModel):
    """What moved one probability: contributions in log odds, positive where they speak for class 1."""

    model: str
    version: str = Field(description="as /v1/models lists it")
    probability: float = Field(description="calibrated probability of class 1")
    decision: Decision
    log_odds: float
    unit: str
    method: ExplainMethod
    exact: bool
    baseline: ExplainBaseline | None = Field(description="picture that squares are compared with; null for none")
    words: list[Contribution]
    patches: list[list[list[float]]] = Field(description="for each picture rows and columns of squares")
    template: float
    rest: float
    summary: list[str] = Field(description="what the contributions start from, and a warning where it outweighs them")
    heat_map: str = Field(description="data URI of a PNG: picture(s) and words, coloured by their contribution")


_EXAMPLES: dict[str, Any] = {
    "picture": {"summary": "A picture and a text", "value": {"image": PICTURE, "text": "It is red."}},
}

router = APIRouter(tags=["explain"])


@router.post(
    "/v1/explain",
    operation_id="explain",
    response_model=ExplainAnswer,
    responses={
        200: {"content": {_PNG: {"schema": {"type": "string", "format": "binary"}}}},
        **problems(*CLASSIFYING),
    },
    openapi_extra=takes(ExplainRequest, _EXAMPLES),
)
async def explain(request: Request) -> Response:
    """Explain the answer for one example; with `Accept: image/png` the heat map alone is returned."""
    with admitted(request) as incoming:
        content, item = await incoming.json(ExplainRequest, lambda content: (content, content.to_item()))
        (name,) = incoming.names(content.model)
        check_classifier(incoming.served, name)
        outcome = await incoming.wait(
            incoming.service.explain(
                item, name, content.method, incoming.admitted, incoming.served, baseline=content.baseline
            )
        )
        if isinstance(outcome, ItemError):
            raise refused(outcome)
        explanation, heat_map = outcome
        decision = incoming.served.models[name].decision_of(explanation.probability).decision
    if _prefers_png(request.headers.get("accept", "")):
        return Response(heat_map, media_type=_PNG)
    answer = ExplainAnswer(
        model=name,
        version=incoming.served.version_of(name).digest,
        decision=decision,
        heat_map=f"data:{_PNG};base64,{base64.b64encode(heat_map).decode()}",
        **explanation.to_json(),
    )
    return JSONResponse(answer.model_dump())


def _prefers_png(accept: str) -> bool:
    """Tell whether a header names PNG and does not name JSON."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return _PNG in kinds and "application/json" not in kinds
