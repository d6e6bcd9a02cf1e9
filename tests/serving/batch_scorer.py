"""What the tests of the batcher share: a scorer that can be held shut, and an observer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

from qwen_vl_classifier.serving.batcher import Batcher, SplitReason
from tests.serving.clock import FOREVER, after


def batcher_of(score: Callable[[list[Any]], Any], **options: Any) -> Batcher[Any, Any]:
    return Batcher(score, **{"max_batch": 8, "max_cost": 1e9, "queue_size": 8, **options})


async def submit(batcher: Batcher[Any, Any], item: Any, deadline: float, cost: float = 1.0) -> Any:
    (outcome,) = await batcher.submit_all([item], [cost], deadline)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def submit_all(batcher: Batcher[Any, Any], items: Sequence[Any], deadline: float) -> list[Any]:
    return await batcher.submit_all(items, [1.0] * len(items), deadline)


class Scorer:
    """Squares numbers; raises what it is given; can be held shut."""

    def __init__(self, *, shut: bool = False) -> None:
        self.calls: list[list[Any]] = []
        self.threads: set[int] = set()
        self.running = 0
        self.entered = threading.Event()
        self.gate = threading.Event()
        if not shut:
            self.gate.set()

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        self.running += 1
        assert self.running == 1, "two calls at once"
        self.calls.append(list(items))
        self.threads.add(threading.get_ident())
        self.entered.set()
        self.gate.wait()
        self.running -= 1
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return [item * item for item in items]

    @property
    def seen(self) -> list[Any]:
        return [item for call in self.calls for item in call]


async def settle() -> None:
    """Let all tasks come as far as they can without threads or time: a sleep would be a guess about the machine."""
    for _ in range(50):
        await asyncio.sleep(0)


class Notes:
    """An observer that writes down what it is told, and can be made to fail."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.failures: list[BaseException] = []
        self.depths: list[tuple[int, int]] = []

    def waited(self, seconds: float) -> None:
        if self.failures:
            raise self.failures.pop()

    def scored(self, items: int, cost: float, seconds: float) -> None:
        self.told.append(("scored", items, cost))

    def split(self, reason: SplitReason) -> None:
        self.told.append(("split", reason))

    def cancelled(self, count: int) -> None:
        self.told.append(("cancelled", count))

    def depth(self, waiting: int, running: int) -> None:
        self.depths.append((waiting, running))


async def held(scorer: Scorer, batcher: Batcher[Any, Any]) -> asyncio.Task[Any]:
    """Submit an item that stays in the scorer until its gate opens, so that all later ones wait."""
    task = asyncio.create_task(submit(batcher, 0, after(FOREVER)))
    await asyncio.to_thread(scorer.entered.wait)
    return task
