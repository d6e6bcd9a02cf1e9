"""What is served and how the server is doing: `/v1/models`, `/livez`, `/readyz` and `/metrics`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from qwen_vl_classifier.errors import first_of
from qwen_vl_classifier.serving.decisions.request_bodies import ZERO_SHOT
from qwen_vl_classifier.serving.http.incoming import check_not_empty, check_served, ready_service, service_of
from qwen_vl_classifier.serving.http.openapi import problems
from qwen_vl_classifier.serving.http.problems import RefusedError
from qwen_vl_classifier.serving.models.label_names import label_model
from qwen_vl_classifier.serving.models.model_set import ModelSet
from qwen_vl_classifier.serving.models.registry import Pending
from qwen_vl_classifier.serving.observability.prometheus import Metrics
from qwen_vl_classifier.serving.schemas import Pair
from qwen_vl_classifier.serving.service import Service

MAX_STUCK_SECONDS = 5.0
"""How much longer a pass may take than any caller could wait for it before only a restart may help."""

router = APIRouter()


class ServedModel(BaseModel):
    """One classifier that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970, when it was saved")
    owned_by: Literal["qwen-vl-classifier"] = "qwen-vl-classifier"
    version: str = Field(description="digest of its content: the same wherever the same classifier is served")
    label_names: Annotated[list[str], Field(min_length=2, max_length=2)] = Field(
        description="what class 0 and class 1 are called"
    )
    text: str | None = Field(
        default=None, description="the text of every training row, where all had the same; a text to begin with"
    )
    threshold: float = Field(description="score from which the label is 1")
    abstention: Pair | None = Field(
        description="scores between which the decision is abstain, both included; null where it never is"
    )


class ServedLabel(BaseModel):
    """One label of a panel: a classifier that can be requested by itself."""

    id: str = Field(description="PANEL/LABEL, by which requests name this label alone")
    name: str = Field(description="of the label, as results have it")
    label_names: Annotated[list[str], Field(min_length=2, max_length=2)] = Field(
        description="what class 0 and class 1 are called"
    )
    threshold: float = Field(description="score from which the label is 1")
    abstention: Pair | None = Field(description="scores between which the decision is abstain; null where it never is")


