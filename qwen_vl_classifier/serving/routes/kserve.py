"""`/v2`: the open inference protocol of KServe, version 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

import qwen_vl_classifier
from qwen_vl_classifier.serving.admission import admitted, only_scored, ready_service, served_model
from qwen_vl_classifier.serving.items import Ask, Scored
from qwen_vl_classifier.serving.logs import note
from qwen_vl_classifier.serving.openapi import ASKING, statuses, takes
from qwen_vl_classifier.serving.problems import RefusedError
from qwen_vl_classifier.serving.routes.health import check_alive
from qwen_vl_classifier.serving.schemas.kserve import (
    EXAMPLES,
    InferAnswer,
    InferRequest,
    InferTensor,
    ModelMetadata,
    ModelReady,
    OutputTensor,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
)
from qwen_vl_classifier.serving.service import Service

router = APIRouter(prefix="/v2", tags=["kserve"])


@router.get("", operation_id="kserve_server", responses=statuses())
async def server() -> ServerMetadata:
    """Say what the server is."""
    return ServerMetadata(version=qwen_vl_classifier.__version__)


@router.get("/health/live", operation_id="kserve_live", responses=statuses(503))
async def live(request: Request) -> ServerLive:
    """Tell whether the process is of use, as `/livez` does."""
    check_alive(request)
    return ServerLive()


@router.get("/health/ready", operation_id="kserve_ready", responses=statuses(503))
async def ready(request: Request) -> ServerReady:
    """Tell whether requests are welcome, as `/readyz` does."""
    ready_service(request)
    return ServerReady()


@router.get("/models/{model}", operation_id="kserve_model", responses=statuses(404, 503))
async def metadata(request: Request, model: str) -> ModelMetadata:
    """Say what a model takes and returns."""
    served_model(ready_service(request), model)
    return ModelMetadata(
        name=model,
        inputs=[_bytes("text"), _bytes("image")],
        outputs=[
            TensorMetadata(name="probability", datatype="FP64", shape=[-1, 2]),
            TensorMetadata(name="label", datatype="INT64", shape=[-1]),
            _bytes("decision"),
        ],
    )


@router.get("/models/{model}/ready", operation_id="kserve_model_ready", responses=statuses(404, 503))
async def model_ready(request: Request, model: str) -> ModelReady:
    """Tell whether requests for a model are welcome."""
    served_model(ready_service(request), model)
    return ModelReady(name=model)


@router.post(
    "/models/{model}/infer",
    operation_id="kserve_infer",
    response_model_exclude_none=True,
    responses=statuses(*ASKING),
    openapi_extra=takes(InferRequest, EXAMPLES),
)
async def infer(request: Request, model: str) -> InferAnswer:
    """Classify examples that come as columns; the error of one is the request's."""
    with admitted(request) as visit:
        if "inference-header-content-length" in request.headers:
            detail = "the body has a binary part, which is not taken; send all data as JSON"
            raise RefusedError(400, "unsupported_binary", detail)
        served_model(visit.service, model)
        content = await visit.json(InferRequest)
        asks = _asks(content.inputs)
        visit.bounded(len(asks), "inputs")
        note(items=len(asks))
        scored = only_scored(await visit.wait(visit.service.classify(asks, [model], visit.deadline)), "inputs")
        wanted = [output.name for output in content.outputs or ()] or ["probability", "label", "decision"]
        outputs = _outputs(visit.service, scored, model)
    return InferAnswer(id=content.id, model_name=model, outputs=[outputs[name] for name in wanted])


def _bytes(name: str) -> TensorMetadata:
    return TensorMetadata(name=name, datatype="BYTES", shape=[-1])


def _asks(tensors: Sequence[InferTensor]) -> list[Ask]:
    """Put the columns together.

    Raises:
        RefusedError: 400, a column is missing, there twice, or does not fit.
    """
    columns = {tensor.name: _column(tensor) for tensor in tensors}
    if len(columns) < len(tensors) or "text" not in columns:
        raise _invalid("wanted one input text, and at most one input image")
    texts = columns["text"]
    images = columns.get("image", [""] * len(texts))
    if len(images) != len(texts):
        raise _invalid(f"text has {len(texts)} elements and image {len(images)}; wanted as many of one as of the other")
    return [Ask(text, (image,) if image else ()) for text, image in zip(texts, images, strict=True)]


def _column(tensor: InferTensor) -> list[str]:
    rows: list[Any] = tensor.data
    if len(tensor.shape) == 2:
        if tensor.shape[1] != 1:
            raise _invalid(f"{tensor.name} has more than one column; wanted the shape [n] or [n, 1]")
        rows = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
    if not rows:
        raise _invalid(f"{tensor.name} is empty; wanted at least one element")
    if tensor.shape[0] != len(rows):
        raise _invalid(f"{tensor.name} has {len(rows)} elements; wanted as many as its shape says")
    if not all(isinstance(row, str) for row in rows):
        raise _invalid(f"{tensor.name} holds something else than text; wanted text")
    return rows


def _outputs(service: Service, scored: Sequence[Scored], model: str) -> dict[str, OutputTensor]:
    pairs = [one.probabilities[model] for one in scored]
    predictions = [service.models[model].decision_of(pair[1]) for pair in pairs]
    rows = len(pairs)
    return {
        "probability": OutputTensor(
            name="probability", shape=[rows, 2], datatype="FP64", data=[value for pair in pairs for value in pair]
        ),
        "label": OutputTensor(
            name="label", shape=[rows], datatype="INT64", data=[int(prediction.label) for prediction in predictions]
        ),
        "decision": OutputTensor(
            name="decision", shape=[rows], datatype="BYTES", data=[prediction.decision for prediction in predictions]
        ),
    }


def _invalid(why: str) -> RefusedError:
    return RefusedError(400, "invalid_tensor", why, param="inputs")
