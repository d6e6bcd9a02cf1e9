"""A middleware that gives every request an id, and counts, times and logs it, whatever becomes of it."""

from __future__ import annotations

import logging
import re
import time
import uuid
from http import HTTPMethod
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vl_classifier.serving.logs import begin_request
from qwen_vl_classifier.serving.metrics import Metrics

CALLER_LEFT = 499
"""The status that stands for a caller who left before there was an answer; nobody is sent it."""

UNROUTED = "unrouted"
"""The route of a request that was refused before one was found, or for which there is none."""

TRACE_ID = "classifier.trace_id"
"""Where a request's scope holds the id of its trace, if it has one."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset(HTTPMethod)

_log = logging.getLogger(__name__)


class Observed:
    """Observe what is behind it; to be the outermost middleware, so that it sees what the others refuse.

    A request brings its id in `X-Request-ID`, if that is a plain word, or is given one; the answer carries it. The
    log has one line of each request: the template of its route, never the path or query as it came.

    Args:
        app: What is behind.
        metrics: Where to count.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and take down how it went."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        noted = begin_request(request_id)
        started = time.perf_counter()
        status = 0

        async def observed_receive() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect":
                status = status or CALLER_LEFT
            return message

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = status or message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self.app(scope, observed_receive, observed_send)
        finally:
            # What nobody caught becomes a 500 outside, which also logs its traceback.
            self._take_down(scope, status or 500, time.perf_counter() - started, noted)

    def _take_down(self, scope: Scope, status: int, seconds: float, noted: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", None) or UNROUTED
        self._metrics.request(route, status, seconds)
        fields = {
            "method": scope["method"] if scope["method"] in _METHODS else "other",
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            **({"trace_id": scope[TRACE_ID]} if TRACE_ID in scope else {}),
            **noted,
        }
        _log.info("request", extra={"fields": fields})


def _request_id(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return str(given[0], "ascii")
    return uuid.uuid4().hex
