"""Run an application as a process should be run: an orderly end, within bounds, with an honest exit status.

After SIGTERM the application says that it is not ready, the socket stops listening, and what was accepted is
finished. Nothing that a client has already sent is lost on the way: connections that the system took but the server
did not see yet are taken in, those that are idle stay open a moment for a request that is on its way, and an answer
then says that the connection closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import QwenVLClassifierError
from qwen_vl_classifier.serving.connections import MOST_REFUSED, Connection, Limits

CUT_OFF = 1
"""The exit status when requests had to be cut off."""

_MOST_CONNECTIONS = 4096
_ACCEPTED_AT_ONCE = 16  # in one turn of the loop
_TURNS_TO_CLOSE = 3  # in which the loop accepts, sets up and drops a connection that is too many
_FILES_OF_ALL_ELSE = 144  # weights, pipes of decoders, fetched pictures
_RESERVED_FILES = _TURNS_TO_CLOSE * _ACCEPTED_AT_ONCE + MOST_REFUSED + _FILES_OF_ALL_ELSE
"""Descriptors beside those of the connections that are let in."""
_SECONDS_IN_TRANSIT = 0.5  # for requests that were sent before their client could know
_SECONDS_TO_CLOSE = 3.0  # for the application to end once no request is left
_SECONDS_TO_EXIT = 1.0  # for the interpreter, which waits for threads that nothing can interrupt
_SECONDS_A_TURN = 0.0005  # for the model's thread, which asks for the interpreter thousands of times in a pass
_TICK = 0.05  # seconds between two looks at what is left

_log = logging.getLogger(__name__)


class Server:
    """One listening socket and the application behind it.

    SIGTERM and SIGINT end it in order; a second signal ends the process at once.

    Args:
        config: Limits and time limits.
        listener: A socket that listens; it is closed at the end.

    Example:
        >>> server = Server(config, listener)  # doctest: +SKIP
        >>> status = server.run(create_app(config, on_failure=server.fail))  # doctest: +SKIP
    """

    def __init__(self, config: ServeConfig, listener: socket.socket) -> None:
        self._config = config
        self._listener = listener
        self._failure: BaseException | None = None
        self._running: _Running | None = None

    def fail(self, error: BaseException) -> None:
        """End because of an error: what was accepted is answered, then `run` raises it. To be called in the loop."""
        self._failure = self._failure or error
        if self._running is not None:
            self._running.begin_end()

    def run(self, app: FastAPI, *, announce: Callable[[], None] = lambda: None) -> int:
        """Serve until a signal or a failure.

        Args:
            app: The application.
            announce: Is called as soon as signals are minded.

        Returns:
            The exit status: 0 after SIGTERM, 1 if requests had to be cut off.

        Raises:
            KeyboardInterrupt: After SIGINT, once all is finished.
            BaseException: What `fail` was told.
        """
        self._running = running = _Running(app, self._config, announce)
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SECONDS_A_TURN)
        try:
            with self._listener:
                running.run(sockets=[self._listener])
        finally:
            sys.setswitchinterval(before)
        if self._failure is not None:
            if not isinstance(self._failure, QwenVLClassifierError):
                _log.critical("the server failed", exc_info=self._failure)
            raise self._failure
        if running.interrupted:
            raise KeyboardInterrupt
        return CUT_OFF if running.cut_off else 0


class _Running(uvicorn.Server):
    """uvicorn's server with another way to end.

    Args:
        app: The application.
        config: Limits and time limits.
        announce: Is called as soon as signals are minded.
    """

    def __init__(self, app: FastAPI, config: ServeConfig, announce: Callable[[], None]) -> None:
        limits = Limits(
            header_seconds=config.header_timeout,
            body_seconds=config.body_timeout,
            connections=_connections_that_fit(),
            refused=app.state.metrics.rejected,
        )
        self.ending = False
        self.cut_off = False
        self.interrupted = False
        self._app = app
        self._grace = config.grace
        self._announce = announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._make_protocol: Callable[[], asyncio.Protocol]
        self._watchdog: threading.Timer | None = None
        protocol = functools.partial(Connection, limits=limits)
        super().__init__(
            uvicorn.Config(
                _Parting(app, lambda: self.ending),
                # Not uvloop where it is installed: how a socket stops listening is known of this loop alone.
                loop="asyncio",
                http=cast("type[asyncio.Protocol]", protocol),
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,  # who calls is never decided by a header
                server_header=False,
                timeout_keep_alive=cast("int", config.header_timeout),  # handed to the loop, which takes any number
            )
        )

    def begin_end(self) -> None:
        """Say that nothing more is welcome, and begin to end. To be called in the loop."""
        if not self.ending:
            self.ending = True
            self.should_exit = True
            self._app.state.service.drain()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Mind signals while the server runs; afterwards they mean what they did."""
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            self._announce()
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._announce()
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._watchdog is not None:
                # The end is reached but for threads inside of a library; nobody shall wait for those.
                status = 130 if self.interrupted else CUT_OFF if self.cut_off else 0
                self._exit_in(_SECONDS_TO_EXIT, status)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end at the first signal; exit at the second."""
        if self._watchdog is not None:
            os._exit(128 + sig)
        self.interrupted = sig == signal.SIGINT
        self._exit_in(self._grace + 2 * _SECONDS_TO_CLOSE + _SECONDS_TO_EXIT, CUT_OFF)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.begin_end)  # also wakes the loop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then take connections."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise RuntimeError("the application could not start; its log says why")
        self._make_protocol = functools.partial(
            cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        loop = asyncio.get_running_loop()
        self.servers = []
        for listener in sockets or ():
            self.servers.append(await loop.create_server(self._make_protocol, sock=listener, backlog=_ACCEPTED_AT_ONCE))
            listener.listen(self.config.backlog)  # what the system keeps may be more than the loop takes in one turn
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what was accepted, and no more."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace
        connections, tasks = self.server_state.connections, self.server_state.tasks
        for listener in sockets or ():
            await self._stop_listening(listener)
        for server in self.servers:
            server.close()
        await _until(lambda: not connections, min(loop.time() + _SECONDS_IN_TRANSIT, end))
        await _until(self._all_answered, end)
        if tasks:
            self.cut_off = True
            _log.error("requests were cut off after %g seconds of grace: %d", self._grace, len(tasks))
            for task in list(tasks):
                task.cancel()
        for connection in list(connections):
            connection.transport.abort()
        await _until(lambda: not tasks, loop.time() + _SECONDS_TO_CLOSE)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.lifespan.shutdown(), _SECONDS_TO_CLOSE)

    def _all_answered(self) -> bool:
        """Close the connections on which nothing is asked; tell whether none is left."""
        for connection in list(self.server_state.connections):
            connection.shutdown()
        return not (self.server_state.connections or self.server_state.tasks)

    async def _stop_listening(self, listener: socket.socket) -> None:
        """Take in what the system has accepted in our name, so that closing the socket resets nobody.

        The loop cannot be left to do it: what it has accepted but not set up yet would be dropped with the server.
        """
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener.fileno())
        for _ in range(3):  # turns of the loop in which it sets up what it has accepted
            await asyncio.sleep(0)
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:  # no more, or none that can be had
                return
            accepted.setblocking(False)
            await loop.connect_accepted_socket(self._make_protocol, accepted)

    def _exit_in(self, seconds: float, status: int) -> None:
        """Exit with a status if this process is still there after so many seconds."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._watchdog = threading.Timer(seconds, os._exit, (status,))
        self._watchdog.daemon = True
        self._watchdog.start()


class _Parting:
    """Say in the last answer on a connection that it is the last, so that its client sends nothing after it.

    Args:
        app: What is behind.
        ending: Whether answers are the last ones by now.
    """

    def __init__(self, app: ASGIApp, ending: Callable[[], bool]) -> None:
        self.app = app
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def parting_send(message: Message) -> None:
            if message["type"] == "http.response.start" and self._ending():
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self.app(scope, receive, parting_send)


async def _until(done: Callable[[], bool], end: float) -> None:
    """Wait until something is so, or until a time on the loop's clock."""
    while not done() and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(_TICK)


def _connections_that_fit() -> int:
    """Return how many connections may be open, after raising the limit on open files as far as is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + _RESERVED_FILES
    infinite = resource.RLIM_INFINITY
    if soft != infinite and soft < wanted:
        raised = wanted if hard == infinite else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return _MOST_CONNECTIONS if soft == infinite else max(1, min(_MOST_CONNECTIONS, soft - _RESERVED_FILES))
