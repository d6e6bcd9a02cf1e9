"""The engine on this machine: worker processes that may die, and a driver that hands them shards.

A process of its own for each worker, also for a single one: a picture that crashes a decoder, or the kernel's
out-of-memory killer, then costs a shard and not the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

import qwen_vl_classifier
from qwen_vl_classifier import errors
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.config.spelling import flags_in_use
from qwen_vl_classifier.errors import QwenVLClassifierError, ScoringError
from qwen_vl_classifier.scoring.parts import Shard
from qwen_vl_classifier.scoring.schedule import Schedule, Task
from qwen_vl_classifier.scoring.scorer import Job, ShardReport, ShardScorer
from qwen_vl_classifier.scoring.worker import task_to_json

if TYPE_CHECKING:  # it imports this file
    from qwen_vl_classifier.scoring.extractor import ExtractJob

AnyJob = TypeVar("AnyJob", bound="Job | ExtractJob")

WORKER = (sys.executable, "-P", "-m", "qwen_vl_classifier.scoring.worker")
"""The command of a worker. `-P`: modules are never taken from the working directory."""

MOST_FALSE_STARTS = 3
"""So many workers in a row may die before they are ready."""

_TICK = 0.2  # seconds between looks at whether to stop

_log = logging.getLogger(__name__)


def run(
    job: Job | ExtractJob,
    todo: Iterable[Shard],
    config: ScoreConfig,
    on_report: Callable[[ShardReport], None],
    should_stop: Callable[[], bool],
) -> None:
    """Score shards in worker processes.

    Args:
        job: What to score with, and where to write.
        todo: The shards, read as workers become free.
        config: How many workers and threads.
        on_report: Called after each shard, once it is on disk.
        should_stop: Asked several times a second; once it says so, shards that are being scored are finished and no
            more are begun.

    Raises:
        QwenVLClassifierError: What a worker could not do.
        ScoringError: Workers die, and no row is the cause.
    """
    todo = iter(todo)
    jobs = worker_jobs(job, config)
    first = list(islice(todo, len(jobs)))
    driver = _Driver(jobs[: len(first)], Schedule(chain(first, todo)), on_report, should_stop)
    try:
        driver.run()
    finally:
        driver.kill()


def run_here(
    scorer: ShardScorer,
    todo: Iterable[Shard],
    on_report: Callable[[ShardReport], None],
    should_stop: Callable[[], bool],
) -> None:
    """Score shards in this process: rows or classifiers that are in its memory. A crash ends it."""
    for report in scorer.run_all((shard, {}) for shard in todo):
        on_report(report)
        if should_stop():
            return


def worker_jobs(job: AnyJob, config: ScoreConfig) -> list[AnyJob]:
    """Return the job of each worker: its device, its share of the memory there, and its share of the cores."""
    gpus = torch.cuda.device_count() if job.device in ("auto", "cuda") else 0
    workers = config.workers or max(1, gpus)
    threads = config.threads or max(1, torch.get_num_threads() // workers)
    return [
        dataclasses.replace(
            job,
            device=f"cuda:{number % gpus}" if gpus else job.device,
            threads=threads,
            sharing=math.ceil(workers / max(1, gpus)),
        )
        for number in range(workers)
    ]


_Event: TypeAlias = "tuple[_Worker, dict[str, Any] | None]"
"""A worker, and what it said; `None` when it is gone."""


class _Worker:
    """A worker process, seen from the driver.

    Attributes:
        job: Its job.
        ready: Whether its classifiers are loaded.
        tasks: What it was asked to do: the one that it is at, and one that it may read ahead.
    """

    def __init__(self, job: Job | ExtractJob, events: queue.Queue[_Event]) -> None:
        self.job = job
        self.ready = False
        self.tasks: deque[Task] = deque()
        self._process = subprocess.Popen(  # noqa: S603  # the command is our own
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(job.threads)
        )
        threading.Thread(target=self._listen, args=(events,), name="listen", daemon=True).start()
        self._say({"driver": os.getpid(), "flags": flags_in_use(), "job": job.to_json()})

    def give(self, task: Task) -> None:
        """Ask for a task."""
        self.tasks.append(task)
        self._say(task_to_json(task))

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self.end()

    def end(self) -> str:
        """Wait for the process to end, and say how it did."""
        status = self._process.wait()
        assert self._process.stdin
        with contextlib.suppress(OSError):  # what was not yet sent to it
            self._process.stdin.close()
        if status >= 0:
            return f"ended with status {status}"
        names = {number.value: number.name for number in signal.Signals}
        return f"killed by signal {-status} ({names.get(-status, 'unknown')})"

    def remove_partial_files(self) -> None:
        """Remove what the process left half written: it has ended, and nobody else has its shards yet."""
        if self.tasks:
            self.job.worker().remove_partial_files(task.shard for task in self.tasks)

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it is gone, which `_listen` tells
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _listen(self, events: queue.Queue[_Event]) -> None:
        assert self._process.stdout
        with self._process.stdout as answers:
            for line in answers:
                if line.endswith(b"\n"):  # else it died while it wrote
                    events.put((self, json.loads(line)))
        events.put((self, None))


class _Driver:
    """Hand out shards to workers, and start workers anew that died."""

    def __init__(
        self,
        jobs: Iterable[Job | ExtractJob],
        schedule: Schedule,
        on_report: Callable[[ShardReport], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self._schedule = schedule
        self._on_report = on_report
        self._should_stop = should_stop
        self._events: queue.Queue[_Event] = queue.Queue()
        self._false_starts = 0
        self._stopping = False
        self._jobs = jobs
        self._workers: set[_Worker] = set()

    def run(self) -> None:
        """Return when all shards are done, or those that were begun when it was time to stop."""
        for job in self._jobs:
            self._start(job)
        while self._workers:
            self._look_whether_to_stop()
            try:
                worker, answer = self._events.get(timeout=_TICK)
            except queue.Empty:
                continue
            if worker not in self._workers:  # the last words of one that was dismissed
                continue
            if answer is None:
                self._bury(worker)
            else:
                self._hear(worker, answer)

    def kill(self) -> None:
        """End all workers at once."""
        for worker in list(self._workers):
            self._dismiss(worker)

    def _look_whether_to_stop(self) -> None:
        if not self._stopping and self._should_stop():
            self._stopping = True
            for worker in [worker for worker in self._workers if not worker.tasks]:
                self._dismiss(worker)

    def _start(self, job: Job | ExtractJob) -> None:
        self._workers.add(_Worker(job, self._events))

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        worker.kill()
        worker.remove_partial_files()

    def _hear(self, worker: _Worker, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            name, message = answer["error"]
            kind = getattr(errors, name, ScoringError)
            raise kind(message) if issubclass(kind, QwenVLClassifierError) else ScoringError(message)
        if "defect" in answer:
            raise RuntimeError(f"a worker failed:\n{answer['defect']}")
        if "ready" in answer:
            worker.ready = True
            self._false_starts = 0
        else:
            self._schedule.done(worker.tasks.popleft())
            if "report" in answer:
                self._on_report(ShardReport(**answer["report"]))
                self._look_whether_to_stop()
        if self._stopping:
            self._dismiss(worker)  # with what it has read ahead
        else:
            self._employ()

    def _employ(self) -> None:
        """Give work to all workers that want some; dismiss all once there is none and none can come back."""
        ready = [worker for worker in self._workers if worker.ready]
        for worker in ready:
            if not worker.tasks:
                task = self._schedule.next()
                if task is not None:
                    worker.give(task)
                elif not self._schedule.unfinished:
                    self.kill()
                    return
        for worker in ready:  # only then: no worker idles while another has two
            if len(worker.tasks) == 1 and (following := self._schedule.ahead(worker.tasks[0])):
                worker.give(following)

    def _bury(self, worker: _Worker) -> None:
        """Take note that a worker died, and start another."""
        self._workers.discard(worker)
        how = worker.end()
        worker.remove_partial_files()
        if not worker.ready:
            self._false_starts += 1
            if self._false_starts >= MOST_FALSE_STARTS:
                raise ScoringError(
                    f"workers do not start: {MOST_FALSE_STARTS} in a row died while they loaded ({how}); "
                    "look at memory and at what they printed, or take fewer workers"
                )
        _log.warning("a worker died (%s)%s", how, f" at shard {worker.tasks[0].shard.index}" if worker.tasks else "")
        if self._stopping:
            return
        for task in reversed(list(islice(worker.tasks, 1, None))):
            self._schedule.lost(task)
        if worker.tasks:
            self._schedule.died(worker.tasks[0], how)
        self._start(worker.job)
        self._employ()


def _environment(threads: int) -> dict[str, str]:
    """Return a worker's environment: this package to import, and a number of threads that does not change."""
    root = str(Path(qwen_vl_classifier.__file__).parents[1])
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
        "OMP_NUM_THREADS": str(threads),
        "OMP_DYNAMIC": "FALSE",
        "MKL_DYNAMIC": "FALSE",
    }
