"""Many waiting callers -> few calls of a function that works on batches; knows neither HTTP nor torch.

An event loop takes items in, and one thread scores them: while a batch is being scored the next one gathers, so
batches grow with the load and nobody waits for a timer. Three promises hold whatever `score` does: every accepted
item gets its result or an exception, at its deadline at the latest; an item that fails takes no neighbour with it;
and a call of `score` that never returns keeps neither a caller nor the process.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

from qwen_vl_classifier.errors import ClosedError, DeadlineError, QueueFullError

Item = TypeVar("Item")
Result = TypeVar("Result")

_NEWEST = 0.2  # weight of the newest batch in the running mean of seconds per item


class Batcher(Generic[Item, Result]):
    """Score items of many callers together.

    Args:
        score: Takes a sequence of items and returns one result for each, in order. It is called in a thread of
            its own, the same one for every call, and never by two callers at once.
        max_batch: Most items in one call.
        queue_size: Items that may wait, not counting those that are being scored.

    Example:
        >>> async def main() -> list[int]:
        ...     batcher = Batcher(lambda items: [item * item for item in items], max_batch=2, queue_size=8)
        ...     deadline = asyncio.get_running_loop().time() + 5
        ...     results = await asyncio.gather(*(batcher.submit(item, deadline) for item in range(4)))
        ...     await batcher.close()
        ...     return results
        >>> asyncio.run(main())
        [0, 1, 4, 9]
    """

    def __init__(self, score: Callable[[Sequence[Item]], Sequence[Result]], *, max_batch: int, queue_size: int) -> None:
        self._score = score
        self._max_batch = max_batch
        self._queue_size = queue_size
        self._waiting: OrderedDict[asyncio.Future[Result], Item] = OrderedDict()
        self._open: set[asyncio.Future[Result]] = set()  # accepted and not answered: waiting, or being scored
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread: _Thread[Item, Result] | None = None
        self._closing = False
        self._seconds_per_item = 0.0

    async def submit(self, item: Item, deadline: float) -> Result:
        """Wait for the result of one item.

        Args:
            item: What to score.
            deadline: Until when to wait, on the clock of the event loop (`loop.time()`).

        Raises:
            QueueFullError: Too many items wait already.
            DeadlineError: There was no result in time.
            ClosedError: The batcher is closing.
            Exception: What `score` raised over this item.
        """
        (outcome,) = await self.submit_all([item], deadline)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def submit_all(self, items: Sequence[Item], deadline: float) -> list[Result | BaseException]:
        """Wait for the results of several items that are accepted together or not at all.

        If the caller is cancelled, or the deadline passes, those that still wait leave the queue at once.

        Args:
            items: What to score.
            deadline: Until when to wait, on the clock of the event loop (`loop.time()`).

        Returns:
            For each item its result, or the exception that `score` raised over it.

        Raises:
            QueueFullError: Too many items wait already.
            DeadlineError: Not all results were there in time.
            ClosedError: The batcher is closing.
        """
        if self._closing:
            raise ClosedError("the batcher is closing; wanted to finish what it has; ask another server")
        if len(self._waiting) + len(items) > self._queue_size:
            raise QueueFullError(
                f"{len(self._waiting)} items wait and {len(items)} more came; "
                f"wanted at most {self._queue_size} in all; try again later",
                retry_after=max(1, math.ceil(self._seconds_per_item * len(self._open))),
            )
        loop = asyncio.get_running_loop()
        if deadline <= loop.time():
            raise DeadlineError("the deadline has passed already; try again")
        futures: list[asyncio.Future[Result]] = [loop.create_future() for _ in items]
        for item, future in zip(items, futures, strict=True):
            self._waiting[future] = item
            self._open.add(future)
            future.add_done_callback(self._forget)
        self._wake()
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.gather(*futures, return_exceptions=True)
        except TimeoutError:
            raise DeadlineError("no result before the deadline; try again, or with fewer items") from None

    async def close(self) -> None:
        """Take no more items, and return when all that were accepted are answered.

        Deadlines bound how long that takes. A call of `score` that still runs then is left behind.
        """
        self._closing = True
        try:
            while self._open:
                await asyncio.wait(self._open)
        finally:
            self._give_up()  # on what is open, if `close` itself was cancelled
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    def _forget(self, future: asyncio.Future[Result]) -> None:
        self._waiting.pop(future, None)
        self._open.discard(future)

    def _wake(self) -> None:
        if self._task is None or self._task.done():
            self._thread = _Thread(self._score)
            self._task = asyncio.get_running_loop().create_task(self._work(self._thread))
        self._arrived.set()

    async def _work(self, thread: _Thread[Item, Result]) -> None:
        try:
            while True:
                await self._arrived.wait()
                size = min(self._max_batch, len(self._waiting))
                if size:
                    await self._answer([self._waiting.popitem(last=False) for _ in range(size)], thread)
                else:
                    self._arrived.clear()
        finally:
            self._give_up()  # where the event loop ends without `close`

    def _give_up(self) -> None:
        for future in list(self._open):
            _fail(future, ClosedError("the batcher was closed before this was scored; try again"))
        if self._thread is not None:
            self._thread.stop()

    async def _answer(self, batch: list[tuple[asyncio.Future[Result], Item]], thread: _Thread[Item, Result]) -> None:
        """Score a batch; where that fails, its halves, down to the item that is to blame."""
        loop = asyncio.get_running_loop()
        parts = [batch]
        while parts:
            part = [(future, item) for future, item in parts.pop() if not future.done()]  # else its caller has gone
            if not part:
                continue
            started = loop.time()
            outcome = await thread.run([item for _, item in part])
            if not isinstance(outcome, Exception):
                pace = (loop.time() - started) / len(part)
                self._seconds_per_item += _NEWEST * (pace - self._seconds_per_item)
                for (future, _), result in zip(part, outcome, strict=True):
                    if not future.done():
                        future.set_result(result)
            elif len(part) == 1:
                _fail(part[0][0], outcome)
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]


_Outcome: TypeAlias = Sequence[Result] | Exception


class _Thread(Generic[Item, Result]):
    """One thread that calls `score` on one batch after the other.

    It is a daemon and not an executor's, because the interpreter waits for an executor's threads when it exits:
    one call that hangs would keep the process.
    """

    def __init__(self, score: Callable[[Sequence[Item]], Sequence[Result]]) -> None:
        self._score = score
        self._batches: queue.SimpleQueue[tuple[list[Item], asyncio.Future[_Outcome[Result]]] | None]
        self._batches = queue.SimpleQueue()
        threading.Thread(target=self._work, name="batcher", daemon=True).start()

    async def run(self, items: list[Item]) -> _Outcome[Result]:
        """Return what `score` returned or raised."""
        future: asyncio.Future[_Outcome[Result]] = asyncio.get_running_loop().create_future()
        self._batches.put((items, future))
        return await future

    def stop(self) -> None:
        """End the thread after the call that it is in."""
        self._batches.put(None)

    def _work(self) -> None:
        while (entry := self._batches.get()) is not None:
            items, future = entry
            outcome = self._outcome(items)
            try:
                future.get_loop().call_soon_threadsafe(_set, future, outcome)
            except RuntimeError:  # the event loop is closed: nobody is left to tell
                return
            del entry, items, future, outcome  # or they would stay in memory until the next batch

    def _outcome(self, items: list[Item]) -> _Outcome[Result]:
        try:
            results = list(self._score(items))
            if len(results) != len(items):
                raise RuntimeError(f"score returned {len(results)} results; wanted one for each of {len(items)}")
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                return error
            # A future refuses StopIteration; SystemExit and its like would end this thread, or the caller's loop.
            failure = RuntimeError(f"score raised {type(error).__name__}")
            failure.__cause__ = error
            return failure
        return results


def _set(future: asyncio.Future[_Outcome[Result]], outcome: _Outcome[Result]) -> None:
    if not future.done():
        future.set_result(outcome)


def _fail(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
