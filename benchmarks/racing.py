"""Time several ways of doing the same work against each other."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one contender, one for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)


def race(contenders: Mapping[str, Callable[[], object]], repeats: int, *, within: float = math.inf) -> dict[str, Times]:
    """Time contenders in turn: A B C, A B C, ..., after one round that is not counted.

    Turns make whatever else the machine does fall on all alike, so that their ratio holds where their times do not.

    Args:
        contenders: What to time.
        repeats: Rounds that count, at most.
        within: Seconds after which no further round begins, once one has counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    until = time.perf_counter() + within
    for number in range(repeats + 1):
        if number > 1 and time.perf_counter() > until:
            break
        for name, contender in contenders.items():
            taken = timed(contender)
            if number:
                seconds[name].append(taken)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes, up to the last kernel of a GPU."""
    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    """Wait until a GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
