"""Work of many requests in one stage of the server: what goes next, and how long it takes.

Requests have equal shares of a stage, by cost and not by number, in the order of self-clocked fair queueing (S. J.
Golestani, "A self-clocked fair queueing scheme for broadband applications", IEEE INFOCOM 1994): a piece of work is due
when its request has had all that it had before, and this work too; what is due first goes first. A request that comes
begins at the time at which the work taken last was due. So it waits for as much work of each other request as it has
itself, not for all that they have queued, and no stream of newcomers can push work back for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_MEMORY = 0.9  # weight of all earlier measurements when a new one comes
_STEP = 1.1


class Typical:
    """The running median of positive numbers, which a few extreme ones among many do not move.

    Attributes:
        value: The median; 0 before there is one.
    """

    def __init__(self) -> None:
        self.value = 0.0

    def learn(self, number: float) -> None:
        """Move towards a number, by a step that does not depend on how far away it is."""
        if self.value:
            self.value *= _STEP if number > self.value else 1 / _STEP
        else:
            self.value = number


class Share:
    """The work of one request in one stage.

    Attributes:
        cost: Of its work that waits or is being done.
    """

    def __init__(self) -> None:
        self.cost = 0.0
        self._waiting: dict[Work[Any], None] = {}
        self._running = 0
        self._done = 0.0
        self._due = 0.0  # when the work that was taken last was due

    @property
    def waiting(self) -> int:
        """How many pieces of its work wait."""
        return len(self._waiting)


@dataclass(slots=True, eq=False)
class Work(Generic[T]):
    """One piece of work of a request.

    Attributes:
        item: What to do.
        cost: What it is expected to cost.
        share: Its request's.
    """

    item: T
    cost: float
    share: Share
    number: int = field(repr=False)

    @property
    def waits(self) -> bool:
        """Whether it was not taken and not dropped."""
        return self in self.share._waiting


class FairQueue(Generic[T]):
    """Work that waits or is being done in one stage, with the rate at which the stage gets it done.

    Attributes:
        typical: Cost of all work that a request has in this stage, for most requests.
    """

    def __init__(self) -> None:
        self.typical = Typical()
        self._shares: dict[Share, None] = {}  # of requests that have work here
        self._clock = 0.0  # when the work that was taken last was due
        self._numbers = itertools.count()
        self._measured_seconds = 0.0
        self._measured_cost = 0.0

    def __len__(self) -> int:
        """Return how many pieces of work wait."""
        return sum(share.waiting for share in self._shares)

    @property
    def cost(self) -> float:
        """The cost of all work that waits or is being done."""
        return sum(share.cost for share in self._shares)

    def add(self, share: Share, item: T, cost: float) -> Work[T]:
        """Add work to the queue."""
        if share not in self._shares:
            self._shares[share] = None
            share._due = max(share._due, self._clock)
        work = Work(item, cost, share, next(self._numbers))
        share._waiting[work] = None
        share.cost += cost
        return work

    def in_order(self) -> Iterator[Work[T]]:
        """Go through what waits in the order in which it is fair to take it; take nothing meanwhile."""
        heads = [self._head(share._due, iter(share._waiting)) for share in self._shares if share._waiting]
        heapq.heapify(heads)
        while heads:
            due, _, work, others = heads[0]
            yield work
            following = next(others, None)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (due + following.cost, following.number, following, others))

    def firsts(self) -> list[Work[T]]:
        """Return what waits longest of each request."""
        return [next(iter(share._waiting)) for share in self._shares if share._waiting]

    def take(self, work: Work[T]) -> None:
        """Begin work from the queue."""
        share = work.share
        del share._waiting[work]
        share._running += 1
        share._due += work.cost
        self._clock = max(self._clock, share._due)

    def finish(self, works: Sequence[Work[T]], seconds: float, *, spent: float | None = None) -> None:
        """Record that work is done, and learn the rate from it.

        Args:
            works: What is done.
            seconds: How long the whole stage took for it.
            spent: What it cost all in all, if that is not what was expected; its requests wait the longer for it.
        """
        cost = sum(work.cost for work in works)
        spent = cost if spent is None else spent
        self._measured_seconds = self._measured_seconds * _MEMORY + seconds
        self._measured_cost = self._measured_cost * _MEMORY + spent
        for work in works:
            more = (spent - cost) / len(works)
            work.share._due += more
            work.share._done += work.cost + more
            work.share._running -= 1
            self._leave(work)

    def drop(self, work: Work[T]) -> None:
        """Give up work that waits or is being done."""
        if work.waits:
            del work.share._waiting[work]
        else:
            work.share._running -= 1
        self._leave(work)

    def seconds_for(self, cost: float) -> float:
        """Return the seconds that work of such a cost takes at the measured rate; 0 as long as none is measured."""
        return self._measured_seconds / self._measured_cost * cost if self._measured_cost else 0.0

    def seconds_until_done(self, share: Share, cost: float) -> float:
        """Return the seconds until more work of a request would be done: until others have had as much as it."""
        own = share.cost + cost
        others = sum(min(other.cost, own) for other in self._shares if other is not share)
        return self.seconds_for(others + own)

    def has_others(self, share: Share) -> bool:
        """Tell whether other requests have work here."""
        return any(other is not share for other in self._shares)

    def waiting_before(self, share: Share, count: int) -> int:
        """Return how many pieces of work would be taken before the last one, if a request added `count` more."""
        own = share.waiting + count
        return share.waiting + sum(min(other.waiting, own) for other in self._shares if other is not share)

    @staticmethod
    def _head(due: float, works: Iterator[Work[T]]) -> tuple[float, int, Work[T], Iterator[Work[T]]]:
        first = next(works)
        return due + first.cost, first.number, first, works

    def _leave(self, work: Work[T]) -> None:
        share = work.share
        share.cost -= work.cost
        if not (share._waiting or share._running):
            del self._shares[share]
            if share._done:
                self.typical.learn(share._done)
            share.cost = share._done = 0.0


class Turns:
    """Turns at a limited resource, shared fairly by the seconds that they take.

    Args:
        at_once: How many turns there are at a time.

    Attributes:
        queue: Those who wait for a turn or have one, with the expected seconds as their cost.
    """

    def __init__(self, at_once: int) -> None:
        self.queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._at_once = at_once
        self._free = at_once

    @contextlib.asynccontextmanager
    async def turn(self, share: Share, seconds: float) -> AsyncIterator[None]:
        """Wait for a turn, which lasts until the end of the context.

        Args:
            share: Whose turn it is.
            seconds: How long it is expected to last. What it lasts in the end counts.
        """
        loop = asyncio.get_running_loop()
        work = self.queue.add(share, loop.create_future(), seconds)
        self._give()
        try:
            await work.item
            began = loop.time()
            yield
        except asyncio.CancelledError:
            if not work.waits:
                self._free += 1
            self.queue.drop(work)
            raise
        except BaseException:
            self._finish(work, loop.time() - began)
            raise
        else:
            self._finish(work, loop.time() - began)
        finally:
            self._give()

    def _finish(self, work: Work[asyncio.Future[None]], spent: float) -> None:
        self._free += 1
        self.queue.finish([work], spent / self._at_once, spent=spent)

    def _give(self) -> None:
        while self._free and (work := next(self.queue.in_order(), None)) is not None:
            self.queue.take(work)
            self._free -= 1
            if not work.item.cancelled():
                work.item.set_result(None)
