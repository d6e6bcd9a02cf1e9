"""Engine "ray": the same shards over a pool of actors, on this machine or on a cluster.

Each actor holds a worker, the object that scores shards for the local engine too, and writes its own shards. The
driver sends descriptions of shards and gets counts back: no row and no picture passes through it or through Ray's
object store.

Of Ray, only the core is used. Ray Data is not: its own checkpoint was seen to lose everything when it was killed twice,
its order is lost where checkpoints are on, and with bad rows allowed it ended well without any output.

Actors are never restarted by Ray and never detached: the driver replaces one that died, and gives its shard to another
(see `schedule`). They end with the driver, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.errors import ScoringError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.scoring.parts import Shard
from qwen_vl_classifier.scoring.ray_cluster import Pool, connected, summary
from qwen_vl_classifier.scoring.schedule import MOST_DEATHS, Schedule, Task

if TYPE_CHECKING:  # an actor imports this file before its worker says what it needs
    from qwen_vl_classifier.scoring.extractor import ExtractJob
    from qwen_vl_classifier.scoring.formats import RowError
    from qwen_vl_classifier.scoring.scorer import Job, ShardReport

PATIENCE = 60.0
"""Seconds without any actor placed, after which the log says so."""

_TICK = 0.5  # seconds between looks at whether to stop
_SECONDS_TO_END = 30.0  # for actors on this machine that were told to

_log = logging.getLogger(__name__)


class Worker(Protocol):
    """What an actor holds. It is sent to the actor, so it loads nothing before `load`."""

    def load(self) -> None:
        """Load what takes long."""

    def run_all(
        self, tasks: Iterable[tuple[Shard, Mapping[int, RowError]]], *, endless: bool = False
    ) -> Iterator[ShardReport]:
        """Do shards; read the next one while the one before is being done, and report each once it is on disk."""

    def probe(self, shard: Shard, rows: range, blamed: Mapping[int, RowError] | None = None) -> object:
        """Do some rows of a shard without keeping the results."""

    def remove_partial_files(self, shards: Iterable[Shard]) -> None:
        """Remove what a worker that died left of shards. Called in the driver, on a worker that is not loaded."""


def run(
    job: Job | ExtractJob,
    todo: Iterable[Shard],
    config: ScoreConfig,
    on_report: Callable[[ShardReport], None],
    should_stop: Callable[[], bool],
) -> None:
    """Score shards on a Ray cluster.

    Args:
        job: What to score with, and where to write.
        todo: The shards, read as workers become free.
        config: Address, number of workers, threads and GPUs of each.
        on_report: Called after each shard, once it is on disk.
        should_stop: Asked several times a second; once it says so, shards that are being scored are finished and no
            more are begun.

    Raises:
        ConfigError: The cluster cannot be reached.
        MissingExtraError: Ray is not installed.
        QwenVLClassifierError: What a worker could not do.
        ScoringError: Workers die, and no row is the cause.
    """
    pool = pool_of(config)
    if job.device == "auto" and not pool.gpus:
        job = dataclasses.replace(job, device="cpu")  # an actor that asked for no GPU still sees those of its machine
    sharing = math.ceil(1 / pool.gpus) if pool.gpus else pool.workers
    job = dataclasses.replace(job, threads=pool.cpus, sharing=sharing)
    run_shards(job.worker(), todo, pool, on_report, should_stop)


def pool_of(config: ScoreConfig) -> Pool:
    """Return the pool that the options ask for: each worker computes in as many threads as it asks for CPUs."""
    import torch

    workers = config.workers or 1
    # What other machines have is not known here: there, one thread unless the user says otherwise.
    threads = config.threads or (1 if config.ray_address else max(1, torch.get_num_threads() // workers))
    return Pool(workers, config.ray_address, threads, config.gpus_per_worker)


def run_shards(
    worker: Worker,
    todo: Iterable[Shard],
    pool: Pool,
    on_report: Callable[[ShardReport], None],
    should_stop: Callable[[], bool],
) -> None:
    """Do shards in a pool of actors, each of which holds a copy of `worker`; see `run`."""
    todo = iter(todo)
    first = list(islice(todo, pool.workers))  # no more actors than shards
    with connected(pool) as ray:
        driver = _Driver(ray, worker, pool, Schedule(chain(first, todo)), on_report, should_stop)
        try:
            driver.run(len(first))
        finally:
            driver.close()


class Actor:
    """What runs in the process of an actor. Two calls of `do` may wait at a time; they are served in turn.

    Args:
        worker: What does the shards, not loaded.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._inbox: queue.SimpleQueue[tuple[Task, Future[ShardReport | None]]] = queue.SimpleQueue()
        self._received = 0
        self._turn = threading.Condition()

    def place(self) -> tuple[str, int]:
        """Return the id of the node that this actor is on, and that of its process there."""
        return str(require("ray", extra="scale").get_runtime_context().get_node_id()), os.getpid()

    def load(self) -> None:
        """Load the worker, and begin to serve."""
        self._worker.load()
        threading.Thread(target=self._serve, name="serve", daemon=True).start()

    def do(self, number: int, task: Task) -> ShardReport | None:
        """Do a task, after those that came before.

        Args:
            number: How many tasks came before. Ray runs calls in threads, of which a later one may be the first.
            task: What to do.
        """
        answer: Future[ShardReport | None] = Future()
        with self._turn:
            self._turn.wait_for(lambda: self._received == number)
            self._inbox.put((task, answer))
            self._received += 1
            self._turn.notify_all()
        return answer.result()

    def _serve(self) -> None:
        while True:
            task, answer = self._inbox.get()
            while task.probe is None:
                task, answer = self._run(task, answer)
            try:
                self._worker.probe(task.shard, task.probe, task.blamed)
                answer.set_result(None)
            except Exception as error:
                answer.set_exception(error)

    def _run(self, task: Task, answer: Future[ShardReport | None]) -> tuple[Task, Future[ShardReport | None]]:
        """Do shards until a probe is asked for, and return that."""
        waiting = deque([answer])
        other = []

        def tasks() -> Iterator[tuple[Shard, Mapping[int, RowError]]]:
            yield task.shard, task.blamed
            while True:
                following, its_answer = self._inbox.get()
                if following.probe is not None:
                    other.append((following, its_answer))
                    return
                waiting.append(its_answer)
                yield following.shard, following.blamed

        try:
            for report in self._worker.run_all(tasks(), endless=True):
                waiting.popleft().set_result(report)
        except Exception as error:  # the driver raises it, and ends this actor
            for future in waiting:
                future.set_exception(error)
            return self._inbox.get()
        return other.pop()


