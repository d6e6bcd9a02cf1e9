"""How many requests are here, and whether one more would be done in time: known before anything of it is read."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator

from qwen_vl_classifier.errors import QueueFullError
from qwen_vl_classifier.serving.pace import Pace

_AT_THE_DOOR = 0.7
"""Of the seconds that a request has, so much counts here: the door is narrower than what comes after it, so that few
are let in and sent away when the work turns out slower."""


class Places:
    """Places of requests, from before their body is read until they are answered.

    Args:
        most: How many there are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._pace = Pace()  # for each request

    @contextlib.contextmanager
    def take(self, seconds: float) -> Iterator[None]:
        """Hold a place until the context ends.

        Args:
            seconds: Until the deadline of a request that comes now.

        Raises:
            QueueFullError: All are taken, or one more request would hardly be done in time. One that is alone is
                tried whatever it costs.
        """
        if self._taken >= self._most:
            raise self._refusal("wanted at most that many")
        if self._taken and self._pace.too_slow(self._taken + 1, _AT_THE_DOOR * seconds):
            raise self._refusal(f"one more would hardly be done in {seconds:.3g} s")
        if not self._taken:
            self._pace.start(asyncio.get_running_loop().time())
        self._taken += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._taken -= 1
            if not self._taken:
                self._empty.set()

    def scored(self) -> None:
        """Take down that a request was scored: its pace is that of those that will come."""
        self._pace.done(asyncio.get_running_loop().time(), 1)

    async def wait_until_empty(self) -> None:
        """Return when no place is taken."""
        await self._empty.wait()

    def _refusal(self, why: str) -> QueueFullError:
        retry_after = max(1, math.ceil(self._pace.seconds(self._taken)))
        return QueueFullError(f"{self._taken} requests are here; {why}; try again later", retry_after=retry_after)
