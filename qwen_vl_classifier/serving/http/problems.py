"""Errors as answers: problem details (RFC 9457) that carry OpenAI's error object too.

Messages are written in this package or known to be harmless: no path, no traceback, no key, no text of a library and
nothing that the caller sent. The log of the server has the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vl_classifier.errors import ClosedError, DeadlineError, QueueFullError
from qwen_vl_classifier.serving.items import DEFECT

MEDIA_TYPE = "application/problem+json"

_log = logging.getLogger(__name__)


class OpenAIError(BaseModel):
    """OpenAI's error object."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None = Field(default=None, description="which part of the request it is about, such as input.3")
    code: str = Field(description="what happened, in one word for programs")


class Problem(BaseModel):
    """Problem details (RFC 9457), with OpenAI's error object."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: str = Field(description="what happened, in one line for people")
    error: OpenAIError


class RefusedError(Exception):
    """A request is answered with a problem.

    Args:
        status: The HTTP status.
        code: What happened, in one word for programs.
        detail: What happened, in one line for people; it is sent to the caller.
        param: Which part of the request it is about.
        retry_after: Seconds after which to try again, where that may help.
    """

    def __init__(
        self, status: int, code: str, detail: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.param = param
        self.retry_after = retry_after


class ProblemResponse(JSONResponse):
    """A problem as an answer, counted in the metrics when it is sent. Arguments as of `problem`, and headers."""

    media_type = MEDIA_TYPE

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(problem(status, code, detail, param=param).model_dump(), status_code=status, headers=headers)
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count it and send it."""
        scope["app"].state.metrics.rejected(self._code)
        await super().__call__(scope, receive, send)


class Defects:
    """Answer 500 without detail where the application raises; the log has the traceback.

    The framework would do so too, but outside of everything that is added to an application, where an answer gets
    neither headers nor a line in the log.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer for it if it fails."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:
            _log.exception("a request failed")
            if started:
                raise  # half an answer cannot be taken back: the connection is closed
            await ProblemResponse(500, "internal_error", DEFECT)(scope, receive, send)


def add_handlers(app: FastAPI) -> None:
    """Make an application answer the errors of its routes with problems."""
    for kind in (RefusedError, QueueFullError, DeadlineError, ClosedError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)


def problem(status: int, code: str, detail: str, *, param: str | None = None) -> Problem:
    """Describe why a request has no answer.

    Args:
        status: The HTTP status.
        code: What happened, in one word for programs.
        detail: What happened, in one line for people. It is sent to the caller: no path, no key.
        param: Which part of the request it is about.
    """
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind: Any = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        error=OpenAIError(message=detail, type=kind, param=param, code=code),
    )


def explain_invalid(error: ValidationError) -> str:
    """Explain in one line what is wrong with a request, repeating nothing of it: neither values nor unknown names."""
    problems = []
    for item in error.errors(include_url=False, include_input=False):
        unknown = item["type"] == "extra_forbidden"
        # What stands in angle brackets tells the ways apart in which one field may be given.
        parts = [str(part) for part in (item["loc"][:-1] if unknown else item["loc"])]
        where = ".".join(part for part in parts if not part.startswith("<"))
        what = _WORDS.get(item["type"], _OTHERWISE).format_map(item.get("ctx", {}))
        problems.append(f"{where} {what}" if where else what)
    distinct = list(dict.fromkeys(problems))
    more = f"; and {len(distinct) - _MOST_NAMED} more" if len(distinct) > _MOST_NAMED else ""
    return "; ".join(distinct[:_MOST_NAMED]) + more


_MOST_NAMED = 5  # problems of one request that are spelt out: an answer is no longer than it helps

_OTHERWISE = "is not valid"

# Words of our own, since pydantic's may repeat what was sent. In braces stands what this package declared.
_WORDS = {
    "dict_type": "is not an object",
    "extra_forbidden": "has an unknown field; leave it out",
    "list_type": "is not a list",
    "literal_error": "is unknown; expected {expected}",
    "missing": "is missing",
    "model_attributes_type": "is not an object",
    "model_type": "is not an object",
    "string_type": "is not text",
    "too_long": "is too long; expected at most {max_length}",
    "too_short": "is too short; expected at least {min_length}",
    "union_tag_invalid": "has an unknown type; expected another",
    "union_tag_not_found": "has an unknown type; expected another",
    "value_error": "{error}",
}


async def _answer(_request: Request, error: Exception) -> Response:
    headers: Mapping[str, str] = {}
    match error:
        case RefusedError():
            refused = error
        case QueueFullError():
            detail = "the server is overloaded; try again later"
            refused = RefusedError(429, "queue_full", detail, retry_after=error.retry_after)
        case DeadlineError():
            refused = RefusedError(504, "deadline", "no result before the deadline; try again, or with fewer items")
        case ClosedError():
            refused = RefusedError(503, "draining", "the server is shutting down; try another one", retry_after=1)
        case HTTPException():  # of the framework: no such path, no such method
            phrase = HTTPStatus(error.status_code).phrase.lower()
            refused = RefusedError(error.status_code, phrase.replace(" ", "_"), phrase)
            headers = error.headers or {}
        case _:
            refused = RefusedError(400, "invalid_request", "a parameter in the URL is not valid; see /openapi.json")
    if refused.retry_after is not None:
        headers = {"Retry-After": str(refused.retry_after)}
    return ProblemResponse(refused.status, refused.code, refused.detail, param=refused.param, headers=headers)


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # the caller has gone, but the framework wants an answer
