"""HTTP/1.1 connections that nobody can hold for nothing, on top of uvicorn's protocol for h11.

h11 and not httptools, although the latter parses faster: h11 comes with uvicorn, is strict about what is a message
and what is not, needs no compiler, and its part of a request is small beside a pass of a model.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from qwen_vl_classifier.serving.problems import problem

MOST_REFUSED = 64
"""Connections beyond those that may be open that wait to be told so; any further ones are dropped."""

_MOST_HEADER_BYTES = 16_384  # of one request; what h11 keeps of headers that come in pieces
_SECONDS_TO_PART = 1.0  # for a client that still sends to see the answer, after which the connection closes
_SECONDS_OF_STALL = 5.0  # in which a client must read some of its answer
_LEAST_READ = 10_000  # bytes, which is some


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server's connections may take.

    Attributes:
        header_seconds: For all headers of a request, from the first byte or the connection on; also how long a
            connection may be idle between two requests.
        body_seconds: For the body of a request that was answered before it came, from the headers on.
        connections: How many may be open.
        refused: Is called with a code whenever a connection is refused or given up.
    """

    header_seconds: float
    body_seconds: float
    connections: int
    refused: Callable[[str], None]


class Connection(H11Protocol):
    """One connection.

    It is closed when headers are late or long, also if they trickle and also between two requests; when the answer
    is given and the rest of the body does not come; and when the client does not read. One that is too many is told
    so and closed.

    Args:
        config: uvicorn's.
        server_state: What connections of a server share.
        app_state: What the application's start left for requests.
        limits: Limits and time limits.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._phase: str | None = None  # what the timer is for
        self._timer: asyncio.TimerHandle | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self._asked: tuple[object, float] = (None, 0.0)  # the last request, and when its headers were complete
        self._parting = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it."""
        super().connection_made(cast("asyncio.Transport", _PartingTransport(transport, self)))
        excess = len(self.connections) - self._limits.connections
        if excess > MOST_REFUSED:
            self._limits.refused("too_many_connections")
            transport.abort()
        elif excess > 0:
            self._refuse(503, "too_many_connections", "too many connections are open; try again later")
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        if self._parting:
            return
        if self.conn.their_state is h11.IDLE and self._header_bytes(data) > _MOST_HEADER_BYTES:
            detail = f"the headers have more than {_MOST_HEADER_BYTES:,} bytes; send fewer or shorter ones"
            self._refuse(431, "headers_too_large", detail)
            return
        super().data_received(data)
        self._watch(began=True)

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(400, "invalid_http", "this is no valid HTTP/1.1 request")

    def pause_writing(self) -> None:
        """Wait for a client that does not read, but not for ever."""
        super().pause_writing()
        self._abort_in(_SECONDS_OF_STALL)

    def resume_writing(self) -> None:
        """Write on."""
        super().resume_writing()
        if self._abort_timer is not None and not self.transport.is_closing():
            self._abort_timer.cancel()
            self._abort_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._timer, self._abort_timer):
            if timer is not None:
                timer.cancel()

    def shutdown(self) -> None:
        """Close the connection if nothing is asked on it, or else after its answer. To be called until it is closed."""
        if not (self._phase == "rest" or self.transport.is_closing()):
            super().shutdown()

    @property
    def parting(self) -> bool:
        """Whether all is said, and the connection only waits for its client to notice."""
        return self._parting

    def part(self) -> None:
        """Say no more, and close once the client has had time to notice.

        A socket that is closed while bytes of its client are unread, or on their way, is reset, and the client loses
        the answer with it.
        """
        if not self._parting:
            self._parting = True
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self._abort_in(self._seconds_of_rest())

    def close(self, transport: asyncio.Transport) -> None:
        """Close the connection, at once if that takes nothing from the client."""
        if self.conn.their_state is h11.SEND_BODY and not transport.is_closing():
            self.part()
        elif not self._parting:
            transport.close()
            self._abort_in(_SECONDS_OF_STALL)  # what was written may have no reader

    def _watch(self, *, began: bool = False) -> None:
        """Start, keep or stop the timer for what this connection waits for.

        Args:
            began: Bytes have just come; if they are of a request that is not yet complete, its time runs.
        """
        if self.cycle is not self._asked[0]:
            self._asked = self.cycle, self.loop.time()
        phase = None
        if self.transport.is_closing():
            pass
        elif self.conn.their_state is h11.IDLE and (began or self.cycle is None or self._phase == "headers"):
            phase = "headers"
        elif self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            phase = "rest"
        if phase == self._phase:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._phase = phase
        if phase == "headers":
            self._timer = self.loop.call_later(self._limits.header_seconds, self._headers_are_late)
        elif phase == "rest":
            self._timer = self.loop.call_later(self._seconds_of_rest(), self.transport.abort)

    def _seconds_of_rest(self) -> float:
        """Return how long to take what nobody reads: as long as a body may take in all."""
        request, since = self._asked
        left = 0.0 if request is None else self._limits.body_seconds - (self.loop.time() - since)
        return max(_SECONDS_TO_PART, left)

    def _headers_are_late(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._refuse(408, "slow_headers", "the headers did not arrive in time; send them faster")
        else:
            self._limits.refused("slow_headers")
            self.transport.close()  # nothing was asked, so there is nothing to answer

    def _header_bytes(self, data: bytes) -> int:
        end = data.find(b"\r\n\r\n")
        return len(self.conn.trailing_data[0]) + (len(data) if end < 0 else end)

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Answer in place of the application, and part."""
        self._limits.refused(code)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application may stop; what it says would not be sent
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        body = json.dumps(problem(status, code, detail).model_dump()).encode()
        head = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "content-type: application/problem+json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            head.append("retry-after: 1")
        self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        self.part()

    def _abort_in(self, seconds: float) -> None:
        if self._abort_timer is None:
            self._abort_timer = self.loop.call_later(seconds, self._abort, math.inf)

    def _abort(self, unsent_before: float) -> None:
        """End the connection, unless its client reads on what is still to be sent."""
        unsent = self.transport.get_write_buffer_size()
        if 0 < unsent <= unsent_before - _LEAST_READ:
            self._abort_timer = self.loop.call_later(_SECONDS_OF_STALL, self._abort, unsent)
            return
        if unsent:
            self._limits.refused("slow_reader")
        self.transport.abort()


class _PartingTransport:
    """A connection's transport, whose `close` is the connection's.

    Args:
        transport: The loop's.
        connection: Whose it is.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.parting or self._transport.is_closing()

    def close(self) -> None:
        self._connection.close(self._transport)
