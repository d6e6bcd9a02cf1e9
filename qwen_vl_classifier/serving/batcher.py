"""Many waiting callers -> few calls of a function that works on batches; knows neither HTTP nor torch.

An event loop takes items in, and one thread scores them: while a batch is being scored the next one gathers, so
batches grow with the load and nobody waits for a timer. Four promises hold whatever `score` does: every accepted
item gets its result or an exception, at its deadline at the latest; an item whose caller went away while it waited is
not scored; an item that fails takes no neighbour with it; and a call of `score` that never returns keeps neither a
caller nor the process.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

from qwen_vl_classifier.errors import ClosedError, DeadlineError, QueueFullError
from qwen_vl_classifier.serving.pace import Pace
from qwen_vl_classifier.serving.worker import Worker

Item = TypeVar("Item")
Result = TypeVar("Result")
SplitReason: TypeAlias = Literal["exception", "out_of_memory"]

_DEATHS = 3  # of the loop
_DEATHS_WITHIN = 60.0  # seconds

_log = logging.getLogger(__name__)


class BatchObserver(Protocol):
    """Told what happens, in the event loop; each method must be cheap."""

    def waited(self, seconds: float) -> None:
        """An item waited so long before it was first scored."""

    def scored(self, items: int, cost: int, seconds: float) -> None:
        """A call of `score` returned."""

    def split(self, reason: SplitReason) -> None:
        """A call of `score` failed, and its halves are tried."""

    def cancelled(self, count: int) -> None:
        """So many items left the queue because their caller went away."""

    def depth(self, waiting: int, running: int) -> None:
        """So many items wait and so many are being scored."""


class Batcher(Generic[Item, Result]):
    """Score items of many callers together.

    Args:
        score: Takes a list of items and returns one result for each, in order. It is called in the worker's thread.
        max_batch: Most items in one call.
        max_cost: Most that the items of one call cost together; an item that costs more is scored alone.
        queue_size: Items that may wait, not counting those that are being scored.
        max_seconds: Most that one call may be expected to take, by the pace of those before it, unless its first item
            alone takes longer: whoever comes meanwhile waits for it.
        observer: Told what happens.
        on_death: Called in the event loop when the loop that makes batches failed by itself, and not in `score`, three
            times within a minute. Once or twice it goes on with what waits; then nothing is taken any more.
        worker: Where to score, shared with others who score on the same device; `None` has one of its own.

    Example:
        >>> async def main() -> list[int]:
        ...     batcher = Batcher(lambda items: [item * item for item in items], max_batch=2, max_cost=10, queue_size=8)
        ...     deadline = asyncio.get_running_loop().time() + 5
        ...     results = await batcher.submit_all([1, 2, 3], [1, 1, 1], deadline)
        ...     await batcher.close()
        ...     return results
        >>> asyncio.run(main())
        [1, 4, 9]
    """

    def __init__(
        self,
        score: Callable[[list[Item]], Sequence[Result]],
        *,
        max_batch: int,
        max_cost: int,
        queue_size: int,
        max_seconds: float = math.inf,
        observer: BatchObserver | None = None,
        on_death: Callable[[BaseException], None] | None = None,
        worker: Worker | None = None,
    ) -> None:
        self._score = score
        self._max_batch = max_batch
        self._max_cost = max_cost
        self._max_seconds = max_seconds
        self._queue_size = queue_size
        self._observer = observer or _Nobody()
        self._on_death = on_death
        self._worker = worker or Worker("batcher")
        self._owns_worker = worker is None
        self._waiting: OrderedDict[_Entry[Item, Result], None] = OrderedDict()
        self._running: list[_Entry[Item, Result]] = []
        self._open_cost = 0  # of what waits or is being scored
        self._callers: set[asyncio.Future[None]] = set()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = ""  # why nothing is taken any more
        self._deaths: deque[float] = deque(maxlen=_DEATHS)
        self._longest = 0.0  # seconds that any caller was ready to wait
        self._progress = 0.0  # when something was last taken up or finished, on the loop's clock
        self._pace = Pace()  # for each unit of cost

    async def submit_all(
        self, items: Sequence[Item], costs: Sequence[int], deadline: float
    ) -> list[Result | BaseException]:
        """Wait for the results of several items that are accepted together or not at all.

        If the caller is cancelled, or the deadline passes, those that still wait leave the queue at once.

        Args:
            items: What to score.
            costs: What each costs, in any unit.
            deadline: Until when to wait, on the clock of the event loop (`loop.time()`).

        Returns:
            For each item its result, or the exception that `score` raised over it.

        Raises:
            QueueFullError: Too many items wait already, or so many that these would hardly be done in time.
            DeadlineError: Not all results were there in time.
            ClosedError: The batcher takes nothing any more.
        """
        if self._closed:
            raise ClosedError(self._closed)
        if not items:
            return []
        loop = asyncio.get_running_loop()
        now = loop.time()
        if deadline <= now:
            raise DeadlineError("the deadline has passed already; try again")
        refusal = self.refusal(len(items), sum(costs), deadline - now)
        if refusal is not None:
            raise refusal
        if not self._open_cost:
            self._progress = now
            self._pace.start(now)
        self._longest = max(self._longest, deadline - now)
        caller = _Caller[Result](loop.create_future(), deadline, len(items))
        entries = [
            _Entry(item, cost, caller, number, now)
            for number, (item, cost) in enumerate(zip(items, costs, strict=True))
        ]
        self._waiting.update(dict.fromkeys(entries))
        self._open_cost += sum(costs)
        self._callers.add(caller.done)
        self._tell_depth()
        self._wake()
        try:
            async with asyncio.timeout_at(deadline):
                await caller.done
        except TimeoutError:
            raise DeadlineError("no result before the deadline; try again, or with fewer items") from None
        except asyncio.CancelledError:
            self._observer.cancelled(sum(entry in self._waiting for entry in entries))
            raise
        finally:
            self._callers.discard(caller.done)
            self._drop(entries)
        return caller.outcomes

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._waiting)

    @property
    def retry_after(self) -> int:
        """Whole seconds, at least 1, in which all that was accepted will be done, by the pace of the latest batches."""
        return max(1, math.ceil(self._pace.seconds(self._open_cost)))

    @property
    def heartbeat(self) -> float:
        """Seconds since the loop was last well: 0 while nothing waits, or the pass that runs may still be of use.

        A pass that takes longer than any caller was ever ready to wait is of none: from then on this grows.
        """
        if not (self._waiting or self._running):
            return 0.0
        return max(0.0, asyncio.get_running_loop().time() - self._progress - self._longest)

    def refusal(self, count: int, cost: int, seconds: float) -> QueueFullError | None:
        """Say why items would not be accepted now, if they would not.

        Args:
            count: How many they are.
            cost: What they cost together.
            seconds: Until their deadline.
        """
        if len(self._waiting) + count > self._queue_size:
            why = f"{len(self._waiting)} items wait and {count} more came; wanted at most {self._queue_size} in all"
        # What is alone is tried whatever it costs: it would not be cheaper later.
        elif self._open_cost and self._pace.too_slow(self._open_cost + cost, seconds):
            why = f"{count} items came that would hardly be scored in {seconds:.3g} s, after those that wait"
        else:
            return None
        return QueueFullError(f"{why}; try again later", retry_after=self.retry_after)

    async def close(self) -> None:
        """Take no more items, and return when all that were accepted are answered.

        Deadlines bound how long that takes. A call of `score` that still runs then is left behind.
        """
        self._closed = self._closed or "the batcher is closing; wanted to finish what it has; ask another server"
        try:
            while self._callers:
                await asyncio.wait(self._callers)
        finally:
            self._give_up(ClosedError("the batcher was closed before this was scored; try again"))
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    def _wake(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())
            self._task.add_done_callback(self._restart)
        self._arrived.set()

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            if self._waiting:
                async with self._worker.turn:  # what comes or goes until then is looked at
                    self._take()
                    await self._answer()
                    self._finish()
            else:
                self._arrived.clear()

    def _take(self) -> None:
        """Take the next batch out of the queue."""
        now = self._progress = asyncio.get_running_loop().time()
        cost = 0
        for entry in list(self._waiting):
            late = entry.caller.deadline <= now  # its caller is about to be told
            if self._running and not late and self._is_full(cost + entry.cost):
                break
            del self._waiting[entry]
            if late:
                self._open_cost -= entry.cost
                continue
            self._running.append(entry)
            cost += entry.cost
            self._observer.waited(now - entry.since)
        self._tell_depth()

    def _is_full(self, cost: int) -> bool:
        """Tell whether the batch that is being put together has no room for an item that would make it cost so much."""
        too_long = self._pace.seconds(cost) > self._max_seconds
        return len(self._running) == self._max_batch or cost > self._max_cost or too_long

    async def _answer(self) -> None:
        """Score the batch; where that fails, its halves, down to the item that is to blame."""
        loop = asyncio.get_running_loop()
        parts = [self._running]
        while parts:
            part = [entry for entry in parts.pop() if not entry.caller.done.done()]  # else its caller has gone
            if not part:
                continue
            self._progress = loop.time()
            try:
                results = await self._worker.run(self._checked_score, [entry.item for entry in part])
            except Exception as error:
                if len(part) == 1:
                    part[0].caller.settle(part[0].number, error)
                else:
                    self._observer.split("out_of_memory" if isinstance(error, MemoryError) else "exception")
                    middle = len(part) // 2
                    parts += [part[middle:], part[:middle]]
            else:
                seconds = loop.time() - self._progress
                self._observer.scored(len(part), sum(entry.cost for entry in part), seconds)
                for entry, result in zip(part, results, strict=True):
                    entry.caller.settle(entry.number, result)

    def _checked_score(self, items: list[Item]) -> list[Result]:
        results = list(self._score(items))
        if len(results) != len(items):
            raise RuntimeError(f"score returned {len(results)} results; wanted one for each of {len(items)}")
        return results

    def _finish(self) -> None:
        """Put the batch away that has been answered, and learn the pace from it."""
        now = asyncio.get_running_loop().time()
        cost = sum(entry.cost for entry in self._running)
        self._pace.done(now, cost)
        self._progress = now
        self._running = []
        self._open_cost -= cost
        self._tell_depth()

    def _drop(self, entries: Sequence[_Entry[Item, Result]]) -> None:
        """Take what still waits out of the queue."""
        dropped = [entry for entry in entries if entry in self._waiting]
        for entry in dropped:
            del self._waiting[entry]
        if dropped:
            self._open_cost -= sum(entry.cost for entry in dropped)
            self._tell_depth()

    def _tell_depth(self) -> None:
        self._observer.depth(len(self._waiting), len(self._running))

    def _restart(self, task: asyncio.Task[None]) -> None:
        """Go on after the loop has ended: by a defect, or with the event loop."""
        if task.cancelled():
            self._closed = self._closed or "the batcher was closed; ask another server"
            self._give_up(ClosedError("the batcher was closed before this was scored; try again"))
            return
        error = task.exception()
        assert error is not None
        _log.error("the loop that makes batches failed", exc_info=error)
        now = task.get_loop().time()
        self._deaths.append(now)
        for entry in self._running:
            entry.caller.settle(entry.number, error)
        self._running = []
        self._open_cost = sum(entry.cost for entry in self._waiting)
        if len(self._deaths) == _DEATHS and now - self._deaths[0] <= _DEATHS_WITHIN:
            self._closed = "the server failed; ask another one"
            self._give_up(error)
            if self._on_death is not None:
                self._on_death(error)
        else:
            self._task = None
            self._wake()

    def _give_up(self, error: BaseException) -> None:
        for done in list(self._callers):
            if not done.done():
                done.set_exception(error)
        if self._owns_worker:
            self._worker.stop()


@dataclass(slots=True, eq=False)
class _Caller(Generic[Result]):
    """One call of `submit_all`: it is done when all its items have an outcome, or it has gone."""

    done: asyncio.Future[None]
    deadline: float
    left: int
    outcomes: list[Result | BaseException]

    def __init__(self, done: asyncio.Future[None], deadline: float, count: int) -> None:
        self.done = done
        self.deadline = deadline
        self.left = count
        self.outcomes = [ClosedError("no outcome")] * count

    def settle(self, number: int, outcome: Result | BaseException) -> None:
        self.outcomes[number] = outcome
        self.left -= 1
        if not self.left and not self.done.done():
            self.done.set_result(None)


@dataclass(slots=True, eq=False)
class _Entry(Generic[Item, Result]):
    """One item: which of its caller's, and since when it waits."""

    item: Item
    cost: int
    caller: _Caller[Result]
    number: int
    since: float


class _Nobody:
    """An observer that looks away."""

    def waited(self, seconds: float) -> None: ...
    def scored(self, items: int, cost: int, seconds: float) -> None: ...
    def split(self, reason: SplitReason) -> None: ...
    def cancelled(self, count: int) -> None: ...
    def depth(self, waiting: int, running: int) -> None: ...
