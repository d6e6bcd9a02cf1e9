"""The engine on a Ray cluster: each worker is an actor, on this machine or on others.

Each actor holds the worker that a process of the local engine holds too, and writes its own shards. The driver sends
descriptions of shards and gets counts back: no row and no picture passes through it or through Ray's object store.

Of Ray, only the core is used. Ray Data is not: its own checkpoint was seen to lose everything when it was killed twice,
its order is lost where checkpoints are on, and with bad rows allowed it ended well without any output.

Actors are never restarted by Ray and never detached: the driver replaces one that died. They end with the driver,
however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import queue
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import psutil

from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.errors import ConfigError, ScoringError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.scoring.driver import Death, Driver
from qwen_vl_classifier.scoring.jobs import Answer, Job, Shard, ShardReport, Task, work

J = TypeVar("J", bound=Job)

PATIENCE = 60.0
"""Seconds without any actor placed, after which the log says so."""

_TICK = 0.5  # seconds to wait for answers
_SECONDS_TO_END = 5.0  # for processes on this machine that were killed
_SECONDS_BETWEEN_CALLS = 2.0  # to the cluster's own processes
_MOST_FAILED_CALLS = 5  # in a row; then they are gone
_OBJECT_STORE_BYTES = 80_000_000  # the least that Ray takes; nothing is put there
_SECONDS_TO_CONNECT = 10.0

_ANY_CLUSTER = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SCHEDULER_EVENTS": "0"}
_OWN_CLUSTER = {
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill actors for the memory that other programs take
    "RAY_worker_niceness": "0",  # by default 15: beside programs that compute, actors then hardly start
    "RAY_worker_register_timeout_seconds": "600",  # by default 60: on a busy machine, none is ready in that time
}
_LOOPBACK = {
    # Ray takes 127.0.0.1 for "the address that others see". This is its switch for desktops, whose clusters are local.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray keeps one in the user's home
}
"""Ray looks at these when it is imported, and keeps to them as long as the process lives."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors there are, and where.

    Attributes:
        workers: How many.
        address: Of the cluster; "" starts one on this machine, which ends with the run.
        cpus: That each actor needs.
        gpus: That each actor needs; may be a fraction.
    """

    workers: int
    address: str = ""
    cpus: int = 1
    gpus: float = 0.0


def run(
    job: Job,
    todo: Iterable[Shard],
    config: ScoreConfig,
    on_report: Callable[[ShardReport], None],
    should_stop: Callable[[], bool],
    on_rows: Callable[[int], object] | None = None,
) -> None:
    """Do shards on a Ray cluster; see `Driver`.

    Args:
        job: What is done.
        todo: The shards.
        config: Address, number of workers, threads and GPUs of each.
        on_report: Called after each shard.
        should_stop: Tells whether to begin no more.
        on_rows: Called now and then with the number of rows that are done in the shards in work.

    Raises:
        ConfigError: The cluster cannot be reached.
        MissingExtraError: Ray is not installed.
        ScoringError: The head of the cluster, or its process on this machine, is gone.
    """
    pool = pool_of(config)
    with connected(pool) as ray:
        jobs = [_job_of_actors(job, pool)] * pool.workers
        with contextlib.closing(RayEngine(ray, pool)) as engine:
            Driver(engine, jobs, todo, on_report, should_stop, config.stall_timeout, on_rows).run()


def pool_of(config: ScoreConfig) -> Pool:
    """Return the pool that the options ask for: each worker computes in as many threads as it has CPUs."""
    import torch  # takes seconds: an actor imports this file too

    workers = config.workers or 1
    # What other machines have is not known here: there, one thread unless the user says otherwise.
    threads = config.threads or (1 if config.ray_address else max(1, torch.get_num_threads() // workers))
    return Pool(workers, config.ray_address, threads, config.gpus_per_worker)


def _job_of_actors(job: J, pool: Pool) -> J:
    sharing = math.ceil(1 / pool.gpus) if pool.gpus else pool.workers
    # An actor that requests no GPU still sees those of its machine.
    device = "cpu" if job.device == "auto" and not pool.gpus else job.device
    return dataclasses.replace(job, device=device, threads=pool.cpus, sharing=sharing)


class Actor:
    """What runs in the process of an actor.

    Args:
        job: Its job.
    """

    def __init__(self, job: Job) -> None:
        self._inbox: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        arguments = (job.worker(), self._inbox, self._answers.put)
        threading.Thread(target=work, args=arguments, name="work", daemon=True).start()

    def place(self) -> tuple[str, int]:
        """Return the id of the node that this actor is on, and that of its process there."""
        return str(require("ray", extra="scale").get_runtime_context().get_node_id()), os.getpid()

    def give(self, task: Task) -> None:
        """Take a task."""
        self._inbox.put(task)

    def answer(self) -> Answer:
        """Wait for the next answer, and return it."""
        return self._answers.get()


@dataclass(eq=False, slots=True)
class _Handle:
    """An actor, seen from the driver.

    Attributes:
        actor: Ray's handle.
        node: The id of its node; "" before it is placed.
        pid: The id of its process there; 0 before it is placed.
    """

    actor: Any
    node: str = ""
    pid: int = 0


class RayEngine:
    """Runs workers as actors.

    Args:
        ray: The module, connected.
        pool: What each actor needs.
    """

    def __init__(self, ray: Any, pool: Pool) -> None:
        self._ray = ray
        self._pool = pool
        self._calls: dict[Any, _Handle] = {}  # one for each actor, which waits for what it tells next
        self._patience = time.monotonic() + PATIENCE
        self._lost = ""  # what is gone
        self._closed = threading.Event()
        self._here = ray.get_runtime_context().get_node_id()
        threading.Thread(target=self._call_cluster, args=(_places(ray),), name="call-cluster", daemon=True).start()

    def start(self, job: Job) -> _Handle:
        """Start an actor, once the cluster has room for it."""
        # Tasks have a thread of their own, a single one: they come in while an answer is waited for, and in order.
        actor = self._ray.remote(concurrency_groups={"tasks": 1})(Actor).options(
            num_cpus=self._pool.cpus, num_gpus=self._pool.gpus, max_restarts=0, max_task_retries=0
        )
        worker = _Handle(actor.remote(job))
        self._calls[worker.actor.place.remote()] = worker
        return worker

    def give(self, worker: _Handle, task: Task) -> None:
        """Send a task."""
        worker.actor.give.options(concurrency_group="tasks").remote(task)

    def answers(self) -> Iterator[tuple[_Handle, Answer | Death]]:
        """Yield what actors have told, after half a second at most.

        Raises:
            ScoringError: The cluster is gone.
        """
        if self._lost:
            raise ScoringError(
                f"the Ray cluster is gone: its {self._lost} no longer answers; restart it, then run again: "
                f"finished shards are kept"
            )
        ready, _ = self._ray.wait([*self._calls], timeout=_TICK)
        for call in ready:
            worker = self._calls.pop(call, None)
            if worker is None:  # stopped meanwhile
                continue
            try:
                answer = self._ray.get(call)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                lost = bool(worker.node) and not self._lives(worker.node)
                yield worker, Death(_summary(error), machine_lost=lost)
                continue
            self._calls[worker.actor.answer.remote()] = worker
            if worker.node:
                yield worker, answer
            else:
                worker.node, worker.pid = answer
        if time.monotonic() > self._patience and not any(worker.node for worker in self._calls.values()):
            self._patience = math.inf
            _log.warning("%s", self._why_not_placed())

    def is_placed(self, worker: _Handle) -> bool:
        """Tell whether an actor has a process on some node."""
        return bool(worker.node)

    def stop(self, workers: Collection[_Handle]) -> None:
        """Kill actors, and wait until those of this machine have ended."""
        self._calls = {call: worker for call, worker in self._calls.items() if worker not in workers}
        if not self._lost:  # else Ray would wait for it
            for worker in workers:
                self._ray.kill(worker.actor)
        # Ray tells an actor to end, which one that hangs does not hear.
        _kill(_processes(worker.pid for worker in workers if worker.node == self._here))

    def close(self) -> None:
        """Stop watching the cluster."""
        self._closed.set()

    def _call_cluster(self, called: Mapping[str, tuple[str, int]]) -> None:
        """Find out whether the cluster is gone: Ray itself waits for a minute, then ends the process silently."""
        failed = dict.fromkeys(called, 0)
        while not self._lost and not self._closed.wait(_SECONDS_BETWEEN_CALLS):
            for name, place in called.items():
                failed[name] = 0 if _answers(place) else failed[name] + 1
                if failed[name] >= _MOST_FAILED_CALLS:
                    self._lost = f"{name} at {place[0]}:{place[1]}"

    def _lives(self, node: str) -> bool:
        return any(other["NodeID"] == node and other["Alive"] for other in self._ray.nodes())

    def _why_not_placed(self) -> str:
        there = self._ray.cluster_resources()
        return (
            f"no worker has been placed in {PATIENCE:.0f} s: each asks for {self._pool.cpus} CPUs and "
            f"{self._pool.gpus:g} GPUs, the cluster has {there.get('CPU', 0):g} and {there.get('GPU', 0):g}; waiting"
        )


def _processes(pids: Iterable[int]) -> list[psutil.Process]:
    """Return those processes of this machine that have not ended."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def _places(ray: Any) -> dict[str, tuple[str, int]]:
    """Return where the processes listen that this one cannot do without: the cluster's head, and that of this node."""
    here = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == here.get_node_id())
    host, _, port = here.gcs_address.rpartition(":")
    return {"head": (host.strip("[]"), int(port)), "node": (node["NodeManagerAddress"], node["NodeManagerPort"])}


