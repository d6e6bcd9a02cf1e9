"""The work that a stage has accepted and not finished, and how long it will take."""

from __future__ import annotations

import asyncio

_MEMORY = 0.9  # weight of all earlier measurements when a new one comes


class Backlog:
    """Work that waits or is being done in one stage, with the rate at which the stage gets it done.

    The rate is measured only while the stage has work of its own, so that the time between arrivals, or the time that
    a slow client takes to send a body, never counts as work.

    Attributes:
        cost: Of all work that waits or is being done, in the unit of the stage.
    """

    def __init__(self) -> None:
        self.cost = 0
        self._since = 0.0
        self._measured_seconds = 0.0
        self._measured_cost = 0.0

    def add(self, cost: int) -> None:
        """Accept work."""
        if not self.cost:
            self._since = asyncio.get_running_loop().time()
        self.cost += cost

    def drop(self, cost: int) -> None:
        """Give up work that was accepted and not done."""
        self.cost -= cost

    def finish(self, cost: int) -> None:
        """Record that work is done, and learn the rate from the time since the last work was done or the first came."""
        now = asyncio.get_running_loop().time()
        self._measured_seconds = self._measured_seconds * _MEMORY + now - self._since
        self._measured_cost = self._measured_cost * _MEMORY + cost
        self._since = now
        self.cost -= cost

    def seconds_for(self, cost: int) -> float:
        """Return the seconds that work of such a cost takes at the measured rate; 0 as long as none is measured."""
        return self._measured_seconds / self._measured_cost * cost if self._measured_cost else 0.0
