"""How long work takes is learnt from work, and from nothing else."""

from __future__ import annotations

import pytest

from qwen_vl_classifier.serving.backlog import Backlog
from tests.serving.clock import AGE, Clock
from tests.waiting import run


def test_nothing_is_expected_before_anything_is_known() -> None:
    assert Backlog().seconds_for(1000) == 0


def test_the_time_in_which_there_is_no_work_does_not_count() -> None:
    async def main() -> None:
        clock, backlog = Clock(), Backlog()
        backlog.add(2)
        clock.ahead += 4 * AGE
        backlog.finish(2)
        known = backlog.seconds_for(10)
        assert known == pytest.approx(20 * AGE, rel=0.1)
        clock.ahead += 1000 * AGE
        assert backlog.seconds_for(10) == known
        backlog.add(1)
        clock.ahead += 2 * AGE
        backlog.finish(1)
        assert backlog.seconds_for(10) == pytest.approx(known, rel=0.1)

    run(main())


def test_what_is_given_up_is_not_done() -> None:
    async def main() -> None:
        clock, backlog = Clock(), Backlog()
        backlog.add(5)
        clock.ahead += AGE
        backlog.drop(5)
        assert (backlog.cost, backlog.seconds_for(1)) == (0, 0)

    run(main())


def test_the_latest_work_counts_most() -> None:
    async def main() -> None:
        clock, backlog = Clock(), Backlog()
        for seconds in [AGE] * 60 + [3 * AGE] * 60:
            backlog.add(1)
            clock.ahead += seconds
            backlog.finish(1)
        assert backlog.seconds_for(1) == pytest.approx(3 * AGE, rel=0.1)

    run(main())
