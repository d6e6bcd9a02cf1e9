"""What the tests of the batcher share: a scorer that can be held shut, and an observer."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

from qwen_vl_classifier.serving.batcher import Batcher, SplitReason
from qwen_vl_classifier.serving.worker import Worker
from tests.serving.clock import FOREVER, after


class BatcherOf:
    """A batcher for one function, with a worker of its own unless it shares one."""

    def __init__(
        self,
        score: Callable[[list[Any]], Any],
        *,
        observer: Notes | None = None,
        worker: Worker | None = None,
        **limits: Any,
    ) -> None:
        self._score = score
        self._worker = worker or Worker("batcher")
        self.batcher: Batcher[Any, Any] = Batcher(
            self._worker, observer or Notes(), **{"max_batch": 8, "max_cost": 1_000_000, **limits}
        )

    @property
    def waiting(self) -> int:
        return self.batcher.waiting

    def sharing(self, score: Callable[[list[Any]], Any]) -> BatcherOf:
        """Return another view of the same batcher, for another function."""
        other = copy.copy(self)
        other._score = score
        return other

    async def submit_all(self, items: Sequence[Any], deadline: float, costs: Sequence[int] | None = None) -> list[Any]:
        return await self.batcher.submit(self._score, items, costs or [1] * len(items), deadline)

    async def submit(self, item: Any, deadline: float, cost: int = 1) -> Any:
        (outcome,) = await self.submit_all([item], deadline, [cost])
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def close(self) -> None:
        await self.batcher.close()
        self._worker.stop()


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


async def held(scorer: Scorer, batcher: BatcherOf) -> asyncio.Task[Any]:
    """Submit an item that stays in the scorer until its gate opens, so that all later ones wait."""
    task = asyncio.create_task(batcher.submit(0, after(FOREVER)))
    await asyncio.to_thread(scorer.entered.wait)
    return task
