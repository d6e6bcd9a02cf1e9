"""Several processes behind one address: started, given connections, watched, replaced and ended.

The supervisor accepts connections and hands each to the process that has the fewest. It never reads from one: what a
client says, only the process that serves it sees. A process that loads gets none while others are ready, and what was
handed to one that dies before it took over goes to another.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence

from qwen_vl_classifier import errors
from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import ConfigError, QwenVLClassifierError
from qwen_vl_classifier.scoring.local import ending_of, worker_environment
from qwen_vl_classifier.serving.http.access import read_keys
from qwen_vl_classifier.serving.http.server import (
    ACCEPTED_AT_ONCE,
    BACKLOG,
    CUT_OFF,
    PAUSE_SECONDS,
    connections_that_fit,
    drop_packets,
)
from qwen_vl_classifier.serving.observability.prometheus import Metrics, forget_gauges
from qwen_vl_classifier.serving.replicas.messages import CONNECTION, DRAIN, READY, SHED, Report

REPLICA = (sys.executable, "-P", "-m", "qwen_vl_classifier.serving.replicas.replica")
"""The command of a process. `-P`: modules are never taken from the working directory."""

MOST_FALSE_STARTS = 3
"""So many times in a row a process may end before it is ready, while no other one is."""

_FIRST_PAUSE = 0.5  # seconds before another process takes the place of one that ended; then twice as long each time
_LONGEST_PAUSE = 30.0
_STEADY_SECONDS = 60.0  # after which a process that ends counts as one that was well
_BALANCE_SECONDS = 1.0  # between two looks at who has how many connections
_UNEVEN = 0.25  # more than the mean by this share, a process sheds connections,
_FEW = 2  # and by so many
_SHEDDING_SECONDS = 5.0  # until it is told so again
_END_SECONDS = 8.0  # beyond the grace, for a process to end by itself
_REPORT_BYTES = 65_536
_FEWEST_DECODERS = 2  # of a process, so that a picture which takes long leaves one free

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_log = logging.getLogger(__name__)


def shared_out(config: ServeConfig, device: str, processes: int) -> ServeConfig:
    """Return the configuration of one of several processes, whose bounds add up to those of the whole.

    Decoders of pictures are shared out too, but each process has two.

    Raises:
        ConfigError: There are more processes than examples that may wait.
    """
    if config.queue_size < processes:
        raise ConfigError(
            f"queue_size {config.queue_size} with {processes} devices: each process needs room for an example; give at "
            f"least {processes}"
        )
    return dataclasses.replace(
        config,
        device=device,
        queue_size=config.queue_size // processes,
        queue_bytes=max(1, config.queue_bytes // processes),
        decode_workers=max(min(config.decode_workers, _FEWEST_DECODERS), math.ceil(config.decode_workers / processes)),
    )


@dataclasses.dataclass(eq=False, slots=True)
class _Replica:
    """A process, as the supervisor knows it.

    Attributes:
        process: The process.
        channel: The way to it and from it.
        report: All that it has told.
        untaken: Connections that it was given and has not taken over yet, in order.
        shed_at: When it was last told to shed connections.
        was_ready: Whether it has ever answered requests.
    """

    process: asyncio.subprocess.Process
    channel: socket.socket
    report: Report = dataclasses.field(default_factory=Report)
    untaken: deque[socket.socket] = dataclasses.field(default_factory=deque)
    shed_at: float = -math.inf
    was_ready: bool = False
    partial: bytes = b""

    @property
    def load(self) -> int:
        """How many connections it has."""
        return self.report.get("open", 0) + len(self.untaken)

    @property
    def state(self) -> str:
        """How far it is; "" before its first report."""
        return self.report.get("state", "")

    def tell(self, message: bytes) -> None:
        """Send a message without waiting; a process that is gone hears nothing."""
        with contextlib.suppress(OSError):
            self.channel.send(message)

    def read(self) -> bool:
        """Take in what it has reported; tell whether it may report more."""
        try:
            while data := self.channel.recv(_REPORT_BYTES):
                *lines, self.partial = (self.partial + data).split(b"\n")
                for line in lines:
                    self._note(json.loads(line))
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def _note(self, report: Report) -> None:
        for _ in range(report.get("taken", 0) - self.report.get("taken", 0)):
            self.untaken.popleft().close()
        self.report.update(report)
        self.was_ready |= self.state == "ready"


class Supervisor:
    """One listening socket, and a process for each device.

    SIGTERM, SIGHUP and SIGINT end all in order; a second signal ends them at once. SIGHUP is left alone where it is
    ignored, as under nohup.

    Args:
        config: What to serve and how; its bounds are those of all processes together.
        listener: A socket that listens; it is closed at the end.
        devices: The device of each process.

    Attributes:
        answered_requests: How many requests of the API all processes answered; known once `run` has ended.

    Raises:
        ConfigError: The key cannot be read, the system lets this process open too few files, or the bounds cannot be
            shared out.
    """

    def __init__(self, config: ServeConfig, listener: socket.socket, devices: Sequence[str]) -> None:
        self._config = config
        self._listener = listener
        self._devices = devices
        self._configs = [shared_out(config, device, len(devices)) for device in devices]
        self._keys = read_keys(config)  # once: a process that comes later must take the same
        connections_that_fit()  # raises the limit on open files for all
        self._replicas: dict[int, _Replica] = {}
        self._loop: asyncio.AbstractEventLoop
        self._ending = asyncio.Event()
        self._signal: int | None = None
        self._failure: BaseException | None = None
        self._served = False  # whether all have been ready at the same time
        self._accepting = False
        self._metrics = ""
        self.answered_requests = 0
        self._statuses: list[int] = []
        self._announce: Callable[[], None] | None = None
        self._on_ready: Callable[[], None]

    def run(self, *, announce: Callable[[], None], on_ready: Callable[[], None]) -> int:
        """Serve until a signal or a failure.

        Args:
            announce: Is called once health checks are answered.
            on_ready: Is called once all processes answer requests.

        Returns:
            The exit status: 0 after SIGTERM or SIGHUP, 1 if requests had to be cut off.

        Raises:
            KeyboardInterrupt: After SIGINT, once all is finished.
            QwenVLClassifierError: Why a process could not be made ready at the start, or no process can any more.
            ChildProcessError: The same, where the reason is a defect.
        """
        self._announce, self._on_ready = announce, on_ready
        with self._listener, tempfile.TemporaryDirectory(prefix="serve-metrics-") as self._metrics:
            asyncio.run(self._run())
            self.answered_requests = Metrics(self._metrics).answered_requests()
        if self._failure is not None:
            raise self._failure
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        return CUT_OFF if any(self._statuses) else 0

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        for number in _ENDING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._loop.add_signal_handler(number, self._signalled, number)
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        keepers = [asyncio.create_task(self._keep(number)) for number in range(len(self._devices))]
        for keeper in keepers:
            keeper.add_done_callback(self._check_end)
        balancing = asyncio.create_task(self._balance())
        try:
            await self._ending.wait()
            if self._failure is None:
                self._drain()
                await asyncio.wait(keepers, timeout=self._config.grace + _END_SECONDS)
        finally:
            balancing.cancel()
            self._kill()
            await asyncio.wait(keepers)

    async def _keep(self, number: int) -> None:
        """Keep one process running, until all end."""
        false_starts, pause = 0, _FIRST_PAUSE
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                replica = await self._start(number)
            except OSError as error:  # the system has no more descriptors, processes or memory
                why: Exception = error
                was_ready = False
            else:
                status = await replica.process.wait()
                self._bury(number, replica)
                if self._ending.is_set():
                    self._statuses.append(status)
                    return
                why = _reason(replica, self._devices[number], status)
                was_ready = replica.was_ready
            false_starts = 0 if was_ready else false_starts + 1
            if not self._served or (false_starts >= MOST_FALSE_STARTS and not self._ready()):
                self._fail(why)
                return
            if time.monotonic() - began > _STEADY_SECONDS:
                pause = _FIRST_PAUSE
            _log.warning("%s; another one starts in %g s", why, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _start(self, number: int) -> _Replica:
        """Start a process, and tell it what to serve."""
        channel, theirs = socket.socketpair()
        channel.setblocking(False)
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.callback(channel.close)
            process = await asyncio.create_subprocess_exec(
                *REPLICA,
                stdin=asyncio.subprocess.PIPE,
                stdout=2,  # what libraries print is no line of ours
                pass_fds=[theirs.fileno()],
                env={**worker_environment(_threads(len(self._devices))), "PROMETHEUS_MULTIPROC_DIR": self._metrics},
            )
            unless_started.pop_all()
            replica = self._replicas[number] = _Replica(process, channel)
            start = {
                "config": dataclasses.asdict(self._configs[number]),
                "number": number,
                "processes": len(self._devices),
                "channel": theirs.fileno(),
                "metrics": self._metrics,
                "keys": {name: key and key.decode("latin-1") for name, key in dataclasses.asdict(self._keys).items()},
            }
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):  # it has ended, which is seen elsewhere
                process.stdin.write(json.dumps(start).encode() + b"\n")
                await process.stdin.drain()
            process.stdin.close()
        self._loop.add_reader(channel, self._listen_to, replica)
        if self._ending.is_set():
            replica.tell(DRAIN)
        self._accept_again()
        return replica

    def _bury(self, number: int, replica: _Replica) -> None:
        """Forget a process that has ended, and give to others what it had not taken over."""
        replica.read()
        self._loop.remove_reader(replica.channel)
        replica.channel.close()
        del self._replicas[number]
        forget_gauges(self._metrics, number)
        for connection in replica.untaken:
            self._give(connection)

    def _listen_to(self, replica: _Replica) -> None:
        """Take in what a process reports, and do what follows from it."""
        before = replica.state
        if not replica.read():
            self._loop.remove_reader(replica.channel)
        if replica.state == before:
            return
        if self._announce is not None:
            self._announce()
            self._announce = None
        everyone = [*self._replicas.values()]
        if replica.state == "loaded":
            if self._served:
                replica.tell(READY)
            elif len(everyone) == len(self._devices) and all(other.state == "loaded" for other in everyone):
                for other in everyone:
                    other.tell(READY)
        if not self._served and len(self._ready()) == len(self._devices):
            self._served = True
            self._on_ready()

    def _ready(self) -> list[_Replica]:
        return [replica for replica in self._replicas.values() if replica.state == "ready"]

    def _accept_again(self) -> None:
        """Accept connections, if somebody can have them."""
        if self._replicas and not (self._accepting or self._ending.is_set()):
            self._accepting = True
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Accept connections that wait, few at a time."""
        for _ in range(ACCEPTED_AT_ONCE):
            if not self._replicas:
                self._pause_accepting()  # until a process is started
                return
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:  # the system has no more descriptors or memory
                _log.warning("no connection could be accepted: %s", error.strerror)
                self._pause_accepting()
                self._loop.call_later(PAUSE_SECONDS, self._accept_again)
                return
            self._give(accepted)

    def _pause_accepting(self) -> None:
        self._accepting = False
        self._loop.remove_reader(self._listener)

    def _give(self, connection: socket.socket) -> None:
        """Give a connection to the process that has the fewest, of those that are ready if there are any."""
        for replica in sorted(self._ready() or self._replicas.values(), key=lambda replica: replica.load):
            with contextlib.suppress(OSError):  # its socket is full, since it hangs; or it has just ended
                socket.send_fds(replica.channel, [CONNECTION], [connection.fileno()])
                replica.untaken.append(connection)
                return
        connection.close()

    async def _balance(self) -> None:
        """Let a process that has many more connections than others shed some: their clients connect again."""
        while True:
            await asyncio.sleep(_BALANCE_SECONDS)
            ready, now = self._ready(), time.monotonic()
            mean = sum(replica.load for replica in ready) / max(1, len(ready))
            for replica in ready:
                surplus = replica.load - math.ceil(mean)
                if surplus > max(_FEW, _UNEVEN * mean) and now - replica.shed_at > _SHEDDING_SECONDS:
                    replica.shed_at = now
                    replica.tell(SHED * surplus)

    def _drain(self) -> None:
        """Let all processes finish what was accepted, and no more."""
        self._loop.remove_reader(self._listener)
        drop_packets(self._listener)
        with contextlib.suppress(OSError):  # there is none left
            while True:  # what the system has accepted already, so that closing the socket resets nobody
                self._give(self._listener.accept()[0])
        self._listener.close()
        for replica in self._replicas.values():
            replica.tell(DRAIN)

    def _kill(self) -> None:
        """End at once what still runs."""
        for replica in self._replicas.values():
            with contextlib.suppress(ProcessLookupError):
                replica.process.kill()

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._ending.set()

    def _check_end(self, keeper: asyncio.Task[None]) -> None:
        error = None if keeper.cancelled() else keeper.exception()
        if error is not None:
            self._fail(error)

    def _signalled(self, number: int) -> None:
        """Begin to end at the first signal; end all at once at the second."""
        if self._signal is not None:
            self._kill()
            shutil.rmtree(self._metrics, ignore_errors=True)
            os._exit(128 + number)
        self._signal = number
        self._ending.set()


def _threads(processes: int) -> int:
    """Return how many threads of the CPU each process has, of those that one alone would have."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(given) if given.isdecimal() else here) // processes)


def _reason(replica: _Replica, device: str, status: int) -> Exception:
    """Return the error that a process has told, or that it ended without one."""
    if "error" in replica.report:
        name, message = replica.report["error"]
        error: QwenVLClassifierError = getattr(errors, name, QwenVLClassifierError)(message)
        return error
    how = replica.report.get("failure") or ending_of(status)
    return ChildProcessError(f"the process on {device} failed: {how}")
