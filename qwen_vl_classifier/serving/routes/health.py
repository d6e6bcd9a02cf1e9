"""`/livez` and `/readyz`: how the process is, for whoever supervises it or sends it requests."""

from __future__ import annotations

from fastapi import APIRouter, Request

from qwen_vl_classifier.serving.admission import ready_service, service_of
from qwen_vl_classifier.serving.openapi import statuses
from qwen_vl_classifier.serving.problems import RefusedError
from qwen_vl_classifier.serving.schemas.models import Health

OLDEST_HEARTBEAT = 5.0
"""Seconds since the batch loop last beat after which the process counts as stuck."""

router = APIRouter(tags=["health"])


@router.get("/livez", operation_id="livez", responses=statuses(503))
async def livez(request: Request) -> Health:
    """Tell whether the process is of use: 503 means that only a restart may help."""
    check_alive(request)
    return Health(status="live")


@router.get("/readyz", operation_id="readyz", responses=statuses(503))
async def readyz(request: Request) -> Health:
    """Tell whether requests are welcome: 503 while loading, warming up and shutting down."""
    ready_service(request)
    return Health(status="ready")


def check_alive(request: Request) -> None:
    """Make sure that the process is of use.

    Raises:
        RefusedError: 503, loading failed, or a pass hangs.
    """
    service = service_of(request)
    if service.state == "failed":
        detail = "the server has failed; its log says why"
        raise RefusedError(503, "failed", detail, retry_after=1)
    if service.heartbeat > OLDEST_HEARTBEAT:
        raise RefusedError(503, "stuck", "the server does not get on; restart it", retry_after=1)
