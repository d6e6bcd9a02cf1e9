"""uvicorn's parser of HTTP/1.1, with what it leaves out: absolute targets, trailers, and errors in our own form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class HttpParser(HttpToolsProtocol):
    """Parse requests and run the application.

    Args:
        refuse: Called in place of an answer to what is not HTTP.
        options: Those of uvicorn's protocol.

    Attributes:
        body_bytes: How much of the current request's body has been parsed, without its framing.
        body_has_ended: Whether its end has been parsed.
    """

    def __init__(self, refuse: Callable[[], None], **options: Any) -> None:
        super().__init__(**options)
        self.begin_counting()
        self._head_ended = False
        self._refuse = refuse

    def begin_counting(self) -> None:
        """Begin to count the body of another request."""
        self.body_bytes = 0
        self.body_has_ended = False

    def write_interim(self) -> bool:
        """Say that the answer is still to come, where that can be said: not within the answer, nor in HTTP/1.0."""
        possible = self.scope["http_version"] != "1.0" and not self.cycle.response_started
        if possible:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return possible

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._head_ended = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; what follows the body (a trailer) is not one (RFC 9110, section 6.5.1)."""
        if not self._head_ended:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Take a target in absolute form as one in origin form (RFC 9112, section 3.2.2)."""
        self._head_ended = True
        target = httptools.parse_url(self.url)
        if target.schema is not None:
            if target.schema.lower() not in (b"http", b"https") or target.userinfo is not None:
                raise ValueError  # which the parser turns into an error of its own
            host = b"[%s]" % target.host if b":" in target.host else target.host
            host += b"" if target.port is None else b":%d" % target.port
            # The target's host counts, and the header is passed over; that there is exactly one is checked later.
            self.headers[:] = [(name, host if name == b"host" else value) for name, value in self.headers]
            self.url = (target.path or b"/") + (b"" if target.query is None else b"?" + target.query)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        self.body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        self.body_has_ended = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Have what is not HTTP refused."""
        self._refuse()
