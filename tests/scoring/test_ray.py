"""The Ray engine: two actors on this machine do every shard once, whatever is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen_vl_classifier.errors import DataError, ScoringError
from qwen_vl_classifier.scoring.parts import Shard
from qwen_vl_classifier.scoring.ray import run_shards
from qwen_vl_classifier.scoring.ray_cluster import Pool, connected

POOL = Pool(workers=2)
ROWS = 8  # of a shard


@dataclass(frozen=True)
class Report:
    """What the driver passes on of a shard; the real one would load torch in every actor."""

    index: int
    errors: int


class Stub:
    """A worker that writes one line for each row, and says who did what."""

    def __init__(self, folder: Path, deadly: frozenset[int] = frozenset(), *, slow: float = 0.0) -> None:
        self.folder = folder
        self.deadly = deadly
        self.slow = slow

    def note(self, what: str) -> None:
        with (self.folder / "log").open("a") as file:
            file.write(f"{os.getpid()} {what}\n")

    def load(self) -> None:
        self.note("load")

    def look_at(self, shard: Shard, rows: range, blamed) -> list[str]:
        lines = []
        for position in rows:
            row = shard.first_row + position
            if position in blamed:
                lines.append(f"{row} {blamed[position].code}\n")
                continue
            if row in self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            lines.append(f"{row}\n")
        time.sleep(self.slow)
        return lines

    def run_all(self, tasks) -> Iterator[Report]:
        for shard, blamed in tasks:
            self.note(f"run {shard.index}")
            lines = self.look_at(shard, range(shard.rows), blamed)
            with (self.folder / f"shard-{shard.index}").open("x") as file:
                file.writelines(lines)
            yield Report(shard.index, len(blamed))

    def probe(self, shard: Shard, rows: range, blamed=None) -> None:
        self.note(f"probe {shard.index} {rows.start}:{rows.stop}")
        self.look_at(shard, rows, blamed or {})


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    with connected(POOL) as ray:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file
        yield ray
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def shards(count: int) -> list[Shard]:
    return [Shard(index, ROWS * index, ROWS, ()) for index in range(count)]


def do(worker: Stub, todo, should_stop: Callable[[], bool] = lambda: False) -> list[Report]:
    reports: list[Report] = []
    run_shards(worker, todo, POOL, reports.append, should_stop)
    return reports


def log(folder: Path) -> list[tuple[int, str]]:
    lines = [line.split(maxsplit=1) for line in (folder / "log").read_text().splitlines()]
    return [(int(pid), what) for pid, what in lines]


def content(folder: Path) -> list[str]:
    """All lines, in the order of the shards."""
    files = sorted(folder.glob("shard-*"), key=lambda path: int(path.name.split("-")[1]))
    return [line for path in files for line in path.read_text().splitlines()]


def test_two_actors_share_the_shards(ray, tmp_path):
    reports = do(Stub(tmp_path, slow=0.05), shards(8))
    assert sorted(report.index for report in reports) == list(range(8))
    assert content(tmp_path) == [str(row) for row in range(8 * ROWS)]
    assert len({pid for pid, what in log(tmp_path) if what.startswith("run")}) == 2


def test_an_actor_that_is_killed_costs_its_shard_only(ray, tmp_path):
    killed: list[int] = []

    def should_stop() -> bool:
        busy = [pid for pid, what in log(tmp_path) if what.startswith("run")] if (tmp_path / "log").exists() else []
        if busy and not killed:
            killed.append(busy[0])
            os.kill(busy[0], signal.SIGKILL)
        return False

    reports = do(Stub(tmp_path, slow=0.3), shards(6), should_stop)
    assert sorted(report.index for report in reports) == list(range(6))
    assert content(tmp_path) == [str(row) for row in range(6 * ROWS)]
    assert len(killed) == 1
    runs = [what for _, what in log(tmp_path) if what.startswith("run")]
    assert len(runs) == 7
    assert len({pid for pid, what in log(tmp_path) if what == "load"}) == 3


def test_a_row_that_kills_its_worker_is_found(ray, tmp_path):
    reports = do(Stub(tmp_path, frozenset({ROWS + 3})), shards(3))
    assert {report.index: report.errors for report in reports} == {0: 0, 1: 1, 2: 0}
    expected = [f"{row} crashed" if row == ROWS + 3 else str(row) for row in range(3 * ROWS)]
    assert content(tmp_path) == expected
    assert sum(what == "run 1" for _, what in log(tmp_path)) == 4


def test_workers_that_die_while_loading_end_the_run(ray, tmp_path):
    class Broken(Stub):
        def load(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ScoringError, match="^workers do not start: 3 in a row died while they loaded"):
        do(Broken(tmp_path), shards(1))


def test_an_expected_error_arrives_as_it_was_raised(ray, tmp_path):
    class Changed(Stub):
        def run_all(self, tasks):
            raise DataError("rows.jsonl has changed since it was planned")

    with pytest.raises(DataError) as caught:
        do(Changed(tmp_path), shards(3))
    assert type(caught.value) is DataError
    assert str(caught.value) == "rows.jsonl has changed since it was planned"


def test_after_a_stop_no_shard_is_begun_and_those_begun_are_kept(ray, tmp_path):
    seen: list[int] = []

    def todo() -> Iterator[Shard]:
        for shard in shards(1000):
            seen.append(shard.index)
            yield shard

    reports = do(Stub(tmp_path, slow=0.05), todo(), lambda: len(content(tmp_path)) >= 4 * ROWS)
    assert 4 <= len(reports) <= 10
    assert len(seen) - len(reports) <= POOL.workers  # what was only read ahead
    assert len(content(tmp_path)) == len(reports) * ROWS


def test_no_actor_is_left(ray, tmp_path):
    do(Stub(tmp_path), shards(2))
    deadline = time.monotonic() + 30
    pids = {pid for pid, _ in log(tmp_path)}
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
