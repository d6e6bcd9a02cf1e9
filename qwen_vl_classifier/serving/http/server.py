"""Run the server process: limit connections, shut down in order, and return an exit status.

After SIGTERM, or SIGHUP as of a terminal that is closed, the application says that it is not ready, the socket stops
listening, and what was accepted is finished. Nothing that a client has already sent is lost on the way: connections
that the system accepted are taken over, those that are idle stay open a moment for a request that is on its way, and
an answer then says that the connection closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.server import ServerState

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import ConfigError, QwenVLClassifierError
from qwen_vl_classifier.serving.http.connections import CONNECTION, Connection, Requests, raw_answer
from qwen_vl_classifier.serving.http.parsing import HttpParser

CUT_OFF = 1
"""The exit status when requests had to be cut off."""

BACKLOG = 2048
"""Connections that the system keeps until they are accepted."""

ACCEPTED_AT_ONCE = 16
"""Connections that are accepted in one turn of the loop."""

PAUSE_SECONDS = 1.0
"""Until the next try to accept connections, when the system has no room for them."""

_MOST_CONNECTIONS = 4096
_RESERVED_FILES = 256  # descriptors beside those of the connections that are let in
_FEWEST_CONNECTIONS = 16  # with which there is any sense in starting
_TRANSIT_SECONDS = 0.5  # for requests that were sent before their client could know
_CLOSE_SECONDS = 3.0  # for the application to end once no request is left
_EXIT_SECONDS = 1.0  # for the interpreter, which waits for threads that nothing can interrupt
_SWITCH_SECONDS = 0.0005  # for the model's thread, which asks for the interpreter thousands of times in a pass
_TICK = 0.05  # seconds between two looks at what is left

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_SO_ATTACH_FILTER = 26  # of Linux; Python does not name it

_log = logging.getLogger(__name__)


class Server:
    """One listening socket and the application behind it.

    SIGTERM, SIGHUP and SIGINT end it in order; a second signal ends the process at once. SIGHUP is left alone where it
    is ignored, as under nohup.

    Args:
        config: Limits and time limits.
        listener: A socket that listens; it is closed at the end. `None` where another process listens: connections are
            then given to `take`, `end` takes the place of signals, and `run` may return while threads still hang.
        processes: How many processes share the connections that may be open.
        exits: Whether the process may be ended by force a second after `run` has returned, since threads of libraries
            may hang. Without it the caller still has work to do.

    Raises:
        ConfigError: The certificate is not usable, or the system lets this process open too few files.

    Example:
        >>> server = Server(config, listener)  # doctest: +SKIP
        >>> status = server.run(create_app(config, on_failure=server.fail))  # doctest: +SKIP
    """

    def __init__(
        self, config: ServeConfig, listener: socket.socket | None, *, processes: int = 1, exits: bool = True
    ) -> None:
        self._config = config
        self._listener = listener
        self._exits = exits
        self._tls = tls_context(config)
        self._loop: asyncio.AbstractEventLoop
        self._app: FastAPI
        self._http: uvicorn.Config
        self._http_state = ServerState()
        self._connections: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._most_connections = connections_that_fit() // processes
        self._surplus = 0  # connections that are to end with their next answer
        self._ending = asyncio.Event()
        self._failure: BaseException | None = None
        self._interrupted = False
        self._cut_off = False
        self._watchdog: threading.Timer | None = None

    def fail(self, error: BaseException) -> None:
        """End because of an error: what was accepted is answered, then `run` raises it. To be called in the loop."""
        self._failure = self._failure or error
        self._begin_end()

    @property
    def open_connections(self) -> int:
        """How many connections are open."""
        return len(self._connections) + len(self._connecting)

    @property
    def is_ending(self) -> bool:
        """Whether the end has begun."""
        return self._ending.is_set()

    def take(self, accepted: socket.socket) -> None:
        """Serve a connection, or close it if too many are open. To be called in the loop."""
        accepted.setblocking(False)
        with contextlib.suppress(OSError):  # it is gone
            # The event loop does this for sockets that it opens itself. Without it, the second part of an answer waits
            # until the client has acknowledged the first, which clients delay by 40 ms.
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.open_connections >= self._most_connections:
            self._refused("too_many_connections")
            with accepted, contextlib.suppress(OSError):
                if self._tls is None:
                    accepted.send(
                        raw_answer(503, "too_many_connections", "too many connections are open; try again later")
                    )
        else:
            task = self._loop.create_task(self._connect(accepted))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def shed(self) -> None:
        """End one connection with its next answer, so that its client connects again and may find another process."""
        self._surplus = min(self._surplus + 1, self.open_connections)

    def end(self) -> None:
        """Shut down in order, as on SIGTERM. To be called in the loop."""
        self._exit_in(self._config.grace + 2 * _CLOSE_SECONDS + _EXIT_SECONDS, CUT_OFF)
        self._begin_end()

    def run(self, app: FastAPI, *, announce: Callable[[], None] = lambda: None) -> int:
        """Serve until a signal or a failure.

        Args:
            app: The application. Of its state, `service.drain()` is called when the end begins, and
                `metrics.rejected(code)` when a connection is refused.
            announce: Is called as soon as signals are handled.

        Returns:
            The exit status: 0 after SIGTERM or SIGHUP, 1 if requests had to be cut off.

        Raises:
            KeyboardInterrupt: After SIGINT, once all is finished.
            BaseException: What `fail` was told.
        """
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            with self._listener or contextlib.nullcontext():
                asyncio.run(self._serve(app, announce))
        finally:
            sys.setswitchinterval(before)
        if self._failure is not None:
            if not isinstance(self._failure, QwenVLClassifierError):
                _log.critical("the server failed", exc_info=self._failure)
            raise self._failure
        if self._interrupted:
            raise KeyboardInterrupt
        return CUT_OFF if self._cut_off else 0

    async def _serve(self, app: FastAPI, announce: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._app = app
        self._http = uvicorn.Config(
            Requests(app, self._is_last_answer),
            http=HttpParser,
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,  # who calls is never decided by a header
            timeout_keep_alive=sys.maxsize,  # connections have a timer of their own
        )
        self._http.load()
        with self._signals():
            announce()
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(app.router.lifespan_context(app))
                if self._listener is not None:
                    self._listener.setblocking(False)
                    self._listener.listen(BACKLOG)
                    self._listen(self._listener)
                await self._ending.wait()
                await self._finish()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_CLOSE_SECONDS):
                        await stack.aclose()

    def _begin_end(self) -> None:
        if not self._ending.is_set():
            self._ending.set()
            self._app.state.service.drain()

    async def _finish(self) -> None:
        """Finish what was accepted, and no more."""
        end = self._loop.time() + self._config.grace
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            drop_packets(self._listener)
            while self._accept_one(self._listener):  # what the system has accepted, so that closing resets nobody
                pass
            self._listener.close()
        await _until(lambda: not self.open_connections, min(self._loop.time() + _TRANSIT_SECONDS, end))
        await _until(self._all_answered, end)
        tasks = list(self._http_state.tasks)
        if tasks:
            self._cut_off = True
            _log.error("requests were cut off after %g seconds of grace: %d", self._config.grace, len(tasks))
        for task in tasks:
            task.cancel()
        for connection in list(self._connections):
            connection.abort()
        await _until(lambda: not (self._connections or self._http_state.tasks), self._loop.time() + _CLOSE_SECONDS)

    def _all_answered(self) -> bool:
        """Close idle connections; tell whether none is left."""
        for connection in list(self._connections):
            connection.close_if_idle()
        return not (self.open_connections or self._http_state.tasks)

    def _is_last_answer(self) -> bool:
        """Tell whether an answer is the last on its connection; to be asked once for each answer."""
        surplus = self._surplus > 0
        self._surplus -= surplus
        return surplus or self._ending.is_set()

    def _listen(self, listener: socket.socket) -> None:
        if not self._ending.is_set():
            self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Accept connections that wait, few at a time, so that those which are open get their turn."""
        for _ in range(ACCEPTED_AT_ONCE):
            if not self._accept_one(listener):
                return

    def _accept_one(self, listener: socket.socket) -> bool:
        """Accept a connection, or close it if too many are open; tell whether there was one."""
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return False
        except OSError as error:  # the system has no more descriptors or memory
            _log.warning("no connection could be accepted: %s", error.strerror)
            self._loop.remove_reader(listener)
            self._loop.call_later(PAUSE_SECONDS, self._listen, listener)
            return False
        self.take(accepted)
        return True

    async def _connect(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it has gone, or speaks no TLS
            await self._loop.connect_accepted_socket(
                lambda: Connection(self._config, self._make_http, self._refused, self._connections),
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=self._config.header_timeout if self._tls else None,
            )

    def _make_http(self, connection: Connection) -> HttpParser:
        state = {CONNECTION: connection}
        return HttpParser(connection.refuse_syntax, config=self._http, server_state=self._http_state, app_state=state)

    def _refused(self, code: str) -> None:
        self._app.state.metrics.rejected(code)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle signals while the server runs; afterwards they mean what they did."""
        if self._listener is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._signalled)
            for number in _ENDING
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._watchdog is not None and not self._exits:
                self._watchdog.cancel()
            elif self._watchdog is not None:
                # The end is reached but for threads inside of a library; nobody shall wait for those.
                self._exit_in(_EXIT_SECONDS, 130 if self._interrupted else CUT_OFF if self._cut_off else 0)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        """Begin to end at the first signal; exit at the second."""
        if self._watchdog is not None:
            os._exit(128 + number)
        self._interrupted = number == signal.SIGINT
        self._exit_in(self._config.grace + 2 * _CLOSE_SECONDS + _EXIT_SECONDS, CUT_OFF)
        self._loop.call_soon_threadsafe(self._begin_end)  # also wakes the loop

    def _exit_in(self, seconds: float, status: int) -> None:
        """Exit with a status if this process is still running after a number of seconds."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = threading.Timer(seconds, os._exit, (status,))
        self._watchdog.daemon = True
        self._watchdog.start()


async def _until(done: Callable[[], bool], end: float) -> None:
    """Wait until something is so, or until a time on the loop's clock."""
    while not done() and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(_TICK)


def drop_packets(listener: socket.socket) -> None:
    """Let a socket that listens take no further connections, so that none comes between the last one and its end.

    A client that calls in this moment sends its first packet again a second later, and is refused. Where the system
    cannot do this, such a client's connection is reset.
    """
    if sys.platform == "linux":
        program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # of the packet filter: return 0
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))