@dataclass(eq=False, slots=True)
class _Member:
    """An actor, seen from the driver.

    Attributes:
        handle: Ray's.
        node: The id of its node; "" before it is placed.
        pid: The id of its process there; 0 before it is placed.
        ready: Whether its worker is loaded.
        given: How many tasks it was asked to do.
        tasks: Those of them that are not done: the task that it is at, and one that it may read ahead.
    """

    handle: Any
    node: str = ""
    pid: int = 0
    ready: bool = False
    given: int = 0
    tasks: deque[Task] = field(default_factory=deque)


@dataclass(slots=True)
class _Driver:
    """Hand out shards to actors, and replace actors that die."""

    ray: Any
    worker: Worker
    pool: Pool
    schedule: Schedule
    on_report: Callable[[ShardReport], None]
    should_stop: Callable[[], bool]
    members: set[_Member] = field(default_factory=set)
    calls: dict[Any, tuple[_Member, Task | None]] = field(default_factory=dict)  # who answers, and after which task
    false_starts: int = 0
    stopping: bool = False

    def run(self, actors: int) -> None:
        """Return when all shards are done, or those that were begun when it was time to stop."""
        for _ in range(actors):
            self._start()
        patience = time.monotonic() + PATIENCE
        while self.members:
            if not self.stopping and self.should_stop():
                self.stopping = True
                self._dismiss(*(member for member in self.members if not member.tasks))
            ready, _ = self.ray.wait([*self.calls], timeout=_TICK) if self.calls else ([], [])
            for call in ready:
                self._hear(call)
            if time.monotonic() > patience and not any(member.node for member in self.members):
                patience = math.inf
                _log.warning("%s", self._why_not_placed())

    def close(self) -> None:
        """End all actors at once."""
        self._dismiss(*self.members)

    def _start(self) -> None:
        actor = self.ray.remote(Actor).options(
            num_cpus=self.pool.cpus, num_gpus=self.pool.gpus, max_concurrency=2, max_restarts=0, max_task_retries=0
        )
        member = _Member(actor.remote(self.worker))
        self.members.add(member)
        self.calls[member.handle.place.remote()] = member, None

    def _dismiss(self, *members: _Member) -> None:
        """End actors at once, and remove what they left half written."""
        for member in members:
            self.ray.kill(member.handle)
        self.members -= {*members}
        self.calls = {call: whose for call, whose in self.calls.items() if whose[0] in self.members}
        here = self.ray.get_runtime_context().get_node_id()
        psutil.wait_procs(_processes(member.pid for member in members if member.node == here), _SECONDS_TO_END)
        for member in members:
            if member.tasks:
                self.worker.remove_partial_files(task.shard for task in member.tasks)

    def _hear(self, call: Any) -> None:
        """Take the answer to a call, and give out what is to be done next."""
        member, task = self.calls.pop(call)
        try:
            answer = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            self._bury(member, summary(error))
            return
        if not member.node:
            member.node, member.pid = answer
            self.calls[member.handle.load.remote()] = member, None
            return
        if task is None:
            member.ready = True
            self.false_starts = 0
        else:
            member.tasks.remove(task)
            self.schedule.done(task)
            if answer is not None:
                self.on_report(answer)
        if self.stopping:
            self._dismiss(member)  # with what it has read ahead
        else:
            self._employ()

    def _employ(self) -> None:
        """Give work to all actors that want some; dismiss all once there is none and none can come back."""
        ready = [member for member in self.members if member.ready]
        for member in ready:
            if not member.tasks:
                task = self.schedule.next()
                if task is not None:
                    self._give(member, task)
                elif not self.schedule.unfinished:
                    self.close()
                    return
        for member in ready:  # only then: no actor idles while another has two
            if len(member.tasks) == 1 and (following := self.schedule.ahead(member.tasks[0])):
                self._give(member, following)

    def _give(self, member: _Member, task: Task) -> None:
        self.calls[member.handle.do.remote(member.given, task)] = member, task
        member.given += 1
        member.tasks.append(task)

    def _bury(self, member: _Member, how: str) -> None:
        """Take note that an actor died, and start another."""
        self._dismiss(member)  # where it is only out of reach, it is not to go on
        lost_node = bool(member.node) and not self._lives(member.node)
        at = f" at shard {member.tasks[0].shard.index}" if member.tasks else ""
        _log.warning("a worker died%s%s: %s", at, " with its node" if lost_node else "", how)
        if not member.ready and not lost_node:
            self.false_starts += 1
            if self.false_starts >= MOST_DEATHS:
                raise ScoringError(
                    f"workers do not start: {MOST_DEATHS} in a row died while they loaded ({how}); look at memory and "
                    "at the logs of Ray, or take fewer workers"
                )
        if self.stopping:
            return
        for task in reversed(list(islice(member.tasks, 1, None))):
            self.schedule.lost(task)
        if member.tasks and lost_node:
            self.schedule.lost(member.tasks[0])
        elif member.tasks:
            self.schedule.died(member.tasks[0], how)
        self._start()
        self._employ()

    def _lives(self, node: str) -> bool:
        return any(other["NodeID"] == node and other["Alive"] for other in self.ray.nodes())

    def _why_not_placed(self) -> str:
        there = self.ray.cluster_resources()
        return (
            f"no worker has been placed in {PATIENCE:.0f} s: each asks for {self.pool.cpus} CPUs and "
            f"{self.pool.gpus:g} GPUs, the cluster has {there.get('CPU', 0):g} and {there.get('GPU', 0):g}; waiting"
        )


def _processes(pids: Iterable[int]) -> list[psutil.Process]:
    """Return those processes of this machine that have not ended."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found
