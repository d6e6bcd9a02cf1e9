"""What Ray's HTTP proxy lacks: bounds on bodies, and problems as answers.

The proxy reads every body as fast as it comes and keeps it until a replica takes it, however long that is. Clients may
switch its time limit off by a header. What it answers itself is plain text, and nothing at all where a replica died.

The layer runs in the proxies' processes, which find it by the environment variable `CALLBACK_VARIABLE`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.serving.http.access import SecurityHeaders
from qwen_vl_classifier.serving.http.problems import MEDIA_TYPE, RefusedError, problem

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""By this variable of the environment Ray's proxies find layers to put around them."""

CALLBACK = f"{__name__}.proxy_layers"
"""Its value."""

LIMITS_VARIABLE = "QWEN_VL_CLASSIFIER_PROXY_LIMITS"
"""The variable with the limits as JSON; without it they are the defaults of `serve`."""

_OF_RAY = frozenset({b"x_request_timeout_seconds", b"x_request_disconnect_disabled", b"serve_multiplexed_model_id"})
"""Headers, with _ for -, by which clients would tell Ray how to handle their requests."""

_ID = b"x-request-id"
_OWN_PATHS = "/-/"  # the proxy's health and routes
_REFUSED = {  # by the status of what the proxy answers itself
    404: RefusedError(503, "loading", "no classifiers are served at the moment; try again later", retry_after=1),
    408: RefusedError(504, "deadline", "no result before the deadline; try again, or with fewer items"),
    429: RefusedError(429, "queue_full", "the server is overloaded; try again later", retry_after=1),
}
_LOST = RefusedError(
    503, "replica_lost", "the replica that was handling the request has stopped; try again", retry_after=1
)


@dataclass(frozen=True, slots=True)
class ProxyLimits:
    """Bounds of one proxy, as in `ServeConfig`.

    Attributes:
        max_body_bytes: Of one request.
        queue_bytes: Of all requests that are in progress.
        body_timeout: Seconds in which a body must arrive.
    """

    max_body_bytes: int
    queue_bytes: int
    body_timeout: float

    @classmethod
    def of(cls, config: ServeConfig) -> ProxyLimits:
        """Return the limits of a configuration."""
        return cls(config.max_body_bytes, config.queue_bytes, config.body_timeout)


def variables(config: ServeConfig) -> dict[str, str]:
    """Return the variables of the environment that the proxies of a cluster need."""
    limits = json.dumps(dataclasses.asdict(ProxyLimits.of(config)))
    return {CALLBACK_VARIABLE: CALLBACK, LIMITS_VARIABLE: limits}


def proxy_layers() -> list[Middleware]:
    """Return what stands around Ray's proxy, the innermost first, which is how Ray puts them around it."""
    given = os.environ.get(LIMITS_VARIABLE)
    limits = ProxyLimits(**json.loads(given)) if given else ProxyLimits.of(ServeConfig())
    return [Middleware(ProxyGuard, limits=limits), Middleware(SecurityHeaders)]


class ProxyGuard:
    """Bound what requests send, and answer with problems for a proxy of Ray.

    Args:
        app: The proxy.
        limits: The bounds.
    """

    def __init__(self, app: ASGIApp, *, limits: ProxyLimits) -> None:
        self.app = app
        self._limits = limits
        self._held = 0  # bytes of bodies that are in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer where the proxy does not."""
        if scope["type"] != "http" or scope["path"].startswith(_OWN_PATHS):
            await self.app(scope, receive, send)
            return
        headers = [header for header in scope["headers"] if header[0].lower().replace(b"-", b"_") not in _OF_RAY]
        body = _Body(receive, self._limits, self._hold)
        answer = _Answer(send)
        try:
            if not (refused := body.check_length(headers)):
                await self.app({**scope, "headers": headers}, body.receive, answer.send)
                refused = body.refused or answer.refused or _LOST
            if not answer.started:
                await _respond(refused, scope, receive, send)
        finally:
            self._held -= body.held

    def _hold(self, nbytes: int) -> bool:
        """Count bytes, and tell whether they are too many."""
        self._held += nbytes
        return self._held > self._limits.queue_bytes


class _Body:
    """The body of one request on its way to the proxy, which sees a disconnect where it is refused."""

    def __init__(self, receive: Receive, limits: ProxyLimits, hold: Callable[[int], bool]) -> None:
        self.held = 0
        self.refused: RefusedError | None = None
        self._receive = receive
        self._limits = limits
        self._hold = hold
        self._end = asyncio.get_running_loop().time() + limits.body_timeout
        self._complete = False

    def check_length(self, headers: Iterable[tuple[bytes, bytes]]) -> RefusedError | None:
        """Return an error if a header says that the body is too large."""
        lengths = [value for name, value in headers if name == b"content-length" and value.isdigit()]
        return self._too_large() if any(int(value[:20]) > self._limits.max_body_bytes for value in lengths) else None

    async def receive(self) -> Message:
        """Return the next part."""
        try:
            async with asyncio.timeout_at(None if self._complete else self._end):
                message = await self._receive()
        except TimeoutError:
            return self._refuse(RefusedError(408, "body_too_slow", "the body did not arrive in time; send it faster"))
        if message["type"] != "http.request":
            return message
        part = len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        self.held += part
        if self._hold(part):
            return self._refuse(_REFUSED[429])
        if self.held > self._limits.max_body_bytes:
            return self._refuse(self._too_large())
        return message

    def _too_large(self) -> RefusedError:
        most = self._limits.max_body_bytes
        return RefusedError(
            413, "body_too_large", f"the body has more than {most:,} bytes; send fewer or smaller items"
        )

    def _refuse(self, error: RefusedError) -> Message:
        self.refused = error
        return {"type": "http.disconnect"}


class _Answer:
    """The answer to one request: passed on where it is the application's, kept back where it is the proxy's own."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self.refused: RefusedError | None = None
        self._send = send

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on."""
        if message["type"] == "http.response.start":
            names = [name.lower() for name, _ in message["headers"]]
            if b"x-content-type-options" not in names:  # every answer of the application has it
                self.refused = _REFUSED.get(message["status"], _LOST)
                return
            self.started = True
            # The proxy adds the request's id to answers that have it.
            first = names.index(_ID) if _ID in names else -1
            kept = [item for place, item in enumerate(message["headers"]) if names[place] != _ID or place == first]
            message = {**message, "headers": kept}
        if self.started:
            await self._send(message)


async def _respond(error: RefusedError, scope: Scope, receive: Receive, send: Send) -> None:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 408:
        headers["Connection"] = "close"  # else the rest would be waited for
    content = problem(error.status, error.code, error.detail).model_dump()
    await JSONResponse(content, error.status, headers, MEDIA_TYPE)(scope, receive, send)
