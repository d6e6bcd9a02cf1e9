"""Small problems are computed on one thread each, and torch has its threads back afterwards."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qwen_vl_classifier.training.probe.threads import side_by_side, threads_for


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "width", "small"), [(240, 2048, True), (5000, 50, True), (5000, 2048, False)])
def test_small_problems_take_one_thread_and_are_solved_side_by_side(rows, width, small):
    with threads_for(rows, width) as at_once:
        assert torch.get_num_threads() == (1 if small else 3)
        assert at_once == (3 if small else 1)
    assert torch.get_num_threads() == 3


def test_the_last_of_several_computations_gives_the_threads_back():
    both, first_left = threading.Barrier(2), threading.Event()

    def compute(number: int) -> int:
        with threads_for(10, 10) as at_once:
            both.wait()
            if number:
                first_left.wait()
                seen = torch.get_num_threads()
        if not number:
            seen = 1
            first_left.set()
        return seen * at_once

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(compute, range(2))) == [3, 3]
    assert torch.get_num_threads() == 3


def test_threads_are_given_back_after_an_error():
    with pytest.raises(ValueError, match="astray"), threads_for(10, 10):
        raise ValueError("astray")
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("number", [1, 3])
class TestSideBySide:
    def test_results_come_in_order(self, number):
        assert list(side_by_side(lambda item: item**2, range(20), number)) == [item**2 for item in range(20)]

    def test_no_more_run_than_were_allowed(self, number):
        running, most = [0], [0]
        lock = threading.Lock()

        def compute(_item: int) -> None:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            with lock:
                running[0] -= 1

        list(side_by_side(compute, range(200), number))
        assert 1 <= most[0] <= number

    def test_an_error_ends_it(self, number):
        done = []

        def compute(item: int) -> None:
            if item == 2:
                raise ValueError("astray")
            done.append(item)

        with pytest.raises(ValueError, match="astray"):
            list(side_by_side(compute, range(1000), number))
        assert len(done) < 1000
