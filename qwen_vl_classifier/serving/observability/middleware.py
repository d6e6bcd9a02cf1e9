"""An id, a count and a log line for every request, however it ends."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from http import HTTPMethod
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vl_classifier.serving.observability.logs import begin_request
from qwen_vl_classifier.serving.observability.prometheus import CLIENT_CLOSED_REQUEST, Metrics

UNROUTED = "unrouted"
"""The route of a request that was refused before one was found, or for which there is none."""

_VALID_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset(HTTPMethod)

_log = logging.getLogger(__name__)


class Observability:
    """Middleware that gives every request an id, and counts, times and logs it, however it ends.

    It has to be the outermost one, so that it sees what the others refuse. A request brings its id in `X-Request-ID`,
    if that is a plain word, or is given one; the answer carries it. The log has one line for each request.

    Args:
        app: The application behind it.
        metrics: Where to count.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and record how it went."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        request_id = given[0] if len(given) == 1 and _VALID_ID.fullmatch(given[0]) else uuid.uuid4().hex.encode()
        fields = begin_request(request_id.decode())
        started = time.perf_counter()
        status = 0

        async def observed_receive() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect":
                status = status or CLIENT_CLOSED_REQUEST
            return message

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = status or message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        try:
            await self.app(scope, observed_receive, observed_send)
        finally:
            # What nobody caught becomes a 500 outside, which also logs its traceback.
            self._record(scope, status or 500, time.perf_counter() - started, fields)

    def _record(self, scope: Scope, status: int, seconds: float, fields: Mapping[str, Any]) -> None:
        route = getattr(scope.get("route"), "path_format", None) or UNROUTED  # without the kinds of its parameters
        self._metrics.request(route, status, seconds)
        line = {
            "method": scope["method"] if scope["method"] in _METHODS else "other",
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            **fields,
        }
        _log.info("request", extra={"fields": line})
