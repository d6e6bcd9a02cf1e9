"""A clock that tests move."""

from __future__ import annotations

import asyncio

from tests.waiting import LIMIT

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


def after(seconds: float) -> float:
    """Return a time on the event loop's clock."""
    return asyncio.get_running_loop().time() + seconds
