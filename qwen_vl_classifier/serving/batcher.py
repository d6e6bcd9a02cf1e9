"""Collect the items of many callers into batches for one function; independent of HTTP and torch.

An event loop takes items in, and one thread scores them: while a batch is being scored the next one gathers, so
batches grow with the load and nobody waits for a timer. Requests have fair shares of batches by the cost of their
items: one with few items does not wait for all of one with many. Four promises hold whatever the function does: every
accepted item gets its result or an exception, at its deadline at the latest; an item whose caller went away while it
waited is not scored; an item that fails takes no neighbour with it; and a call that never returns keeps neither a
caller nor the process. Whether items are accepted at all is decided by `Admission`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

from qwen_vl_classifier.errors import ClosedError, DeadlineError
from qwen_vl_classifier.serving.fair_queue import FairQueue, Share, Work
from qwen_vl_classifier.serving.worker import Worker

T = TypeVar("T")
Result = TypeVar("Result")
SplitReason: TypeAlias = Literal["exception", "out_of_memory"]

_log = logging.getLogger(__name__)


class BatchObserver(Protocol):
    """Observe the batcher, in the event loop; each method must be cheap."""

    def waited(self, seconds: float) -> None:
        """Record how long an item waited before it was first scored."""

    def scored(self, items: int, cost: float, seconds: float) -> None:
        """Record a call that returned."""

    def split(self, reason: SplitReason) -> None:
        """Record that a call failed and its halves are tried."""

    def cancelled(self, count: int) -> None:
        """Record items that left the queue because their caller went away."""

    def depth(self, waiting: int, running: int) -> None:
        """Record how many items wait and how many are being scored."""


class Batcher(Generic[T, Result]):
    """Score items of many callers together.

    Args:
        worker: The thread in which batches are scored, shared with others who use the same device.
        observer: Told what happens.
        max_batch: Most items in one call.
        max_cost: Most that the items of one call cost together; an item that costs more is scored alone.
        max_seconds: Most that one call may be expected to take, by the rate of those before it, unless its first item
            alone takes longer: whoever comes meanwhile waits for it.
        on_failure: Called in the event loop when the loop that makes batches ends by a defect of its own.

    Attributes:
        queue: What waits and is being scored.
    """

    def __init__(
        self,
        worker: Worker,
        observer: BatchObserver,
        *,
        max_batch: int,
        max_cost: int,
        max_seconds: float = math.inf,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.queue: FairQueue[_Entry[T, Result]] = FairQueue()
        self._worker = worker
        self._observer = observer
        self._max_batch = max_batch
        self._max_cost = max_cost
        self._max_seconds = max_seconds
        self._on_failure = on_failure
        self._running = 0
        self._callers = 0
        self._idle = asyncio.Event()  # no caller waits
        self._idle.set()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def submit(
        self,
        score: Callable[[list[T]], Sequence[Result]],
        items: Sequence[T],
        costs: Sequence[int],
        deadline: float,
        share: Share | None = None,
    ) -> list[Result | BaseException]:
        """Wait for the results of several items.

        If the caller is cancelled, or the deadline passes, those that still wait leave the queue at once.

        Args:
            score: Takes a list of items and returns one result for each, in order. It is called in the worker's
                thread; items that are submitted with the same function share calls.
            items: What to score.
            costs: What each costs, in any unit.
            deadline: Until when to wait, on the clock of the event loop (`loop.time()`).
            share: That of the request whose items they are; by default they are a request of their own.

        Returns:
            For each item its result, or the exception that `score` raised over it.

        Raises:
            DeadlineError: Not all results were there in time.
            ClosedError: The batcher takes nothing any more.
        """
        if self._closed:
            raise ClosedError("the server is shutting down; send this to another one")
        if not items:
            return []
        loop = asyncio.get_running_loop()
        if deadline <= loop.time():
            raise DeadlineError("the deadline has passed already; try again")
        share = share or Share()
        works = [
            self.queue.add(share, _Entry(score, item, loop.time(), loop.create_future()), cost)
            for item, cost in zip(items, costs, strict=True)
        ]
        entries = [work.item for work in works]
        self._wake()
        self._count_callers(1)
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.wait([entry.outcome for entry in entries])
        except TimeoutError:
            raise DeadlineError("no result before the deadline; try again, or with fewer items") from None
        except asyncio.CancelledError:
            self._observer.cancelled(sum(work.waits for work in works))
            raise
        finally:
            self._count_callers(-1)
            self._forget(works)
        return [entry.outcome.exception() or entry.outcome.result() for entry in entries]

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self.queue)

    @property
    def oldest(self) -> float:
        """When the item that waits longest was submitted, on the event loop's clock; infinity if none waits."""
        return min((work.item.since for work in self.queue.firsts()), default=math.inf)

    @property
    def most_cost(self) -> int:
        """The most that the items of a call may cost together now, by `max_cost` and `max_seconds`."""
        seconds = self.queue.seconds_for(1)
        return int(min(self._max_cost, self._max_seconds / seconds)) if seconds else self._max_cost

    async def close(self) -> None:
        """Accept no more items, and return when all accepted ones are answered.

        Deadlines bound how long that takes. If this is cancelled, callers get a `ClosedError`; a call of the function
        that still runs then is left behind.
        """
        self._closed = True
        try:
            await self._idle.wait()
        finally:
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    def _wake(self) -> None:
        self._observe_depth()
        self._arrived.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())
            self._task.add_done_callback(self._check_end)

    def _check_end(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        _log.critical("the loop that makes batches failed", exc_info=error)
        if self._on_failure is not None:
            self._on_failure(error)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        batch: list[Work[_Entry[T, Result]]] = []
        try:
            while True:
                await self._arrived.wait()
                async with self._worker.turn:  # what comes or goes until then is looked at
                    batch, began = self._take(), loop.time()
                    try:
                        await self._score(batch)
                    except Exception as error:  # a defect, here or in the observer
                        _log.exception("a batch failed outside the model")
                        _settle(batch, error)
                    if batch:
                        self.queue.finish(batch, loop.time() - began)
                    self._running, batch = 0, []
                    self._observe_depth()
        finally:
            left = [*batch, *self.queue.in_order()]
            _settle(left, ClosedError("the server shut down before this was scored; try again"))

    def _take(self) -> list[Work[_Entry[T, Result]]]:
        """Take the next batch out of the queue; it is empty if nothing waits any more."""
        batch: list[Work[_Entry[T, Result]]] = []
        cost = 0.0
        for work in self.queue.in_order():
            if batch and work.item.score != batch[0].item.score:
                continue
            cost += work.cost
            if batch and self._is_too_much(len(batch) + 1, cost):
                break
            batch.append(work)
        for work in batch:
            self.queue.take(work)
        self._clear_if_empty()
        self._running = len(batch)
        return batch

    def _is_too_much(self, count: int, cost: float) -> bool:
        return count > self._max_batch or cost > self.most_cost

    async def _score(self, batch: list[Work[_Entry[T, Result]]]) -> None:
        """Score a batch; where that fails, its halves, down to the item that is to blame."""
        loop = asyncio.get_running_loop()
        self._observe_depth()
        for work in batch:
            self._observer.waited(loop.time() - work.item.since)
        parts = [batch]
        while parts:
            part = [work for work in parts.pop() if not work.item.outcome.done()]  # else its caller has gone
            if not part:
                continue
            started = loop.time()
            try:
                results = await self._worker.run(_checked, part[0].item.score, [work.item.item for work in part])
            except Exception as error:
                if len(part) == 1:
                    _settle(part, error)
                else:
                    self._observer.split("out_of_memory" if isinstance(error, MemoryError) else "exception")
                    middle = len(part) // 2
                    parts += [part[middle:], part[:middle]]
            else:
                self._observer.scored(len(part), sum(work.cost for work in part), loop.time() - started)
                for work, result in zip(part, results, strict=True):
                    if not work.item.outcome.done():
                        work.item.outcome.set_result(result)

    def _forget(self, works: Sequence[Work[_Entry[T, Result]]]) -> None:
        """Take what still waits out of the queue; nobody asks for an outcome that comes later."""
        for work in works:
            if work.waits:
                self.queue.drop(work)
            outcome = work.item.outcome
            if not outcome.cancel():
                outcome.exception()  # has been looked at
        self._clear_if_empty()
        self._observe_depth()

    def _clear_if_empty(self) -> None:
        if not len(self.queue):
            self._arrived.clear()

    def _observe_depth(self) -> None:
        self._observer.depth(len(self.queue), self._running)

    def _count_callers(self, change: int) -> None:
        self._callers += change
        if self._callers:
            self._idle.clear()
        else:
            self._idle.set()


@dataclass(slots=True, eq=False)
class _Entry(Generic[T, Result]):
    """One item, with the function that scores it, since when it waits, and what becomes of it."""

    score: Callable[[list[T]], Sequence[Result]]
    item: T
    since: float
    outcome: asyncio.Future[Result]


def _settle(works: Sequence[Work[_Entry[T, Result]]], error: Exception) -> None:
    """Give an error to all items that have no outcome yet."""
    for work in works:
        if not work.item.outcome.done():
            work.item.outcome.set_exception(error)


def _checked(score: Callable[[list[T]], Sequence[Result]], items: list[T]) -> list[Result]:
    results = list(score(items))
    if len(results) != len(items):
        raise RuntimeError(f"score returned {len(results)} results; expected one for each of {len(items)}")
    return results
