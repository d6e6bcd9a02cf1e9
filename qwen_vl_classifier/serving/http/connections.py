"""HTTP/1.1 connections with time limits, so that no client holds one without using it.

uvicorn parses requests (by httptools) and runs the application. `Connection` stands between it and the socket: it
limits the size and the time of headers, hands on one request at a time, its body only once the application reads it,
and drops unparsed what a client still sends after its answer.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.serving.http.parsing import HttpParser
from qwen_vl_classifier.serving.http.problems import problem

_MAX_HEADER_BYTES = 16_384  # of one request
_UNREAD_SECONDS = 30.0  # in which a client must read what is sent
_LINGER_SECONDS = 1.0  # for a client that still sends to see the answer
_HALF_CLOSED_SECONDS = 0.25  # until a client that has stopped sending is asked whether it still reads
_PROBE_SECONDS = 0.1  # between two looks at what came of that

# The parser calls Python for each chunk and each trailer. So what stands around the data of a body in chunks may take a
# 32nd of it, which is reached by chunks of some 200 bytes; shorter ones are let pass for the first so many bytes.
_MAX_FRAMING_BYTES = 8_192
_MAX_FRAMING = 1 / 32
_PARSED_AT_ONCE = 4_096  # bytes of a body in chunks, between two looks at what they were

_UNKNOWN = sys.maxsize  # bytes of a body that comes in chunks

CONNECTION = "connection"
"""Where the state of a request's scope holds its connection."""

_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)  # none is offered, and the parser would end there


