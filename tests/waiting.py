"""Waiting for conditions, with one limit for the whole suite: `pytest --wait-limit SECONDS`.

A test waits until something is the case, never for a number of seconds that a quiet machine needs. The limit only ends
a wait for something that will never come, so it is far longer than any machine needs. A limit that is itself the
subject of a test takes a clock that the test moves.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

VARIABLE = "TEST_WAIT_LIMIT"
"""The environment variable by which the option reaches this file, and processes that tests start."""

LIMIT = float(os.environ.get(VARIABLE, "300"))
"""Seconds after which a wait is given up."""

_TICK = 0.005  # seconds between looks


def until(condition: Callable[[], T], what: str = "a condition") -> T:
    """Wait until a condition holds, and return what it returned."""
    end = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {LIMIT:g} s in vain for {what}"
        time.sleep(_TICK)
    return found


async def soon(condition: Callable[[], T], what: str = "a condition") -> T:
    """Wait until a condition holds while the event loop goes on, and return what it returned."""
    end = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {LIMIT:g} s in vain for {what}"
        await asyncio.sleep(_TICK)
    return found


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop, and give up after the limit, however a test moves the loop's clock."""

    async def limited() -> T:
        task = asyncio.current_task()
        assert task is not None
        timer = threading.Timer(LIMIT, asyncio.get_running_loop().call_soon_threadsafe, [task.cancel])
        timer.daemon = True
        timer.start()
        try:
            return await work
        finally:
            timer.cancel()

    return asyncio.run(limited())
