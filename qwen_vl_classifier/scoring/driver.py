"""The driver of a run: hand out shards to workers, and replace workers that die or hang, in any engine.

What a worker is, an engine knows: a process of this machine (`local`) or an actor of a Ray cluster (`ray`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Generic, Protocol, TypeVar

from qwen_vl_classifier import errors
from qwen_vl_classifier.errors import QwenVLClassifierError, ScoringError
from qwen_vl_classifier.scoring.jobs import Answer, Job, Shard, ShardReport, Task
from qwen_vl_classifier.scoring.schedule import Schedule

W = TypeVar("W")  # an engine's handle of a worker

MOST_FALSE_STARTS = 3
"""So many workers in a row may die before they are ready."""

MOST_HANGS = 4
"""So many times, for each worker, one may hang before any of them has prepared another row: then it is not the rows."""

STALL_TIMEOUT = 600.0
"""Seconds without progress after which a worker counts as hung."""

_LONGER_THAN_BEFORE = 3  # a step may take so many times as long as the longest one so far
_LONGER_TO_LOAD = 3  # loading has no steps to show; it has `STALL_TIMEOUT` at least
_LONGEST_LOOK = 5.0  # seconds; in a longer time between two looks the driver itself stood still, or its machine

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Death:
    """A worker has ended unexpectedly.

    Attributes:
        how: Such as "killed by signal 9 (SIGKILL)".
        hung: Whether the driver ended it because it hung.
        machine_lost: Whether its machine is gone too, so that its task is not to blame.
    """

    how: str
    hung: bool = False
    machine_lost: bool = False


class Engine(Protocol[W]):
    """Starts workers, gives them tasks, receives their answers and stops them. None of it waits for a worker."""

    def start(self, job: Job) -> W:
        """Start a worker, and return at once."""

    def give(self, worker: W, task: Task) -> None:
        """Give a worker a task, which it does after those before; if it has ended, `answers` reports its death."""

    def answers(self) -> Iterable[tuple[W, Answer | Death]]:
        """Return answers of workers; where there are none yet, wait for a fraction of a second at most."""

    def is_placed(self, worker: W) -> bool:
        """Tell whether a worker has a place to run, which a cluster may lack for a while."""

    def stop(self, workers: Collection[W]) -> None:
        """End workers at once, also those that have ended or hang; on return they write no more."""


@dataclass(slots=True)
class _Worker:
    """What the driver knows of a worker.

    Attributes:
        job: Its job.
        ready: Whether its model is loaded.
        tasks: What it was given and has not done: the task that it is at, and one that it may read ahead.
        silent: Seconds since it last got on, as far as it had something to do.
        row: Position in the whole data of the row that it is preparing; `None` where it is not known.
        done: Rows of its shard that are done.
    """

    job: Job
    ready: bool = False
    silent: float = 0.0
    row: int | None = None
    done: int = 0
    tasks: deque[Task] = field(default_factory=deque)


class Driver(Generic[W]):
    """Have workers do shards until all are done.

    Args:
        engine: What runs the workers.
        jobs: That of each worker.
        todo: The shards, read as workers become free.
        on_report: Called after each shard, once it is on disk.
        should_stop: Called several times a second; once it returns true, shards that are being done are finished and
            no more are begun.
        stall_timeout: Seconds without progress after which a worker is ended and replaced. It is longer where a step
            has taken more than a third of it.
        on_rows: Called now and then with the number of rows that are done in the shards in work.
    """

    def __init__(
        self,
        engine: Engine[W],
        jobs: Sequence[Job],
        todo: Iterable[Shard],
        on_report: Callable[[ShardReport], None],
        should_stop: Callable[[], bool],
        stall_timeout: float = STALL_TIMEOUT,
        on_rows: Callable[[int], object] | None = None,
    ) -> None:
        todo = iter(todo)
        first = list(islice(todo, len(jobs)))
        self._engine = engine
        self._jobs = jobs[: len(first)]  # no more workers than shards
        self._schedule = Schedule(chain(first, todo))
        self._on_report = on_report
        self._should_stop = should_stop
        self._on_rows = on_rows
        self._stall_timeout = stall_timeout
        self._longest_step = 0.0
        self._workers: dict[W, _Worker] = {}
        self._false_starts = 0
        self._hangs = 0  # since a row was prepared
        self._stopping = False

    def run(self) -> None:
        """Run until all shards are done, or, after a request to stop, those that were begun.

        Raises:
            QwenVLClassifierError: What a worker could not do.
            ScoringError: Workers die or hang, and no row is the cause.
        """
        looked = time.monotonic()
        try:
            for job in self._jobs:
                self._start(job)
            while self._workers:
                self._check_whether_to_stop()
                for worker, answer in self._engine.answers():
                    if worker not in self._workers:  # it was stopped before this answer was read
                        continue
                    if isinstance(answer, Death):
                        self._replace(worker, answer)
                    elif "pulse" in answer:
                        self._note_pulse(worker, *answer["pulse"])
                    else:
                        self._handle(worker, answer)
                now = time.monotonic()
                self._replace_hung(min(now - looked, _LONGEST_LOOK))
                looked = now
        finally:
            self._stop(self._workers)

    def _start(self, job: Job) -> None:
        self._workers[self._engine.start(job)] = _Worker(job)

    def _stop(self, workers: Iterable[W]) -> None:
        """End workers at once, and remove what they left half written."""
        workers = [worker for worker in workers if worker in self._workers]
        self._engine.stop(workers)
        for ended in map(self._workers.pop, workers):
            if ended.tasks:
                ended.job.worker().remove_partial_files(task.shard for task in ended.tasks)

    def _check_whether_to_stop(self) -> None:
        if not self._stopping and self._should_stop():
            self._stopping = True
            self._stop([worker for worker, state in self._workers.items() if not state.tasks])

    def _note_pulse(self, worker: W, steps: int, row: int | None, done: int = 0) -> None:
        """Record that a worker makes progress. How many steps it has done does not matter: it reports new ones only."""
        state = self._workers[worker]
        self._note_step(state)
        if state.row not in (None, row):  # that row is prepared
            self._hangs = 0
        state.row, state.done = row, done
        self._tell_rows()

    def _tell_rows(self) -> None:
        if self._on_rows is not None:
            self._on_rows(sum(state.done for state in self._workers.values()))

    def _note_step(self, state: _Worker) -> None:
        if state.ready:
            self._longest_step = max(self._longest_step, state.silent)
        state.silent = 0.0

    def _replace_hung(self, passed: float) -> None:
        """Replace workers that have something to do and have not got on for too long.

        Args:
            passed: Seconds since this was last done.
        """
        limit = max(self._stall_timeout, _LONGER_THAN_BEFORE * self._longest_step)
        for worker, state in list(self._workers.items()):
            if worker not in self._workers or (state.ready and not state.tasks) or not self._engine.is_placed(worker):
                continue
            state.silent += passed
            if state.silent > (limit if state.ready else max(STALL_TIMEOUT, _LONGER_TO_LOAD * limit)):
                self._hangs += 1
                how = f"hung: no progress for {state.silent:.0f} s"
                self._replace(worker, Death(how, hung=True))
                if self._hangs >= MOST_HANGS * len(self._jobs):
                    raise ScoringError(
                        f"workers hang one after another ({how}) without reading a row; check the disks "
                        "and network mounts of data, classifiers and scores, then run again: finished shards are kept"
                    )

    def _handle(self, worker: W, answer: Answer) -> None:
        """Take an answer, and give out what is to be done next."""
        state = self._workers[worker]
        self._note_step(state)
        if "error" in answer:
            name, message = answer["error"]
            kind = getattr(errors, name, ScoringError)
            raise kind(message) if issubclass(kind, QwenVLClassifierError) else ScoringError(message)
        if "defect" in answer:
            raise RuntimeError(f"a worker failed:\n{answer['defect']}")
        if "ready" in answer:
            state.ready = True
            self._false_starts = 0
        else:
            self._hangs = 0
            self._schedule.done(state.tasks.popleft())
            if "report" in answer:
                state.done = 0
                self._on_report(ShardReport(**answer["report"]))
                self._tell_rows()
                self._check_whether_to_stop()
        if self._stopping:
            self._stop([worker])  # with what it has read ahead
        else:
            self._assign()

    def _assign(self) -> None:
        """Give work to all workers that are free; stop all once there is none and none can come back."""
        ready = {worker: state for worker, state in self._workers.items() if state.ready}
        for worker, state in ready.items():
            if not state.tasks:
                task = self._schedule.next()
                if task is not None:
                    self._give(worker, task)
                elif not self._schedule.unfinished:
                    self._stop(self._workers)
                    return
        for worker, state in ready.items():  # only then: no worker idles while another has two
            if len(state.tasks) == 1 and (following := self._schedule.ahead(state.tasks[0])):
                self._give(worker, following)

    def _give(self, worker: W, task: Task) -> None:
        self._workers[worker].tasks.append(task)
        self._engine.give(worker, task)

    def _replace(self, worker: W, death: Death) -> None:
        """Record that a worker died, and start another."""
        state = self._workers[worker]
        self._stop([worker])  # where it is only out of reach, it is not to go on
        at = f" at shard {state.tasks[0].shard.index}" if state.tasks else ""
        at += f", row {state.row}" if death.hung and state.row is not None else ""
        _log.warning("a worker died (%s)%s%s", death.how, at, " with its machine" if death.machine_lost else "")
        if not state.ready and not death.machine_lost:
            self._false_starts += 1
            if self._false_starts >= MOST_FALSE_STARTS:
                raise ScoringError(
                    f"workers do not start: {MOST_FALSE_STARTS} in a row died while they loaded ({death.how}); check "
                    f"memory and the workers' logs, or use fewer workers"
                )
        if self._stopping:
            return
        for task in reversed(list(islice(state.tasks, 1, None))):
            self._schedule.lost(task)
        if state.tasks and death.machine_lost:
            self._schedule.lost(state.tasks[0])
        elif state.tasks:
            shard = state.tasks[0].shard
            suspect = None if not death.hung or state.row is None else state.row - shard.first_row
            if suspect is not None and not 0 <= suspect < shard.rows:  # it was reading ahead
                suspect = None
            self._schedule.died(state.tasks[0], death.how, hung=death.hung, suspect=suspect)
        self._start(state.job)
        self._assign()
