"""`/v1/models`: who can be asked."""

from __future__ import annotations

from fastapi import APIRouter, Request

from qwen_vl_classifier.serving.admission import ready_service, served_model
from qwen_vl_classifier.serving.openapi import statuses
from qwen_vl_classifier.serving.schemas.models import ServedModel, ServedModels
from qwen_vl_classifier.serving.service import Service

router = APIRouter(tags=["models"])


@router.get("/v1/models", operation_id="list_models", responses=statuses(503))
async def models(request: Request) -> ServedModels:
    """List the classifiers."""
    service = ready_service(request)
    return ServedModels(data=[_described(service, name) for name in service.names])


@router.get("/v1/models/{model}", operation_id="show_model", responses=statuses(404, 503))
async def model(request: Request, model: str) -> ServedModel:
    """Describe one classifier."""
    service = ready_service(request)
    served_model(service, model)
    return _described(service, model)


def _described(service: Service, name: str) -> ServedModel:
    classifier = service.models[name]
    return ServedModel(
        id=name,
        created=service.created,
        label_names=list(classifier.label_names),
        threshold=classifier.threshold,
        abstention=None if classifier.abstention is None else list(classifier.abstention),
    )