def _answers(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=_SECONDS_TO_CONNECT).close()
    except OSError:
        return False
    return True


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, _SECONDS_TO_END)


@contextmanager
def connected(pool: Pool, *, logs: bool = False, variables: Mapping[str, str] = MappingProxyType({})) -> Iterator[Any]:
    """Connect to a cluster, or start one that ends with the connection; yield the module `ray`.

    Where this process is connected already, that connection is used and left. A cluster that is started here listens on
    loopback only, requires a token, has no dashboard, reports no usage, and keeps its files in a temporary folder.

    Args:
        pool: Where the cluster is, and how many CPUs one that is started here has: those of all workers.
        logs: Whether what actors write to stderr appears on that of this process.
        variables: Of the environment of a cluster that is started here.

    Raises:
        ConfigError: The cluster cannot be reached.
        MissingExtraError: Ray is not installed.
    """
    if pool.address not in ("", "auto"):
        _check_address(pool.address)
    with ExitStack() as stack:
        stack.enter_context(_environment(_ANY_CLUSTER if pool.address else _ANY_CLUSTER | _OWN_CLUSTER))
        if not pool.address:
            stack.enter_context(_environment(variables))
            if _loopback_holds():
                stack.enter_context(_environment(_LOOPBACK))
        ray = require("ray", extra="scale")
        # Ray prints the deaths of actors; what this program prints on stdout is its result.
        stack.enter_context(redirect_stdout(sys.stderr))
        if not ray.is_initialized():
            before = psutil.Process().children(recursive=True)
            options: dict[str, Any] = {"address": pool.address}
            if not pool.address:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
                options = {
                    "address": "local",
                    "num_cpus": pool.workers * pool.cpus,
                    "include_dashboard": False,
                    "object_store_memory": _OBJECT_STORE_BYTES,
                    "_temp_dir": folder,
                }
            try:
                with _signals_kept():
                    ray.init(**options, log_to_driver=logs, configure_logging=False)
            except ConnectionError as error:
                raise _unreachable(pool.address, _summary(error)) from error
            stack.callback(_disconnect, ray, before)
        yield ray


def _disconnect(ray: Any, before: Collection[psutil.Process]) -> None:
    """End the connection, and a cluster that was started for it, also where parts of it hang."""
    started = [process for process in psutil.Process().children(recursive=True) if process not in before]
    ray.shutdown()
    _kill(started)


def _check_address(address: str) -> None:
    """Make sure that something listens: Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_CONNECT).close()
    except ValueError:
        raise _unreachable(address, "it is not HOST:PORT") from None
    except OSError as error:
        raise _unreachable(address, error.strerror or type(error).__name__) from error


def _unreachable(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"ray_address {address!r}: no cluster can be reached there ({why}); give the HOST:PORT that `ray start --head` "
        "printed, auto on a machine of the cluster, or nothing to use this machine alone"
    )


@functools.cache
def _loopback_holds() -> bool:
    """Tell whether Ray was not yet imported when this process first came here."""
    return "ray" not in sys.modules


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment that are not set by the user, and remove them again."""
    ours = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back the handler of SIGTERM, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _summary(error: Exception) -> str:
    """Return the line of a message of Ray that matters: where a traceback is added, the last one."""
    lines = str(error).strip().splitlines()
    return lines[-1 if any(line.startswith("Traceback") for line in lines) else 0].rstrip(".")
