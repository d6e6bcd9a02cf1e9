"""Change what is served: `POST /v1/models` and `DELETE /v1/models/{model}`, for those who have the admin key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from qwen_vl_classifier.errors import ArtifactError, ClosedError, ConfigError, OutOfMemoryError, QwenVLClassifierError
from qwen_vl_classifier.serving.http.incoming import admitted, check_served, ready_service
from qwen_vl_classifier.serving.http.openapi import problems, takes
from qwen_vl_classifier.serving.http.problems import RefusedError
from qwen_vl_classifier.serving.routes.operations import PanelOfLabels, ServedModel, described
from qwen_vl_classifier.serving.schemas import StrictModel
from qwen_vl_classifier.serving.service import Service

_LONGEST_PATH = 4096


class LoadRequest(StrictModel):
    """A classifier or a panel to load."""

    folder: Annotated[str, Field(min_length=1, max_length=_LONGEST_PATH)] = Field(
        description="folder of a saved classifier or panel in --watch or --models-root, or its path relative to these"
    )
    name: str | None = Field(default=None, description="under which to serve it; by default the folder's name")


class DeletedModel(BaseModel):
    """A classifier or a panel that is no longer served."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


_EXAMPLES: dict[str, Any] = {"folder": {"summary": "A folder in the watched folder", "value": {"folder": "claims"}}}

router = APIRouter(tags=["models"])


@router.post(
    "/v1/models",
    operation_id="load_model",
    responses={
        201: {"model": ServedModel | PanelOfLabels},
        **problems(400, 404, 408, 409, 413, 415, 422, 429, 503, 504, 507),
    },
    openapi_extra=takes(LoadRequest, _EXAMPLES),
)
async def load_model(request: Request, response: Response) -> ServedModel | PanelOfLabels:
    """Load a classifier or a panel, or its new version; answered once it is warm; the old one serves until then."""
    service = _changeable(request)
    with admitted(request) as incoming:
        content = await incoming.json(LoadRequest, lambda content: content)
    del incoming  # which holds the classifiers of now
    try:
        name, is_new = await service.registry.put(content.folder, content.name)
    except LookupError:
        detail = (
            "folder is not a saved classifier or panel in the folders from which this server loads; see --models-root"
        )
        raise RefusedError(404, "folder_not_found", detail, param="folder") from None
    except ConfigError as error:
        raise RefusedError(409, "name_taken", str(error), param="name") from None
    except OutOfMemoryError:
        detail = "there is not enough memory for this version beside the classifiers that serve, which go on"
        raise RefusedError(507, "out_of_memory", detail) from None
    except ArtifactError:
        detail = (
            "the folder does not hold a valid classifier or panel, or its backbone has changed; see the server's log"
        )
        raise RefusedError(422, "invalid_classifier", detail, param="folder") from None
    except ClosedError:  # the server is shutting down
        raise
    except QwenVLClassifierError:
        detail = "its backbone cannot be loaded; see the server's log"
        raise RefusedError(422, "invalid_backbone", detail, param="folder") from None
    response.status_code = 201 if is_new else 200
    return described(service, name)


@router.delete(
    "/v1/models/{model:path}",
    operation_id="delete_model",
    responses=problems(404, 409, 503),
    response_model=DeletedModel,
)
async def delete_model(request: Request, model: str) -> DeletedModel:
    """Stop serving a classifier or a panel; its folder stays as it is."""
    service = _changeable(request)
    check_served(service.served, model)
    if service.served.listed_as(model) != model:
        detail = "the model is one label of a panel; delete the panel, or save it without that label"
        raise RefusedError(409, "part_of_panel", detail, param="model")
    try:
        await service.registry.remove(model)
    except ConfigError as error:
        raise RefusedError(409, "watched", str(error), param="model") from None
    except LookupError:  # it has just gone
        check_served(service.served, model)
    return DeletedModel(id=model)


def _changeable(request: Request) -> Service:
    """Return the service, if requests may change what it serves; that they have the key was checked before.

    Raises:
        RefusedError: 409, several processes serve the same.
    """
    service = ready_service(request)
    if not request.app.state.is_alone:
        detail = "several processes serve here, and a request reaches one of them; start them with --watch instead"
        raise RefusedError(409, "several_processes", detail)
    return service
