"""What is expected of work that is like the work before."""

from __future__ import annotations

import pytest

from qwen_vl_classifier.serving.pace import Pace


def test_nothing_is_expected_before_anything_is_known() -> None:
    assert Pace().seconds(1000) == 0
    assert not Pace().too_slow(1000, 0.001)


def test_time_counts_while_there_is_work_and_not_between() -> None:
    pace = Pace()
    pace.start(100)
    pace.done(104, 2)
    pace.done(106, 1)
    assert pace.seconds(10) == pytest.approx(20)
    pace.start(1000)
    pace.done(1002, 1)
    assert pace.seconds(10) == pytest.approx(20)
    assert pace.too_slow(5, 12)
    assert not pace.too_slow(5, 13)


def test_the_latest_counts_most() -> None:
    pace = Pace()
    for now in range(100):
        pace.done(now, 1)
    before = pace.seconds(1)
    for now in range(100):
        pace.done(100 + 3 * now, 1)
    assert before == pytest.approx(1, rel=0.01)
    assert pace.seconds(1) == pytest.approx(3, rel=0.01)
