"""The application: routes, checks and errors around a `Service`.

`create_app` builds it without loading anything. Its lifespan loads the classifiers in the background, so that the
health routes answer at once, and on the way out finishes every request that was accepted.

What callers are told is written here or known to be harmless: no path, no traceback, no key and no text of a library
goes into an answer. The log of the server has the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwen_vl_classifier.config import ServeConfig
from qwen_vl_classifier.errors import ClosedError, ConfigError, DeadlineError, QueueFullError
from qwen_vl_classifier.extras import require

require("fastapi", extra="serve")  # before anything that imports it, so that a missing extra is named

from fastapi import APIRouter, FastAPI, Request, Response  # noqa: E402
from fastapi.responses import JSONResponse  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.requests import ClientDisconnect  # noqa: E402
from starlette.types import ASGIApp, Receive, Scope, Send  # noqa: E402

from qwen_vl_classifier.serving.schemas import (  # noqa: E402
    ClassifyAnswer,
    ClassifyRequest,
    ClassifyResult,
    Health,
    ItemError,
    Problem,
    ServedModel,
    ServedModels,
    Usage,
    explain_invalid,
    problem,
)
from qwen_vl_classifier.serving.service import DEFECT, Scored, Service  # noqa: E402

if TYPE_CHECKING:
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.classifier.panel import Panel

T = TypeVar("T")

HEALTH = frozenset({"/livez", "/readyz"})
"""Paths that need no key: they tell nothing, and what calls them has none."""

_NOT_READY = {
    "loading": "the server is loading its classifiers; try again later",
    "draining": "the server is shutting down; try another one",
    "failed": "the classifiers could not be loaded; the server's log says why",
}

router = APIRouter()


def create_app(config: ServeConfig, *, on_failure: Callable[[Exception], None] | None = None) -> FastAPI:
    """Make the ASGI application that serves classifiers.

    Args:
        config: What to serve and how. Host and port are for whoever runs the application.
        on_failure: Called in the event loop when the classifiers cannot be loaded; the default logs it. Either way
            the application then answers 503, `/livez` included.

    Raises:
        ConfigError: No classifiers, two of the same name, or a key file that holds no key.
        MissingExtraError: The extra "serve" is not installed.

    Example:
        >>> app = create_app(ServeConfig(classifiers=("runs/claims",)))
        >>> app.state.service.state
        'loading'
    """
    app = FastAPI(
        title="qwen-vl-classifier",
        lifespan=_lifespan,
        # The documentation pages would load scripts from elsewhere, and a redirect would believe the Host header.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = Service(config, on_failure=on_failure)
    app.include_router(router)
    if config.api_key_file:
        app.add_middleware(KeyCheck, key=_read_key(config.api_key_file))
    app.add_exception_handler(RefusedError, _answer_refused)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_defect)
    return app


class RefusedError(Exception):
    """A request gets a problem for an answer.

    Args:
        status: The HTTP status.
        code: What happened, in one word for programs.
        detail: What happened, in one line for people; it is sent to the caller.
        retry_after: Seconds after which to try again, where that may help.
    """

    def __init__(self, status: int, code: str, detail: str, *, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after = retry_after


class KeyCheck:
    """Let nothing through without the key, health routes excepted.

    It looks at the path that will be routed, compared as a whole, and not at a URL put together from headers; what
    is not known to be open is closed.

    Args:
        app: What is behind the check.
        key: The key.
    """

    def __init__(self, app: ASGIApp, *, key: bytes) -> None:
        self.app = app
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] in HEALTH or self._has_key(scope):
            await self.app(scope, receive, send)
        else:
            detail = "no valid key; wanted the header Authorization: Bearer KEY"
            response = _problem_response(401, "invalid_api_key", detail, {"WWW-Authenticate": "Bearer"})
            await response(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


@router.post(
    "/v1/classify",
    response_model_exclude_none=True,
    responses={status: {"model": Problem} for status in (400, 404, 408, 413, 422, 429, 500, 503, 504)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ClassifyRequest.model_json_schema()}},
        }
    },
)
@router.post("/classify", include_in_schema=False, response_model_exclude_none=True)
async def classify(request: Request) -> ClassifyAnswer:
    """Classify examples; one that cannot be classified has an `error` in its own place."""
    service = _service(request)
    panel = _ready_panel(service)
    deadline = asyncio.get_running_loop().time() + service.config.deadline
    try:
        with service.accepted():
            asked = _parse(await _read_body(request, service.config.max_body_bytes, deadline))
            column = _column(service, asked)
            outcomes = await _while_connected(request, service.classify(asked.input, deadline))
    except QueueFullError as error:
        detail = "too many examples wait; try again later"
        raise RefusedError(429, "queue_full", detail, retry_after=error.retry_after) from None
    except DeadlineError as error:
        raise RefusedError(504, "deadline", str(error)) from None
    except ClosedError:
        raise RefusedError(503, "draining", _NOT_READY["draining"], retry_after=1) from None
    scored = [outcome for outcome in outcomes if isinstance(outcome, Scored)]
    if not scored and any(isinstance(o, ItemError) and o.code == "internal_error" for o in outcomes):
        raise RefusedError(500, "internal_error", DEFECT)  # there is nothing to show, and not by the caller's fault
    tokens = sum(outcome.tokens for outcome in scored)
    return ClassifyAnswer(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=service.names[column],
        data=[_result(i, outcome, panel.classifiers[column], column) for i, outcome in enumerate(outcomes)],
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )


@router.get("/v1/models", responses={503: {"model": Problem}})
async def models(request: Request) -> ServedModels:
    """List the classifiers."""
    service = _service(request)
    return ServedModels(
        data=[
            ServedModel(
                id=name,
                created=service.created,
                label_names=classifier.label_names,
                threshold=classifier.threshold,
            )
            for name, classifier in zip(service.names, _ready_panel(service).classifiers, strict=True)
        ]
    )


@router.get("/livez", responses={503: {"model": Problem}})
async def livez(request: Request) -> Health:
    """Tell whether the process is of use: 503 means that only a restart may help."""
    if _service(request).state == "failed":
        raise RefusedError(503, "failed", _NOT_READY["failed"])
    return Health(status="live")


@router.get("/readyz", responses={503: {"model": Problem}})
async def readyz(request: Request) -> Health:
    """Tell whether requests are welcome: 503 while loading and while shutting down."""
    _ready_panel(_service(request))
    return Health(status="ready")


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    loading = asyncio.create_task(service.load())
    try:
        yield
    finally:
        await service.close()
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _ready_panel(service: Service) -> Panel:
    if service.panel is None or service.state != "ready":
        raise RefusedError(503, service.state, _NOT_READY[service.state], retry_after=1)
    return service.panel


async def _read_body(request: Request, limit: int, deadline: float) -> bytearray:
    """Read a body of at most `limit` bytes, counted as they come: its header may lie or be missing."""
    refused = RefusedError(
        413, "body_too_large", f"the body has more than {limit:,} bytes; send fewer or smaller items"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise refused
    body = bytearray()
    try:
        async with asyncio.timeout_at(deadline):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise refused
    except TimeoutError:
        raise RefusedError(408, "body_too_slow", "the body did not arrive in time; send it faster") from None
    return body


def _parse(body: bytearray) -> ClassifyRequest:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "invalid_json", "the body is no JSON in UTF-8; wanted a JSON object") from None
    try:
        return ClassifyRequest.model_validate(content)
    except ValidationError as error:
        raise RefusedError(422, "invalid_request", explain_invalid(error)) from None


def _column(service: Service, asked: ClassifyRequest) -> int:
    """Return the position of the classifier that is asked, if it and the number of items are possible."""
    if len(asked.input) > service.config.queue_size:
        detail = f"input has {len(asked.input)} items; wanted at most {service.config.queue_size}"
        raise RefusedError(422, "too_many_items", detail)
    if asked.model is None and len(service.names) > 1:
        raise RefusedError(422, "model_missing", "model is missing; wanted a name that /v1/models lists")
    if asked.model is None:
        return 0
    if asked.model not in service.names:
        raise RefusedError(404, "model_not_found", "the model is not served; wanted a name that /v1/models lists")
    return service.names.index(asked.model)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for work, and cancel it when the caller goes away. The body must have been read to its end."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _result(index: int, outcome: Scored | ItemError, classifier: Classifier, column: int) -> ClassifyResult:
    if isinstance(outcome, ItemError):
        return ClassifyResult(index=index, error=outcome)
    prediction = classifier.decision_of(outcome.probabilities[column][1])
    return ClassifyResult(
        index=index,
        label=1 if prediction.label else 0,
        probs=outcome.probabilities[column],
        score=prediction.probability,
        threshold=classifier.threshold,
        decision=prediction.decision,
    )


def _read_key(path: str) -> bytes:
    try:
        key = Path(path).read_bytes().strip()
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL
        reason = getattr(error, "strerror", None) or "the path is not valid"
        raise ConfigError(
            f"api_key_file {path}: it cannot be read ({reason}); give a file that holds the key"
        ) from None
    if not key or len(key.split()) > 1:
        raise ConfigError(f"api_key_file {path}: it holds no key, or several words; put one key on one line")
    return key


def _problem_response(status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(
        problem(status, code, detail).model_dump(),
        status_code=status,
        headers=headers,
        media_type="application/problem+json",
    )


async def _answer_refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else None
    return _problem_response(error.status, error.code, error.detail, headers)


async def _answer_http_exception(_request: Request, error: Exception) -> Response:
    """Answer for the framework: no such path, no such method."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    return _problem_response(error.status_code, phrase.replace(" ", "_"), phrase, dict(error.headers or {}))


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # the caller has gone, but the framework wants an answer


async def _answer_defect(_request: Request, _error: Exception) -> Response:
    """Answer for what nobody expected; the framework then raises it again, so that the log has its traceback."""
    return _problem_response(500, "internal_error", DEFECT)
