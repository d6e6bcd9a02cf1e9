"""How fast work gets done, as far as it was seen lately."""

from __future__ import annotations

_MEMORY = 0.9  # how much of what is known a further piece of work leaves
_LATEST = 0.8  # share of the time until its deadline that work may be expected to take


class Pace:
    """Seconds for each unit of work, measured while there is some: pieces side by side, and waiting, belong to it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._amount = 0.0
        self._since = 0.0

    def start(self, now: float) -> None:
        """Take down that work has come where there was none."""
        self._since = now

    def done(self, now: float, amount: float) -> None:
        """Take down that work is done, the first since the last or since the start."""
        self._seconds = self._seconds * _MEMORY + now - self._since
        self._amount = self._amount * _MEMORY + amount
        self._since = now

    def seconds(self, amount: float) -> float:
        """Return how long work will probably take; 0 as long as nothing is known."""
        return self._seconds / self._amount * amount if self._amount else 0.0

    def too_slow(self, amount: float, seconds: float) -> bool:
        """Tell whether work would hardly be done in so many seconds."""
        return self.seconds(amount) > _LATEST * seconds
