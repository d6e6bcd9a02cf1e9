"""`/v1/explain`: what moved one probability, as numbers and as a picture."""

from __future__ import annotations

import base64

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from qwen_vl_classifier.serving.admission import admitted, refused
from qwen_vl_classifier.serving.items import ItemError
from qwen_vl_classifier.serving.openapi import ASKING, statuses, takes
from qwen_vl_classifier.serving.schemas.explain import EXAMPLES, ExplainAnswer, ExplainRequest

PNG = "image/png"

router = APIRouter(tags=["explain"])


@router.post(
    "/v1/explain",
    operation_id="explain",
    response_model=ExplainAnswer,
    responses={
        200: {"content": {PNG: {"schema": {"type": "string", "format": "binary"}}}},
        **statuses(*ASKING),
    },
    openapi_extra=takes(ExplainRequest, EXAMPLES),
)
async def explain(request: Request) -> Response:
    """Explain the answer for one example; with `Accept: image/png` the heat map alone is returned."""
    with admitted(request) as visit:
        content = await visit.json(ExplainRequest)
        (name,) = visit.names(content.model)
        outcome = await visit.wait(
            visit.service.explain(content.ask(), name, content.method, visit.deadline, baseline=content.baseline)
        )
        if isinstance(outcome, ItemError):
            raise refused(outcome)
        explanation, heat_map = outcome
        decision = visit.service.models[name].decision_of(explanation.probability).decision
    if _wants_png(request.headers.get("accept", "")):
        return Response(heat_map, media_type=PNG)
    answer = ExplainAnswer(
        model=name,
        decision=decision,
        heat_map=f"data:{PNG};base64,{base64.b64encode(heat_map).decode()}",
        **explanation.to_json(),
    )
    return JSONResponse(answer.model_dump())


def _wants_png(accept: str) -> bool:
    """Tell whether a picture is asked for by name, and JSON is not."""
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return PNG in kinds and "application/json" not in kinds
