"""Queues of several batchers add up for one observer."""

from __future__ import annotations

from qwen_vl_classifier.serving.depths import Depths
from tests.serving.batch_scorer import Notes


def test_depths_add_up_and_everything_else_is_passed_on() -> None:
    notes = Notes()
    depths = Depths(notes)
    first, second = depths.of_another(), depths.of_another()
    first.depth(3, 1)
    second.depth(2, 0)
    first.depth(0, 4)
    first.scored(4, 40, 0.5)
    second.split("exception")
    second.cancelled(2)
    first.waited(0.1)
    assert notes.depths == [(3, 1), (5, 1), (2, 4)]
    assert notes.told == [("scored", 4, 40), ("split", "exception"), ("cancelled", 2)]
