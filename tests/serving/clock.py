"""A clock that tests move, and coroutines that run under it.

`tests.waiting.run` measures its limit on the event loop's clock, which is the one that moves here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from tests.waiting import LIMIT

T = TypeVar("T")

AGE = LIMIT
"""Seconds that no test lasts by itself: where the clock is moved by some of them, what the machine takes is less."""

FOREVER = 1e6 * AGE
"""Seconds that only a test which moves the clock could let pass."""

PATIENT = {"deadline": FOREVER, "header_timeout": FOREVER, "body_timeout": FOREVER, "decode_timeout": LIMIT}
"""Options of `ServeConfig` for servers whose limits nobody meets by being slow."""


class Clock:
    """The running event loop's clock, which can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0
        loop = asyncio.get_running_loop()
        time = loop.time
        loop.time = lambda: time() + self.ahead  # type: ignore[method-assign]


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop, and give up after the limit, however its clock is moved."""

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


def after(seconds: float) -> float:
    """Return a time on the event loop's clock."""
    return asyncio.get_running_loop().time() + seconds
