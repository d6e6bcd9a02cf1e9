"""Bytes are counted, bounded and given back."""

from __future__ import annotations

import pytest

from qwen_vl_classifier.errors import ImageError, QueueFullError
from qwen_vl_classifier.serving.memory import ByteBudget, PictureShare


def test_bytes_of_all_are_bounded_and_given_back() -> None:
    budget = ByteBudget(100)
    with budget.hold(60):
        with pytest.raises(QueueFullError, match="hold 60 bytes and 41 more came; wanted at most 100"), budget.hold(41):
            pass
        with budget.hold(40):
            assert budget.held == 100
    assert budget.held == 0


def test_a_request_has_half_of_it_at_most_and_gives_it_back_in_the_end() -> None:
    budget = ByteBudget(100)
    with PictureShare(budget) as share:
        share.take(30)
        share.take(20)
        with pytest.raises(ImageError, match="more memory than one request may have") as caught:
            share.take(1)
        assert caught.value.code == "image_too_large"
        share.release(20)
        share.take(10)
        assert budget.held == 40
    assert budget.held == 0


def test_what_would_fit_another_time_is_no_fault_of_the_pictures() -> None:
    budget = ByteBudget(100)
    with budget.hold(80), PictureShare(budget) as share, pytest.raises(QueueFullError):
        share.take(30)
    assert budget.held == 0
