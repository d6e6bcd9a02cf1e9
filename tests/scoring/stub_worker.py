"""A worker process that computes next to nothing, starts without torch, and misbehaves where the environment says so.

STUB_DEADLY: numbers of rows that end the process by a segmentation fault. STUB_READ_DEADLY: the same, but when their
shard is read, which may be while another is scored. STUB_HANGING: numbers of rows that wait for ever. STUB_GATE: a file
for which every shard waits once it is begun. STUB_LOG: a file that gets a line for each shard that is begun. STUB_LOAD:
"die", "refuse" or "fail" while loading.
TEST_HALT: where to stop while a shard is written (see `tests/crash_points.py`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.errors import ArtifactError
from qwen_vl_classifier.scoring import local
from qwen_vl_classifier.scoring.formats import ScoredRow
from qwen_vl_classifier.scoring.jobs import Pulse, RowError, Shard, ShardReport, Task
from qwen_vl_classifier.scoring.manifest import ScoreManifest
from qwen_vl_classifier.scoring.shards import ShardFolder
from tests.crash_points import halt_as_told
from tests.waiting import until

MANIFEST = ScoreManifest((("spam", "a" * 64),), data="d" * 64, options={})


def rows_of(name: str) -> set[int]:
    return {int(row) for row in os.environ.get(name, "").split(",") if row}


@dataclass(frozen=True, kw_only=True)
class StubJob:
    kind: ClassVar[str] = "stub"
    out: str
    device: str = "cpu"
    threads: int = 0
    sharing: int = 1

    def worker(self) -> StubWorker:
        return StubWorker(self)


class StubWorker:
    def __init__(self, job: StubJob) -> None:
        self.folder = ShardFolder(job.out, MANIFEST)
        self.pulse = Pulse()

    def remove_partial_files(self, shards: Iterable[Shard]) -> None:
        for shard in shards:
            self.folder.sweep(shard.index)

    def load(self) -> None:
        if os.environ.get("STUB_LOAD") == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("STUB_LOAD") == "refuse":
            raise ArtifactError("spam: no classifier here")
        if os.environ.get("STUB_LOAD") == "fail":
            raise ValueError("a defect")

    def run_all(self, tasks: Iterable[Task], *, endless: bool) -> Iterator[ShardReport]:
        waiting, reader = self.read(tasks), ThreadPoolExecutor(1)  # as `read_ahead` does, which imports torch
        following = reader.submit(next, waiting, None)
        while (task := following.result()) is not None:
            following = reader.submit(next, waiting, None)
            shard, excluded = task.shard, task.excluded
            note(f"{os.getpid()} {shard.index}")
            if gate := os.environ.get("STUB_GATE"):
                until(Path(gate).exists, "the gate to open")
            self.folder.write(shard.index, self.score(shard, range(shard.rows), excluded))
            yield ShardReport(shard.index, shard.rows, len(excluded))

    def read(self, tasks: Iterable[Task]) -> Iterator[Task]:
        for task in tasks:
            die_at(task.shard, set(range(task.shard.rows)) - task.excluded.keys(), rows_of("STUB_READ_DEADLY"))
            yield task

    def probe(self, task: Task) -> None:
        shard, rows = task.shard, task.probe
        note(f"{os.getpid()} {shard.index} {rows.start}:{rows.stop}")
        die_at(shard, set(rows) - task.excluded.keys(), rows_of("STUB_READ_DEADLY"))
        self.score(shard, rows, task.excluded)

    def score(self, shard: Shard, rows: range, excluded: Mapping[int, RowError]) -> list[ScoredRow]:
        die_at(shard, set(rows) - excluded.keys(), rows_of("STUB_DEADLY"))
        scored = []
        for position in rows:
            row = shard.first_row + position
            self.pulse.prepare(row)
            if position in excluded:
                scored.append(ScoredRow(f"id{row}", row, error=excluded[position]))
            else:
                if row in rows_of("STUB_HANGING"):
                    note(f"{os.getpid()} hang {row}")
                    threading.Event().wait()
                scored.append(ScoredRow(f"id{row}", row, (Prediction(row % 2, 1 / (1 + row), "no"),)))
        self.pulse.prepare(None)
        return scored


def note(line: str) -> None:
    if "STUB_LOG" in os.environ:
        with Path(os.environ["STUB_LOG"]).open("a") as log:
            log.write(line + "\n")


def die_at(shard: Shard, positions: set[int], deadly: set[int]) -> None:
    if deadly & {shard.first_row + position for position in positions}:
        os.kill(os.getpid(), signal.SIGSEGV)


if __name__ == "__main__":
    stub = types.ModuleType("qwen_vl_classifier.scoring.workers")
    stub.job_from_json = lambda record: StubJob(out=record["out"])
    sys.modules[stub.__name__] = stub
    halt_as_told()
    local.main()
