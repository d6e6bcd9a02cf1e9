"""A process that scores shards for a driver: messages in on standard input, answers out on standard output.

Messages are JSON, one a line: nothing that comes in can run code. A worker ends with its driver, however that ends: its
standard input closes, and on Linux the kernel kills it at once. It takes no notice of SIGINT and SIGTERM, which reach a
whole group of processes: the driver decides what is still finished.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from qwen_vl_classifier.config.spelling import naming_flags
from qwen_vl_classifier.errors import QwenVLClassifierError
from qwen_vl_classifier.scoring.formats import RowError
from qwen_vl_classifier.scoring.parts import Shard
from qwen_vl_classifier.scoring.schedule import Task

if TYPE_CHECKING:
    from qwen_vl_classifier.scoring.extractor import ShardExtractor
    from qwen_vl_classifier.scoring.scorer import ShardScorer

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>


def task_to_json(task: Task) -> dict[str, Any]:
    """Return what `task_from_json` takes."""
    return {
        "shard": task.shard.to_json(),
        "blamed": {position: [error.code, error.message] for position, error in task.blamed.items()},
        "probe": None if task.probe is None else [task.probe.start, task.probe.stop],
    }


def task_from_json(record: Mapping[str, Any]) -> Task:
    """Make a task from what `task_to_json` returned."""
    return Task(
        Shard.from_json(record["shard"]),
        {int(position): RowError(*error) for position, error in record["blamed"].items()},
        None if record["probe"] is None else range(*record["probe"]),
    )


def main() -> None:
    """Do what the driver asks, until it is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    first = sys.stdin.readline()
    if not first:  # the driver is gone already
        return
    start = json.loads(first)
    _end_with(start["driver"])
    messages: queue.Queue[Task] = queue.Queue()
    threading.Thread(target=_listen, args=(messages,), name="listen", daemon=True).start()
    try:
        with naming_flags(start["flags"]):
            _serve(start["job"], messages, answers)
    except QwenVLClassifierError as error:
        _send(answers, error=[type(error).__name__, str(error)])
    except Exception:
        _send(answers, defect=traceback.format_exc())
    os._exit(1)  # a thread may wait for tasks for ever


def _serve(record: Mapping[str, Any], messages: queue.Queue[Task], answers: TextIO) -> None:
    scorer = _worker_of(record)
    scorer.load()
    _send(answers, ready=True)
    other: list[Task] = []  # the probe that came in place of a shard to run

    def runs(task: Task) -> Iterator[tuple[Shard, Mapping[int, RowError]]]:
        yield task.shard, task.blamed
        while (following := messages.get()).probe is None:
            yield following.shard, following.blamed
        other.append(following)

    task = messages.get()
    while True:
        if task.probe is None:
            for report in scorer.run_all(runs(task), endless=True):
                _send(answers, report=dataclasses.asdict(report))
            task = other.pop()
        else:
            scorer.probe(task.shard, task.probe, task.blamed)
            _send(answers, probed=task.shard.index)
            task = messages.get()


def _worker_of(record: Mapping[str, Any]) -> ShardScorer | ShardExtractor:
    """Return what does the shards of a job; imports torch, which takes seconds in which the driver may end."""
    if "taps" in record:
        from qwen_vl_classifier.scoring.extractor import ExtractJob

        return ExtractJob.from_json(record).worker()
    from qwen_vl_classifier.scoring.scorer import Job

    return Job.from_json(record).worker()


def _listen(messages: queue.Queue[Task]) -> None:
    """Pass on what the driver says; end the process when it is gone."""
    for line in sys.stdin:
        messages.put(task_from_json(json.loads(line)))
    os._exit(0)


def _send(answers: TextIO, **answer: Any) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _end_with(driver: int) -> None:
    """Have the kernel kill this process when the driver ends."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != driver:  # it ended before the kernel was asked
        os._exit(0)


if __name__ == "__main__":
    main()
