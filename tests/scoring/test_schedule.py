"""The schedule: every shard once, whatever dies, and exactly the rows that crash excluded."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_classifier.errors import ScoringError
from qwen_vl_classifier.scoring.jobs import Shard
from qwen_vl_classifier.scoring.schedule import MOST_CRASHING_ROWS, MOST_DEATHS, Schedule, Task


def shards(*sizes: int) -> list[Shard]:
    return [Shard(index, sum(sizes[:index]), rows, ()) for index, rows in enumerate(sizes)]


def rows_of(task: Task) -> set[int]:
    """Return the rows of the whole data that a task looks at."""
    positions = range(task.shard.rows) if task.probe is None else task.probe
    return {task.shard.first_row + position for position in positions if position not in task.excluded}


def play(schedule: Schedule, deadly: set[int], *, workers: int = 1, rng=None) -> tuple[dict[int, set[int]], int]:
    """Work until all is done; return the rows that each shard was written without, and the number of deaths."""
    written: dict[int, set[int]] = {}
    deaths = 0
    running: list[Task] = []
    while True:
        while len(running) < workers and (task := schedule.next()):
            running.append(task)
        assert schedule.unfinished == len(running)
        if not running:
            return written, deaths
        task = running.pop(rng.randrange(len(running)) if rng else 0)
        if rows_of(task) & deadly:
            deaths += 1
            schedule.died(task, "killed by signal 11")
        elif rng and rng.random() < 0.2:
            schedule.lost(task)
        else:
            schedule.done(task)
            if task.probe is None:
                assert task.shard.index not in written, "a shard was written twice"
                written[task.shard.index] = {task.shard.first_row + position for position in task.excluded}
                assert {error.code for error in task.excluded.values()} <= {"crashed"}


def test_without_deaths_shards_come_in_order_and_once():
    schedule = Schedule(shards(3, 3, 1))
    tasks = [schedule.next() for _ in range(4)]
    assert [task and task.shard.index for task in tasks] == [0, 1, 2, None]
    assert all(task.excluded == {} and task.probe is None for task in tasks[:3])
    assert schedule.unfinished == 3


def test_shards_are_read_as_they_are_needed():
    taken = []
    schedule = Schedule(taken.append(shard) or shard for shard in shards(1, 1, 1))
    schedule.next()
    assert len(taken) == 1


def test_a_shard_whose_worker_dies_is_next_and_whole():
    """And careful, since several pictures at a time may have taken too much memory."""
    schedule = Schedule(shards(2, 2))
    first = schedule.next()
    for _ in range(MOST_DEATHS - 1):
        schedule.died(first, "")
        assert schedule.next() == replace(first, careful=True)
    schedule.done(first)
    assert schedule.next().shard.index == 1


def test_a_lost_machine_is_held_against_no_row():
    schedule = Schedule(shards(2))
    for _ in range(5 * MOST_DEATHS):
        task = schedule.next()
        assert task.probe is None
        schedule.lost(task)


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sets(st.integers(0, 159), max_size=4),
    st.integers(1, 4),
    st.integers(0, 9999),
)
def test_exactly_the_crashing_rows_are_excluded(sizes, deadly, workers, seed):
    rng = random.Random(seed)
    deadly = {row for row in deadly if row < sum(sizes)}
    written, deaths = play(Schedule(shards(*sizes)), deadly, workers=workers, rng=rng)
    assert {row for excluded in written.values() for row in excluded} == deadly
    assert sorted(written) == list(range(len(sizes)))
    # Three deaths of each shard, two for each crashing row at each halving: a thousand rows are ten halvings.
    assert deaths <= MOST_DEATHS * len(sizes) + len(deadly) * (max(sizes).bit_length() + 2)


def test_one_death_alone_does_not_exclude_a_row():
    schedule = Schedule(shards(1))
    for _ in range(MOST_DEATHS):
        schedule.died(schedule.next(), "")
    probe = schedule.next()
    assert probe.probe == range(1)
    schedule.died(probe, "")
    schedule.done(schedule.next())
    last = schedule.next()
    assert (last.probe, last.excluded) == (None, {})


def test_the_row_at_which_a_worker_hung_is_probed_alone():
    schedule = Schedule(shards(8, 1))
    schedule.died(schedule.next(), "hung", hung=True, suspect=5)
    probe = schedule.next()
    assert (probe.shard.index, probe.probe) == (0, range(5, 6))
    schedule.died(probe, "hung", hung=True, suspect=5)
    whole = schedule.next()
    assert whole.probe is None
    assert [(position, error.code) for position, error in whole.excluded.items()] == [(5, "timed_out")]
    schedule.died(whole, "hung", hung=True, suspect=7)  # another one
    schedule.died(schedule.next(), "hung", hung=True, suspect=7)
    assert schedule.next().excluded.keys() == {5, 7}


def test_a_row_that_is_no_cause_of_hanging_is_kept():
    """A worker that somebody stopped is at some row too."""
    schedule = Schedule(shards(8))
    for suspect in range(MOST_DEATHS - 1):
        schedule.died(schedule.next(), "hung", hung=True, suspect=suspect)
        schedule.done(schedule.next())
    whole = schedule.next()
    assert (whole.probe, whole.excluded) == (None, {})
    schedule.died(whole, "hung", hung=True)
    halves = [schedule.next(), schedule.next()]
    assert [half.probe for half in halves] == [range(4), range(4, 8)]


def test_deaths_without_a_crashing_row_end_the_run():
    schedule = Schedule(shards(4))
    whole = 0
    while True:
        task = schedule.next()
        if task.probe is not None:
            schedule.done(task)
            continue
        whole += 1
        if whole == 2 * MOST_DEATHS:
            break
        schedule.died(task, "out of memory")
    with pytest.raises(ScoringError, match=r"^shard 0: its workers die \(out of memory\), but no single row"):
        schedule.died(task, "out of memory")


def test_too_many_crashing_rows_are_not_the_cause():
    rows = 2 * MOST_CRASHING_ROWS
    with pytest.raises(ScoringError, match=f"^shard 0: more than {MOST_CRASHING_ROWS} of its rows each crash a worker"):
        play(Schedule(shards(rows)), set(range(rows)))
    written, _ = play(Schedule(shards(rows)), set(range(MOST_CRASHING_ROWS)))
    assert written == {0: set(range(MOST_CRASHING_ROWS))}