class Connection(asyncio.Protocol):
    """One connection.

    Args:
        config: Limits: `header_timeout`, also for how long a connection may be idle; `body_timeout` and
            `max_body_bytes`, also for what comes after an early answer.
        make_http: Makes the protocol that parses and answers, given this connection.
        refused: Called with a code when a request is refused here.
        connections: Those that are open; this one is among them from beginning to end.

    Attributes:
        lost: Set when the connection is over.
    """

    def __init__(
        self,
        config: ServeConfig,
        make_http: Callable[[Connection], HttpParser],
        refused: Callable[[str], None],
        connections: set[Connection],
    ) -> None:
        self.lost = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._config = config
        self._http = make_http(self)
        self._refused = refused
        self._connections = connections
        self._transport: asyncio.Transport
        self._waiting = bytearray()  # what is not handed on yet: a body that nobody reads, or the next request's head
        self._in_request = False
        self._body_left = 0  # bytes of the current request that are still to be handed on
        self._body_is_read = False  # whether the application reads it
        self._in_chunks = False
        self._framing = 0  # bytes handed on of a body in chunks, without its data
        self._ended = False  # whether the client has stopped sending
        self._probed = False
        self._dropping = False
        self._dropped = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._probe_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a connection."""
        self._connections.add(self)
        self._transport = cast("asyncio.Transport", transport)
        self._http.connection_made(self._transport)
        self._start_header_timer()

    def data_received(self, data: bytes) -> None:
        """Pass on what belongs to the current request; keep or drop the rest."""
        if self._dropping:
            self._dropped += len(data)
            if self._dropped > self._config.max_body_bytes:
                self.abort()
        elif not self._in_request:
            self._collect_head(data)
        elif self._body_left and self._body_is_read:
            self._hand_on(data)
        else:
            self._waiting += data
            if len(self._waiting) > _MAX_HEADER_BYTES:
                self._transport.pause_reading()

    def eof_received(self) -> bool | None:
        """Close, unless a whole request has come: its client may read the answer although it sends no more."""
        self._ended = True
        # TLS has no half of a connection that stays open.
        if self._dropping or not self._has_whole_request() or self._transport.get_extra_info("sslcontext"):
            return False
        self._probe_timer = self._probe_timer or self._loop.call_later(_HALF_CLOSED_SECONDS, self._probe)
        return True

    def pause_writing(self) -> None:
        """Wait for a client that does not read, but not forever."""
        self._http.pause_writing()
        self._unread_timer = self._loop.call_later(_UNREAD_SECONDS, self._give_up_unread)

    def resume_writing(self) -> None:
        """Continue writing."""
        self._http.resume_writing()
        self._unread_timer = _cancelled(self._unread_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._header_timer = _cancelled(self._header_timer)
        self._unread_timer = _cancelled(self._unread_timer)
        self._probe_timer = _cancelled(self._probe_timer)
        self._http.connection_lost(exc)
        self.lost.set()
        self._connections.discard(self)

    @property
    def body_is_complete(self) -> bool:
        """Whether all of the current request has arrived. That only the application knows of one in chunks."""
        return self._body_left == 0

    def begin_request(self) -> None:
        """Stop the timer for headers; call it when the application begins with a request."""
        self._header_timer = _cancelled(self._header_timer)

    def begin_body(self) -> None:
        """Pass on the body; call it when the application reads it: until then it costs nothing to parse."""
        if not self._body_is_read:
            self._body_is_read = True
            self._hand_on_waiting()
            if self._ended and not self._has_whole_request():
                self._transport.close()

    def end_body(self) -> None:
        """Pass on no more; call it when the application has the whole body."""
        self._body_left = 0

    def begin_answer(self) -> bool:
        """Tell whether the request is over: nothing of it is parsed from now on. To be called before the answer."""
        if not self._in_chunks and self._body_left <= len(self._waiting):
            self.begin_body()  # which is no work, and the connection can be used again
        self._dropping = not self.body_is_complete
        return not self._dropping

    def end_request(self) -> None:
        """Continue with the next request; call it when the application has answered."""
        self._in_request = False
        if not (self._transport.is_closing() or self._dropping):
            self._start_header_timer()
            self._hand_on_waiting()
            if self._ended and not self._in_request:
                self._transport.close()

    def refuse(self, status: int, code: str, detail: str) -> None:
        """Answer in place of the application, and close."""
        self._refused(code)
        self._transport.write(raw_answer(status, code, detail))
        self._http.connection_lost(ConnectionAbortedError())  # the application is not to answer too
        self._start_dropping()
        self._loop.call_later(_LINGER_SECONDS, self.abort)

    def refuse_syntax(self) -> None:
        """Refuse what is not HTTP, or what others might read in another way."""
        self.refuse(400, "invalid_http", "the request is not valid HTTP")

    async def drop_rest(self) -> None:
        """Drop what the client still sends of a request that is answered, and close once it has had time to notice.

        A socket that is closed while bytes of its client are unread, or on their way, is reset, and the client loses
        the answer with it.
        """
        self._start_dropping()
        try:
            async with asyncio.timeout(max(_LINGER_SECONDS, self._config.body_timeout)):
                await self.lost.wait()
        except TimeoutError:
            self.abort()
            await self.lost.wait()

    def close_if_idle(self) -> None:
        """Close unless a request is being sent or answered."""
        if not (self._in_request or self._waiting or self._dropping):
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def _collect_head(self, data: bytes) -> None:
        """Collect the head of a request, so that the parser gets it whole or not at all."""
        if not self._waiting:
            data = data.lstrip(b"\r\n")  # RFC 9112, section 2.2
            if not data:
                return
            self._start_header_timer()
        searched = max(0, len(self._waiting) - len(_END_OF_HEAD))
        self._waiting += data
        end = self._waiting.find(_END_OF_HEAD, searched)
        if (end if end >= 0 else len(self._waiting)) > _MAX_HEADER_BYTES:
            detail = f"the headers have more than {_MAX_HEADER_BYTES:,} bytes; send fewer or shorter ones"
            self.refuse(431, "headers_too_large", detail)
        elif end >= 0:
            end += len(_END_OF_HEAD)
            head, rest, self._waiting = bytes(self._waiting[:end]), bytes(self._waiting[end:]), bytearray()
            length = _LENGTH.search(head)
            self._in_chunks = _CHUNKED.search(head) is not None
            self._body_left = _UNKNOWN if self._in_chunks else int(length[1]) if length else 0
            self._body_is_read = False
            self._framing = 0
            self._in_request = True
            self._http.begin_counting()
            self._http.data_received(_UPGRADE.sub(b"", head))
            if rest:
                self.data_received(rest)

    def _hand_on_waiting(self) -> None:
        self._transport.resume_reading()
        waiting, self._waiting = bytes(self._waiting), bytearray()
        if waiting:
            self.data_received(waiting)

    def _hand_on(self, data: bytes) -> None:
        """Hand on what belongs to the body, and keep the rest."""
        body, rest = data[: self._body_left], data[self._body_left :]
        if self._in_chunks:
            self._hand_on_chunks(body)
        else:
            self._body_left -= len(body)
            self._http.data_received(body)
        if rest:  # which there is none behind a body in chunks
            self.data_received(rest)

    def _hand_on_chunks(self, data: bytes) -> None:
        """Hand on a body in chunks, little at a time; refuse it when there is too little in it."""
        for start in range(0, len(data), _PARSED_AT_ONCE):
            parsed = self._http.body_bytes
            part = data[start : start + _PARSED_AT_ONCE]
            self._http.data_received(part)
            if self._http.body_has_ended:  # what comes after it is never read: the connection will be closed
                self._body_left = 0
            if not self._body_left or self._dropping:
                return
            self._framing += len(part) - (self._http.body_bytes - parsed)
            if self._framing > _MAX_FRAMING_BYTES + _MAX_FRAMING * self._http.body_bytes:
                detail = "the body comes in too many small chunks; send larger ones, or its length"
                self.refuse(413, "chunks_too_small", detail)
                return

    def _has_whole_request(self) -> bool:
        """Tell whether a request is in progress of which nothing is still to come, as far as can be told."""
        if not self._in_request:
            return False
        if self._in_chunks:
            return self._http.body_has_ended or not self._body_is_read
        return self._body_left <= len(self._waiting)

    def _probe(self) -> None:
        """Find out whether a client that sends no more has gone; answer it, or let what it asked for be given up.

        A client that has closed its socket and one that only sends no more look the same, until something is sent to
        them: the system of the first one resets the connection.
        """
        if self._transport.is_closing():
            return
        if self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.abort()
            return
        self._probed = self._probed or self._http.write_interim()
        self._probe_timer = self._loop.call_later(_PROBE_SECONDS, self._probe)

    def _start_header_timer(self) -> None:
        _cancelled(self._header_timer)
        self._header_timer = self._loop.call_later(self._config.header_timeout, self._give_up_headers)

    def _give_up_headers(self) -> None:
        if self._waiting:
            self.refuse(408, "slow_headers", "the headers did not arrive in time; send them faster")
        else:  # nothing was asked, so there is nothing to answer
            self._refused("slow_headers")
            self._transport.close()

    def _give_up_unread(self) -> None:
        self._refused("slow_reader")
        self.abort()

    def _start_dropping(self) -> None:
        self._header_timer = _cancelled(self._header_timer)
        self._dropping = True
        self._waiting.clear()
        if not self._transport.is_closing():
            self._transport.resume_reading()
            if self._transport.can_write_eof():
                self._transport.write_eof()


class Requests:
    """Tell connections where the application is in a request, and clients which answer is the last on a connection.

    Args:
        app: What is behind.
        ending: Whether answers are the last ones by now.
    """

    def __init__(self, app: ASGIApp, ending: Callable[[], bool]) -> None:
        self.app = app
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        connection: Connection = scope["state"][CONNECTION]
        connection.begin_request()
        in_chunks = any(name == b"transfer-encoding" for name, _ in scope["headers"])
        early = False  # whether the answer comes before the end of the request

        async def watched_receive() -> Message:
            connection.begin_body()
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                connection.end_body()
            return message

        async def watched_send(message: Message) -> None:
            nonlocal early
            if message["type"] == "http.response.start":
                early = not connection.begin_answer()
                more = [(b"date", formatdate(usegmt=True).encode())]
                # Where a body in chunks ends, only the parser knows: what came after it might be taken for its rest.
                if early or in_chunks or self._ending():
                    more.append((b"connection", b"close"))
                await send({**message, "headers": [*message.get("headers", ()), *more]})
            elif early and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await connection.drop_rest()
            else:
                await send(message)

        try:
            if _is_ambiguous(scope):
                connection.refuse_syntax()
                await connection.lost.wait()
            else:
                await self.app(scope, watched_receive, watched_send)
        finally:
            asyncio.get_running_loop().call_soon(connection.end_request)


def _is_ambiguous(scope: Scope) -> bool:
    """Tell whether others may read a request in another way, though the parser takes it (RFC 9112, 3.2, 6.1)."""
    version = scope["http_version"]
    hosts = sum(name == b"host" for name, _ in scope["headers"])
    codings = [value.strip().lower() for name, value in scope["headers"] if name == b"transfer-encoding"]
    return (
        version not in ("1.0", "1.1")
        or hosts > 1
        or (version == "1.1" and hosts == 0)
        or (bool(codings) and (codings != [b"chunked"] or version == "1.0"))
    )


def raw_answer(status: int, code: str, detail: str) -> bytes:
    """Return a problem as the bytes of an answer after which the connection is closed."""
    body = json.dumps(problem(status, code, detail).model_dump()).encode()
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
