"""The driver on workers that take steps by a clock of their own: those that hang are replaced, and no others."""

from __future__ import annotations

import logging
import re
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_classifier.errors import ScoringError
from qwen_vl_classifier.scoring import driver
from qwen_vl_classifier.scoring.driver import MOST_HANGS, STALL_TIMEOUT, Driver
from qwen_vl_classifier.scoring.jobs import Shard, Task

ROWS = 6  # of a shard
LIMIT = 20.0


class Job:
    def worker(self) -> Job:
        return self

    def remove_partial_files(self, shards) -> None:
        pass


@dataclass(eq=False)
class Worker:
    """What it has to do, how much of it is done, the row that it has begun, and whether it is stopped."""

    tasks: deque[Task] = field(default_factory=deque)
    loaded: bool = False
    place: int = 0
    begun: int = -1
    stopped: bool = False


class Engine:
    """Lets each worker take one step for every second of its clock.

    Args:
        hanging: Rows at which a worker takes no further step.
        stops: At these seconds a worker that is at work is stopped.
        seconds_a_row: That each row takes.
        outage: Seconds between which no worker gets on.
    """

    def __init__(self, hanging=frozenset(), stops=(), seconds_a_row=1, outage=range(0), placed_at=0) -> None:
        self.now = 0
        self.hanging, self.stops, self.seconds_a_row = hanging, set(stops), seconds_a_row
        self.outage, self.placed_at = outage, placed_at
        self.living: list[Worker] = []
        self.started = 0

    def start(self, job):
        worker = Worker()
        self.living.append(worker)
        self.started += 1
        return worker

    def give(self, worker, task):
        worker.tasks.append(task)

    def stop(self, workers):
        for worker in workers:
            self.living.remove(worker)

    def is_placed(self, worker):
        return self.now >= self.placed_at

    def answers(self):
        self.now += 1
        for worker in self.living:
            if self.now in self.stops and worker.tasks:
                worker.stopped = True
                self.stops.remove(self.now)
        if self.now in self.outage or self.now < self.placed_at:
            return []
        return [(worker, answer) for worker in [*self.living] if (answer := self.step(worker))]

    def step(self, worker):
        if worker.stopped:
            return None
        if not worker.loaded:
            worker.loaded = True
            return {"ready": True}
        if not worker.tasks:
            return None
        task = worker.tasks[0]
        rows = range(task.shard.rows) if task.probe is None else task.probe
        rows = [row for row in rows if row not in task.excluded]
        number = worker.place // self.seconds_a_row
        if number < len(rows):
            row = task.shard.first_row + rows[number]
            if worker.begun != number:
                worker.begun = number
                return {"pulse": [worker.place, row]}
            worker.place += row not in self.hanging
            return None
        worker.begun = -1
        worker.place = 0
        worker.tasks.popleft()
        if task.probe is not None:
            return {"probed": True}
        excluded = {position: error.code for position, error in task.excluded.items()}
        return {"report": {"index": task.shard.index, "rows": task.shard.rows, "errors": len(excluded)}}


@pytest.fixture
def play(monkeypatch):
    """Run a driver over shards of 6 rows; return how many errors each shard has."""

    def run(engine: Engine, shards: int, workers: int = 1, should_stop=lambda: False) -> dict[int, int]:
        monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: float(engine.now)))
        reports = []
        todo = [Shard(index, ROWS * index, ROWS, ()) for index in range(shards)]
        Driver(engine, [Job()] * workers, todo, reports.append, should_stop, LIMIT).run()
        assert engine.living == []
        assert len({report.index for report in reports}) == len(reports)
        return {report.index: report.errors for report in reports}

    return run


def test_workers_that_get_on_are_left_alone(play):
    engine = Engine(seconds_a_row=15)
    assert play(engine, 8, workers=2) == dict.fromkeys(range(8), 0)
    assert engine.started == 2


def test_a_worker_that_is_stopped_is_replaced(play, caplog):
    engine = Engine(stops=[4])
    with caplog.at_level(logging.WARNING):
        assert play(engine, 6, workers=2) == dict.fromkeys(range(6), 0)
    assert engine.started == 3
    assert re.search(r"a worker died \(hung: no progress for 21 s\) at shard 0, row \d$", caplog.text, re.MULTILINE)


def test_a_row_that_hangs_costs_two_waits(play):
    engine = Engine(hanging={9})
    assert play(engine, 3) == {0: 0, 1: 1, 2: 0}
    assert engine.started == 3


def test_a_worker_that_is_stopped_while_it_loads_is_replaced(play):
    engine = Engine(outage=range(1, int(1.5 * STALL_TIMEOUT)))
    assert play(engine, 2) == {0: 0, 1: 0}
    assert engine.started == 2


def test_what_a_step_may_take_grows_with_what_steps_took(play):
    """The first steps of all decide nothing; a pass that is three times as long as one before is no reason."""
    engine = Engine(seconds_a_row=15, outage=range(40, 68))
    assert play(engine, 4) == dict.fromkeys(range(4), 0)
    assert engine.started == 1


def test_waiting_for_a_place_is_no_hanging(play):
    engine = Engine(placed_at=50 * int(LIMIT))
    assert play(engine, 2) == {0: 0, 1: 0}
    assert engine.started == 1


def test_time_in_which_the_driver_stood_still_itself_does_not_count(play, monkeypatch):
    engine = Engine()
    step = engine.step

    def sleep(worker):
        if engine.now == 5:  # as after Ctrl-Z and `fg`, or when a machine was suspended
            engine.now += 10_000
        return step(worker)

    engine.step = sleep
    assert play(engine, 3) == {0: 0, 1: 0, 2: 0}
    assert engine.started == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_where_all_hang_the_run_ends(play, workers):
    """Pictures in a network mount that is gone are held against no row."""
    engine = Engine(hanging=range(ROWS, 999))
    with pytest.raises(ScoringError, match=r"^workers hang one after another \(hung: no progress for .* are kept$"):
        play(engine, 9, workers=workers)
    assert engine.started <= workers * (MOST_HANGS + 1)
    assert engine.living == []


def test_where_none_gets_through_its_start_the_run_ends(play):
    with pytest.raises(ScoringError, match=r"^workers do not start: 3 in a row died while they loaded \(hung: no "):
        play(Engine(outage=range(1, 10**9)), 9)


def test_an_outage_that_ends_in_time_costs_no_row(play):
    engine = Engine(outage=range(5, 5 + 2 * int(LIMIT)))
    assert play(engine, 4, workers=2) == dict.fromkeys(range(4), 0)


def test_a_stop_does_not_wait_for_a_new_worker(play):
    engine = Engine(stops=[3])
    assert play(engine, 5, should_stop=lambda: engine.now > 3) == {}
    assert engine.started == 1


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5),
    st.sets(st.integers(0, 29), max_size=3),
    st.sets(st.integers(5, 200), max_size=1),
    st.integers(1, 3),
)
def test_exactly_the_rows_that_hang_become_errors(shards, hanging, stops, workers):
    with pytest.MonkeyPatch.context() as patch:
        engine = Engine(hanging=hanging, stops=stops)
        patch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: float(engine.now)))
        patch.setattr(driver, "MOST_HANGS", 100)
        reports = []
        todo = [Shard(index, ROWS * index, ROWS, ()) for index in range(shards)]
        Driver(engine, [Job()] * workers, todo, reports.append, lambda: False, LIMIT).run()
    expected = {index: sum(row // ROWS == index for row in hanging) for index in range(shards)}
    assert {report.index: report.errors for report in reports} == expected
