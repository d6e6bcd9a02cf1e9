"""What callers are told when there is no answer: problem details that carry OpenAI's error object too.

Either kind of client finds what it looks for. Whatever is said is written in this package or known to be harmless: no
path, no traceback, no key, no text of a library and nothing that the caller sent. The log of the server has the rest.
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
    """A request gets a problem for an answer.

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

    def response(self) -> Response:
        """Return the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return ProblemResponse(self.status, self.code, self.detail, param=self.param, headers=headers)


class ProblemResponse(JSONResponse):
    """A problem as an answer, which is counted once it is given.

    Args:
        status: The HTTP status.
        code: What happened, in one word for programs.
        detail: What happened, in one line for people; it is sent to the caller.
        param: Which part of the request it is about.
        headers: Further headers.
    """

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
        content = problem(status, code, detail, param=param).model_dump()
        super().__init__(content, status_code=status, headers=headers)
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
    """Let an application answer what its routes raise with problems."""
    app.add_exception_handler(RefusedError, _answer_refused)
    app.add_exception_handler(QueueFullError, _answer_full)
    app.add_exception_handler(DeadlineError, _answer_late)
    app.add_exception_handler(ClosedError, _answer_closed)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
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
    """Say in one line what is wrong with a request, repeating nothing of it: neither values nor unknown names."""
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
    "extra_forbidden": "has a field that is not known; leave it out",
    "list_type": "is no list; wanted a list",
    "literal_error": "is not known; wanted {expected}",
    "missing": "is missing",
    "model_attributes_type": "is no object; wanted an object",
    "model_type": "is no object; wanted an object",
    "string_type": "is no text; wanted text",
    "too_long": "is too long; wanted at most {max_length}",
    "too_short": "is too short; wanted at least {min_length}",
    "union_tag_invalid": "has a type that is not known; wanted another",
    "union_tag_not_found": "has no type that is known; wanted another",
    "value_error": "{error}",
}


async def _answer_refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return error.response()


async def _answer_full(_request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFullError)
    detail = "too much waits here already; try again later"
    return RefusedError(429, "queue_full", detail, retry_after=error.retry_after).response()


async def _answer_late(_request: Request, _error: Exception) -> Response:
    return ProblemResponse(504, "deadline", "there was no result before the deadline; try again, or with fewer items")


async def _answer_closed(_request: Request, _error: Exception) -> Response:
    return RefusedError(503, "draining", "the server is shutting down; try another one", retry_after=1).response()


async def _answer_http_exception(_request: Request, error: Exception) -> Response:
    """Answer for the framework: no such path, no such method."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    headers = dict(error.headers or {})
    return ProblemResponse(error.status_code, phrase.replace(" ", "_"), phrase, headers=headers)


async def _answer_invalid(_request: Request, _error: Exception) -> Response:
    return ProblemResponse(400, "invalid_request", "a parameter in the URL is not valid; see /openapi.json")


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # the caller has gone, but the framework wants an answer