def tls_context(config: ServeConfig) -> ssl.SSLContext | None:
    """Return how to speak TLS, or `None` where no certificate is given.

    Raises:
        ConfigError: Certificate or key cannot be read, or do not belong together.
    """
    if not config.tls_certificate:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # A password is never asked for: nobody may be there to type it.
        context.load_cert_chain(config.tls_certificate, config.tls_key or None, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"tls_certificate {config.tls_certificate}, tls_key {config.tls_key}: not usable ({reason}); give a "
            "certificate in PEM and its own key without a password"
        ) from None
    return context


def connections_that_fit() -> int:
    """Return how many connections may be open, after raising the limit on open files as far as is allowed.

    Raises:
        ConfigError: Too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _MOST_CONNECTIONS + _RESERVED_FILES
    infinite = resource.RLIM_INFINITY
    if soft != infinite and soft < needed:
        raised = needed if hard == infinite else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    fewest = _FEWEST_CONNECTIONS + _RESERVED_FILES
    if soft != infinite and soft < fewest:
        raise ConfigError(
            f"this process may open {soft} files; expected at least {fewest}, for connections and decoders; raise the "
            "limit with ulimit -n, or LimitNOFILE of systemd"
        )
    return _MOST_CONNECTIONS if soft == infinite else min(_MOST_CONNECTIONS, soft - _RESERVED_FILES)
