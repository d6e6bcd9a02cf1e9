"""Hosts on loopback that answer as a test tells them to, in bytes and not in HTTP, so that they can misbehave."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.waiting import LIMIT

Answer = Callable[[socket.socket, str], None]
"""Writes to the connection, given the request; it is closed afterwards."""


@dataclass
class Host:
    """A host that listens.

    Attributes:
        port: Where, on 127.0.0.1.
        requests: The start of every request that came in, as text.
        closing: Set when the test is over.
    """

    port: int
    requests: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)


def body(content: bytes, *headers: str, status: str = "200 OK") -> Answer:
    """Answer with a body and its length, unless a header gives another."""
    lines = [f"HTTP/1.1 {status}", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"Content-Length: {len(content)}")
    return lambda connection, _: connection.sendall("\r\n".join([*lines, "", ""]).encode() + content)


@contextlib.contextmanager
def listening(answer: Answer, *, context: ssl.SSLContext | None = None) -> Iterator[Host]:
    """Serve on a free port, each connection in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = Host(server.getsockname()[1])
        threads: list[threading.Thread] = []

        def serve(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:  # the client may have disconnected
                connection.settimeout(LIMIT)
                secure = context.wrap_socket(connection, server_side=True) if context else connection
                with secure:
                    request = secure.recv(65536)
                    if request:
                        host.requests.append(request.decode("latin-1"))
                        answer(secure, request.decode("latin-1"))

        def accept() -> None:
            while not host.closing.is_set():
                connection, _ = server.accept()
                threads.append(threading.Thread(target=serve, args=(connection,)))
                threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield host
        finally:
            host.closing.set()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", host.port)).close()  # wakes the thread that accepts
            accepting.join()
            for thread in threads:
                thread.join()