class PanelOfLabels(BaseModel):
    """A panel that is served: several labels, or several classes of which an example has exactly one."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970, when it was saved")
    owned_by: Literal["qwen-vl-classifier"] = "qwen-vl-classifier"
    version: str = Field(description="digest of its content: the same wherever the same panel is served")
    text: str | None = Field(
        default=None, description="the text of every training row, where all had the same; a text to begin with"
    )
    one_of: bool = Field(description="whether its labels are classes of which an example has exactly one")
    labels: list[ServedLabel]


class PendingModel(BaseModel):
    """A version that is not served."""

    id: str
    state: Pending = Field(description="failed where it cannot be served; see the server's log")


class DecisionModel(BaseModel):
    """A model that `/v1/systemone` answers by, as clients of that route list them."""

    name: str
    description: str
    release_date: str = Field(description="day on which it was saved")


class ServedModels(BaseModel):
    """All classifiers and panels that are served."""

    object: Literal["list"] = "list"
    data: list[ServedModel | PanelOfLabels]
    models: list[DecisionModel] = Field(
        description="the same for clients of /v1/systemone, and the backbones that answer there zero-shot"
    )
    pending: list[PendingModel] = Field(
        description="new classifiers and new versions that are not served yet, or cannot be"
    )


class Health(BaseModel):
    """The process is alive or ready; anything else is a problem."""

    status: Literal["live", "ready"]


@router.get("/v1/models", operation_id="list_models", tags=["models"], responses=problems(503))
async def models(request: Request) -> ServedModels:
    """List the classifiers."""
    service = ready_service(request)
    pending = [PendingModel(id=name, state=state) for name, state in sorted(service.registry.pending.items())]
    return ServedModels(
        data=[described(service, name) for name in service.served.names],
        models=[model for name in service.served.names for model in _for_decisions(service.served, name)],
        pending=pending,
    )


@router.get("/v1/models/{model:path}", operation_id="show_model", tags=["models"], responses=problems(404, 503))
async def model(request: Request, model: str) -> ServedModel | PanelOfLabels:
    """Describe one classifier, one panel, or one label of a panel (PANEL/LABEL)."""
    service = ready_service(request)
    check_served(service.served, model)
    return described(service, model)


def described(service: Service, name: str) -> ServedModel | PanelOfLabels:
    """Describe one classifier or panel that is served."""
    version = service.served.version_of(name)
    if name in service.served.saved_panels:
        panel = service.served.saved_panels[name]
        texts = {classifier.training_text for classifier in panel.classifiers}
        return PanelOfLabels(
            id=name,
            created=version.saved,
            version=version.digest,
            text=texts.pop() if len(texts) == 1 else None,
            one_of=panel.one_of,
            labels=[
                ServedLabel(
                    id=label_model(name, label),
                    name=label,
                    label_names=list(classifier.label_names),
                    threshold=classifier.threshold,
                    abstention=None if classifier.abstention is None else list(classifier.abstention),
                )
                for label, classifier in zip(panel.names, panel.classifiers, strict=True)
            ],
        )
    classifier = service.served.models[name]
    return ServedModel(
        id=name,
        created=version.saved,
        version=version.digest,
        label_names=list(classifier.label_names),
        text=classifier.training_text,
        threshold=classifier.threshold,
        abstention=None if classifier.abstention is None else list(classifier.abstention),
    )


def _for_decisions(served: ModelSet, name: str) -> list[DecisionModel]:
    """Describe what answers questions: a classifier, or each label of a panel, and the backbone if it can."""
    day = datetime.fromtimestamp(served.versions[name].saved, UTC).date().isoformat()
    found = []
    for model in served.classifiers_of(name):
        no, yes = served.models[model].label_names
        found.append(DecisionModel(name=model, description=f"a trained classifier: {no} or {yes}", release_date=day))
    if name in served.saved_panels:
        description = f"a panel of classifiers, for a choice between {first_of(served.saved_panels[name].names)}"
        found.insert(0, DecisionModel(name=name, description=description, release_date=day))
    if served.panel_of(name).label_reader.unavailable is None:
        description = "the backbone of that classifier, which answers any question zero-shot"
        found.append(DecisionModel(name=name + ZERO_SHOT, description=description, release_date=day))
    return found


@router.get("/livez", operation_id="livez", tags=["health"], responses=problems(503))
async def livez(request: Request) -> Health:
    """Tell whether the process is alive (liveness); 503 means that only a restart may help."""
    check_alive(service_of(request))
    return Health(status="live")


def check_alive(service: Service) -> None:
    """Make sure that a service is alive.

    Raises:
        RefusedError: 503, only a restart may help.
    """
    if service.state == "failed":
        raise RefusedError(503, "failed", "the server has failed; see its log", retry_after=1)
    if service.stuck_seconds > MAX_STUCK_SECONDS:
        raise RefusedError(503, "stuck", "the inference loop is stuck; restart the server", retry_after=1)


@router.get("/readyz", operation_id="readyz", tags=["health"], responses=problems(503))
async def readyz(request: Request) -> Health:
    """Tell whether requests are answered (readiness); 503 while loading, shutting down, or without classifiers."""
    check_not_empty(ready_service(request).served)
    return Health(status="ready")


@router.get(
    "/metrics",
    operation_id="metrics",
    tags=["health"],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems()},
)
async def metrics(request: Request) -> Response:
    """Return counters, histograms and gauges for Prometheus."""
    counted: Metrics = request.app.state.metrics
    content, media_type = counted.exposition()
    return Response(content, media_type=media_type)
