"""`/metrics`: what was counted and timed, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from qwen_vl_classifier.serving.observability import Metrics
from qwen_vl_classifier.serving.openapi import statuses

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    operation_id="metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **statuses()},
)
async def metrics(request: Request) -> Response:
    """Return counters, histograms and gauges."""
    counted: Metrics = request.app.state.metrics
    content, media_type = counted.exposition()
    return Response(content, media_type=media_type)
