"""The engine on this machine: each worker is a process of its own, which may die without harm.

That holds for a single worker too: a picture that crashes a decoder, or the kernel's out-of-memory killer, then costs a
shard and not the run.

Messages are JSON, one a line: tasks on a worker's standard input, answers on its standard output. Nothing that comes in
can run code. A worker ends with its driver, however that ends: its standard input closes, and on Linux the kernel kills
it at once. It ignores SIGINT, SIGTERM and SIGHUP, which reach a whole group of processes: the driver decides what is
still finished.
"""

from __future__ import annotations

import contextlib
import ctypes
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
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import qwen_vl_classifier
from qwen_vl_classifier.config.device_lists import ALL_DEVICES, listed_devices, names_several
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.scoring.driver import Death, Driver
from qwen_vl_classifier.scoring.jobs import Answer, Job, Shard, ShardReport, Task, job_to_json, work

J = TypeVar("J", bound=Job)
Process: TypeAlias = "subprocess.Popen[bytes]"

WORKER = (sys.executable, "-P", "-m", "qwen_vl_classifier.scoring.local")
"""The command of a worker. `-P`: modules are never taken from the working directory."""

_ANY_GPU = ("auto", "cuda", "xpu", "mps")  # all that there are of the kind
_TICK = 0.2  # seconds to wait for answers
_SECONDS_TO_END = 5.0  # for processes that were killed
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>

_log = logging.getLogger(__name__)


def run(
    job: Job,
    todo: Iterable[Shard],
    config: ScoreConfig,
    on_report: Callable[[ShardReport], None],
    should_stop: Callable[[], bool],
    on_rows: Callable[[int], object] | None = None,
) -> None:
    """Do shards in worker processes; see `Driver`.

    Args:
        job: What is done.
        todo: The shards.
        config: How many workers and threads, and when a worker counts as hung.
        on_report: Called after each shard.
        should_stop: Tells whether to begin no more.
        on_rows: Called now and then with the number of rows that are done in the shards in work.
    """
    Driver(LocalEngine(), worker_jobs(job, config), todo, on_report, should_stop, config.stall_timeout, on_rows).run()


def worker_jobs(job: J, config: ScoreConfig) -> list[J]:
    """Return the job of each worker: its device, its share of the memory there, and its share of the cores.

    Raises:
        ConfigError: A device of a list is not here, or the workers cannot be dealt out evenly over the list.
    """
    import torch  # takes seconds: a worker imports this file too, and is to notice at once that its driver is gone

    devices = _devices(job.device)
    workers = config.workers or len(devices)
    if names_several(job.device) and workers % len(devices):
        raise ConfigError(
            f"device {job.device!r} with workers {workers}: {len(devices)} devices cannot have the same number of "
            f"workers each; leave workers out for one each, or give a multiple of {len(devices)}"
        )
    threads = config.threads or max(1, torch.get_num_threads() // workers)
    return [
        dataclasses.replace(
            job,
            device=device,
            threads=threads,
            sharing=math.ceil(workers / len(devices)) * devices.count(device),
        )
        for device in islice(cycle(devices), workers)
    ]


def _devices(device: str) -> Sequence[str]:
    """Return the devices that workers are dealt out over: those of a list, or all GPUs where none is singled out."""
    from qwen_vl_classifier.backbone.devices import choose_device, every_gpu, gpu_names

    if device == ALL_DEVICES:
        return every_gpu()
    if device in _ANY_GPU:
        return [name for name in gpu_names() if device in ("auto", name.partition(":")[0])] or [device]
    devices = listed_devices(device)
    if len(devices) > 1:  # else the one worker says what is wrong
        for one in devices:
            choose_device(one)
    return devices


class LocalEngine:
    """Runs workers as processes of this machine."""

    def __init__(self) -> None:
        self._answers: queue.Queue[tuple[Process, Answer | Death]] = queue.Queue()
        self._outboxes: dict[Process, queue.SimpleQueue[Mapping[str, Any] | None]] = {}

    def start(self, job: Job) -> Process:
        """Start a process."""
        process = subprocess.Popen(  # noqa: S603  # the command is our own
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=worker_environment(job.threads)
        )
        outbox = self._outboxes[process] = queue.SimpleQueue()
        outbox.put({"driver": os.getpid(), "job": job_to_json(job)})
        threading.Thread(target=self._listen, args=(process,), name="listen", daemon=True).start()
        threading.Thread(target=_send, args=(process, outbox), name="send", daemon=True).start()
        return process

    def give(self, worker: Process, task: Task) -> None:
        """Send a task."""
        self._outboxes[worker].put(task.to_json())

    def answers(self) -> list[tuple[Process, Answer | Death]]:
        """Return the next answer; none after a fraction of a second."""
        with contextlib.suppress(queue.Empty):
            return [self._answers.get(timeout=_TICK)]
        return []

    def is_placed(self, worker: Process) -> bool:
        """Return true: it has a process from the start."""
        return True

    def stop(self, workers: Collection[Process]) -> None:
        """Kill processes, and wait until they have ended.

        One that hangs inside of the system, for example in a network mount, ends when the system lets it go: after some
        seconds it is left to that. It runs no instruction of its own any more.
        """
        for process in workers:
            process.kill()
            self._outboxes.pop(process).put(None)
        end = time.monotonic() + _SECONDS_TO_END
        for process in workers:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.warning(
                    "process %d was killed but has not ended, as it hangs in the operating system; it is left running",
                    process.pid,
                )

    def _listen(self, process: Process) -> None:
        assert process.stdout
        with process.stdout as answers:
            for line in answers:
                if line.endswith(b"\n"):  # else it died while it wrote
                    self._answers.put((process, json.loads(line)))
        self._answers.put((process, Death(ending_of(process.wait()))))


def _send(process: Process, outbox: queue.SimpleQueue[Mapping[str, Any] | None]) -> None:
    """Send messages to a process, in a thread of its own: a process that hangs takes nothing in."""
    assert process.stdin
    with contextlib.suppress(BrokenPipeError), process.stdin:  # it has ended, which `_listen` tells
        while (message := outbox.get()) is not None:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()


def ending_of(status: int) -> str:
    """Describe how a process ended, by the status that `subprocess` gives."""
    if status >= 0:
        return f"ended with status {status}"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by signal {-status} ({names.get(-status, 'unknown')})"


def worker_environment(threads: int) -> dict[str, str]:
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


def main() -> None:
    """Run a worker: do the driver's tasks until the driver has gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def tell(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    first = sys.stdin.readline()
    if not first:  # the driver is gone already
        return
    start = json.loads(first)
    _end_with(start["driver"])
    inbox: queue.Queue[Task] = queue.Queue()
    threading.Thread(target=_receive, args=(inbox,), name="receive", daemon=True).start()

    from qwen_vl_classifier.scoring.workers import job_from_json  # imports torch, meanwhile the driver may end

    work(job_from_json(start["job"]).worker(), inbox, tell)
    os._exit(1)  # a thread may wait for tasks for ever


def _receive(inbox: queue.Queue[Task]) -> None:
    """Pass on the driver's tasks; end the process when it is gone."""
    for line in sys.stdin:
        inbox.put(Task.from_json(json.loads(line)))
    os._exit(0)


def _end_with(driver: int) -> None:
    """Have the kernel kill this process when the driver ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != driver:  # it ended before that was in force
        os._exit(0)


if __name__ == "__main__":
    main()
