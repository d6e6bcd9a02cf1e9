"""Compute small problems on one thread each, and several of them side by side.

Threads that share an operation wait for each other at its end. Where operations are small, as for a few hundred rows,
that takes many times as long as the operation, above all on a busy machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_SMALL = 2**18  # numbers in a matrix of features

_lock = threading.Lock()  # torch has one number of threads for the whole process
_computing = 0  # computations that want one thread now
_threads = 1  # that torch had before the first of them


@contextmanager
def threads_for(rows: int, width: int) -> Iterator[int]:
    """Let torch use one thread if problems on a matrix of features are small.

    Args:
        rows: Of the matrix.
        width: Features in a row. No more than there are rows count: coefficients lie in the space of the rows.

    Yields:
        How many such problems to compute side by side.
    """
    global _computing, _threads
    if rows * min(rows, width) > _SMALL:
        yield 1
        return
    with _lock:
        if not _computing:
            _threads = torch.get_num_threads()
            torch.set_num_threads(1)
        _computing += 1
    try:
        yield _threads
    finally:
        with _lock:
            _computing -= 1
            if not _computing:
                torch.set_num_threads(_threads)


def side_by_side(compute: Callable[[Item], Result], items: Iterable[Item], number: int) -> Iterator[Result]:
    """Compute something for each item in several threads, and yield the results in the order of the items.

    Args:
        compute: What to compute for an item.
        items: The items.
        number: The number of threads.
    """
    if number == 1:
        yield from map(compute, items)
        return
    with ThreadPoolExecutor(number) as pool:
        try:
            yield from pool.map(compute, items)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
