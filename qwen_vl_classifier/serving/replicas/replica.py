"""One of several processes that serve the same: it answers on the connections that the supervisor gives it.

It ignores SIGINT, SIGTERM and SIGHUP, which reach a whole group of processes: the supervisor says when to end. Where
the supervisor is gone, however it ended, what was accepted is finished too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from typing import Any

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import QwenVLClassifierError
from qwen_vl_classifier.serving.app import Shared, create_app
from qwen_vl_classifier.serving.http.access import Keys
from qwen_vl_classifier.serving.http.server import ACCEPTED_AT_ONCE, Server
from qwen_vl_classifier.serving.observability.logs import logging_to_stderr
from qwen_vl_classifier.serving.observability.prometheus import Metrics, count_together
from qwen_vl_classifier.serving.replicas.messages import CONNECTION, DRAIN, READY, SHED, Report, State
from qwen_vl_classifier.serving.routes.operations import MAX_STUCK_SECONDS

_FAILED = 1
_REPORT_SECONDS = 0.05  # between two looks at what is new
_LAST_WORD_SECONDS = 5.0  # in which the supervisor must take in why this process ends

_log = logging.getLogger(__name__)


class Link:
    """The way to the supervisor and from it.

    Args:
        channel: A socket whose other end the supervisor has.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._server: Server
        self._others_loaded = asyncio.Event()
        self._state: State = "started"
        self._taken = 0
        self._unsent = b""
        self._told: Report = {}
        self._loop: asyncio.AbstractEventLoop

    def begin(self, server: Server) -> None:
        """Let a server have the connections that come in, and report what changes. To be called in the loop."""
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._channel.setblocking(False)
        self._loop.add_reader(self._channel, self._receive)
        self._report_again()

    async def wait_for_others(self) -> None:
        """Report that the classifiers are loaded, and return when those of all others are."""
        self.tell("loaded")
        await self._others_loaded.wait()

    def tell(self, state: State) -> None:
        """Report how far this process is."""
        self._state = state
        self._report()

    def tell_end(self, **why: Any) -> None:
        """Report why this process ends, once the loop is closed."""
        self._channel.settimeout(_LAST_WORD_SECONDS)
        with contextlib.suppress(OSError):
            self._channel.sendall(self._unsent + _line({"state": "ending", **why}))

    def _receive(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                message, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1)
            except BlockingIOError:
                break
            except OSError:
                message, descriptors = b"", []
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
                self._server.take(socket.socket(fileno=descriptor))
            if message == CONNECTION:
                self._taken += 1
            elif message == READY:
                self._others_loaded.set()
            elif message == SHED:
                self._server.shed()
            elif message in (DRAIN, b""):
                self._loop.remove_reader(self._channel)
                self._server.end()
                break
        self._report()  # before anything is read from a new connection: until then another process could have it

    def _report_again(self) -> None:
        self._report()
        self._loop.call_later(_REPORT_SECONDS, self._report_again)

    def _report(self) -> None:
        """Tell what is new, if the supervisor can take it now."""
        state: State = "ending" if self._server.is_ending else self._state
        report: Report = {"state": state, "taken": self._taken, "open": self._server.open_connections}
        if report != self._told and not self._unsent:
            self._unsent, self._told = _line(report), report
        with contextlib.suppress(OSError):  # it is busy, or gone
            self._unsent = self._unsent[self._channel.send(self._unsent) :] if self._unsent else b""


def _line(report: Report | dict[str, Any]) -> bytes:
    return json.dumps(report).encode() + b"\n"


async def _end_when_stuck(app: Any) -> None:
    """End this process where only a restart may help, for the supervisor to start another."""
    while app.state.service.stuck_seconds <= MAX_STUCK_SECONDS:
        await asyncio.sleep(1)
    _log.critical("the inference loop is stuck; this process ends, and another takes its place")
    os._exit(_FAILED)


def main() -> None:
    """Serve until the supervisor says to stop, or has gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    start = json.loads(sys.stdin.buffer.readline() or b"null")
    if start is None:  # the supervisor is gone already
        return
    config = ServeConfig(**{**start["config"], "classifiers": tuple(start["config"]["classifiers"])})
    count_together(start["number"])
    with logging_to_stderr(config.log_format, fields={"process": os.getpid(), "device": config.device}):
        os._exit(_serve(config, start))  # a thread of a library may hang


def _serve(config: ServeConfig, start: dict[str, Any]) -> int:
    link = Link(socket.socket(fileno=start["channel"]))
    keys = Keys(**{name: key and key.encode("latin-1") for name, key in start["keys"].items()})

    def begin() -> None:
        link.begin(server)
        watch.add(asyncio.create_task(_end_when_stuck(app)))

    watch: set[asyncio.Task[None]] = set()
    try:
        server = Server(config, None, processes=start["processes"])
        shared = Shared(keys, Metrics(start["metrics"]), link.wait_for_others)
        app = create_app(config, shared=shared, on_ready=lambda: link.tell("ready"), on_failure=server.fail)
        return server.run(app, announce=begin)
    except QwenVLClassifierError as error:
        link.tell_end(error=(type(error).__name__, str(error)))
    except Exception as error:  # the log has its traceback
        link.tell_end(failure=f"{type(error).__name__}: {error}".splitlines()[0])
    return _FAILED


if __name__ == "__main__":
    main()
