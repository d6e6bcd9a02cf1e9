"""Whether the server takes a request now, decided in one place and by three bounds.

A request is let in before its body is read if few enough requests are in progress and the model will be done early
enough with what is queued already. All requests together hold a bounded number of bytes. Examples join a queue only if
the queue has room and will be done before their deadline, by the rate at which earlier ones were done.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator
from typing import Any, Protocol

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import ImageError, QueueFullError
from qwen_vl_classifier.serving.backlog import Backlog
from qwen_vl_classifier.serving.batcher import Batcher

_AT_ARRIVAL = 0.7
"""Part of the time until its deadline that queued work may take for a request to be let in: less than for its examples
to be queued later, so that few requests are let in and then refused after their pictures are decoded."""

_AT_QUEUE = 0.8

_MAX_EXPLANATIONS = 4  # in progress; each takes as long as dozens of passes


class AdmissionObserver(Protocol):
    """Observe admission."""

    def in_flight(self, count: int) -> None:
        """Record how many requests are in progress."""


class Admission:
    """Let requests in, and count what they hold.

    Args:
        config: The bounds: `queue_size`, `max_batch`, `queue_bytes` and `deadline`.
        batcher: What waits for the model.
        pictures: What waits to be decoded and cut into patches.
        observer: Told how many requests are in progress.

    Attributes:
        requests: How many requests are in progress, from before their body is read until they are answered.
        held: How many bytes they hold.
    """

    def __init__(
        self, config: ServeConfig, *, batcher: Batcher[Any, Any], pictures: Backlog, observer: AdmissionObserver
    ) -> None:
        self.requests = 0
        self.held = 0
        self._config = config
        self._batcher = batcher
        self._pictures = pictures
        self._observer = observer
        self._explanations = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admit(self) -> Iterator[AdmittedRequest]:
        """Let a request in before its body is read, until the context ends.

        Raises:
            QueueFullError: Too many requests are in progress, or too much work is queued.
        """
        most = self._config.queue_size + self._config.max_batch
        if self.requests >= most:
            raise self._refusal(f"{self.requests} requests are in progress; expected at most {most}")
        self.check_examples(1, 0, _AT_ARRIVAL * self._config.deadline)
        request = AdmittedRequest(self, asyncio.get_running_loop().time() + self._config.deadline)
        self._count_requests(1)
        try:
            yield request
        finally:
            self._count_requests(-1)
            request.release(request.held)

    def check_examples(self, count: int, cost: int, seconds: float) -> None:
        """Make sure that examples may join the queue of the model; use `AdmittedRequest.check_examples`.

        Raises:
            QueueFullError: The queue has no room, or they would hardly be scored in time.
        """
        waiting, most = self._batcher.waiting, self._config.queue_size
        if waiting + count > most:
            raise self._refusal(f"{waiting} examples wait and {count} more came; expected at most {most} in all")
        backlog = self._batcher.backlog
        needed = backlog.seconds_for(backlog.cost + cost)
        # What is alone is scored however long it takes: it would not be faster later.
        if backlog.cost and needed > seconds:
            raise self._refusal(f"{count} more examples would take {needed:.3g} s with those that wait")

    def check_pictures(self, count: int, seconds: float) -> None:
        """Make sure that sets of pictures may wait to be decoded; use `AdmittedRequest.check_pictures`.

        Raises:
            QueueFullError: They would hardly be decoded in time.
        """
        backlog = self._pictures
        needed = backlog.seconds_for(backlog.cost + count)
        if count and backlog.cost and needed > seconds:
            raise self._refusal(
                f"{count} more sets of pictures would take {needed:.3g} s, with those that wait", backlog
            )

    @contextlib.contextmanager
    def explanation(self) -> Iterator[None]:
        """Let an explanation in, until the context ends.

        Raises:
            QueueFullError: Too many are in progress.
        """
        if self._explanations >= _MAX_EXPLANATIONS:
            raise self._refusal(f"{self._explanations} explanations are in progress; expected at most that many")
        self._explanations += 1
        try:
            yield
        finally:
            self._explanations -= 1

    async def wait_until_idle(self) -> None:
        """Return when no request is in progress."""
        await self._idle.wait()

    def hold(self, nbytes: int) -> None:
        """Count bytes that a request holds; use `AdmittedRequest.hold`.

        Raises:
            QueueFullError: All requests together hold too many already.
        """
        most = self._config.queue_bytes
        if self.held + nbytes > most:
            raise self._refusal(
                f"requests hold {self.held:,} bytes and {nbytes:,} more came; expected at most {most:,} in all"
            )
        self.held += nbytes

    @property
    def max_picture_bytes(self) -> int:
        """How many bytes the pictures of one request may hold."""
        return self._config.queue_bytes // 2

    def _refusal(self, why: str, backlog: Backlog | None = None) -> QueueFullError:
        """Return an error that says after how many seconds the work of now is done."""
        backlog = backlog or self._batcher.backlog
        seconds = math.ceil(backlog.seconds_for(backlog.cost))
        return QueueFullError(f"{why}; try again later", retry_after=max(1, seconds))

    def _count_requests(self, change: int) -> None:
        self.requests += change
        self._observer.in_flight(self.requests)
        if self.requests:
            self._idle.clear()
        else:
            self._idle.set()


class AdmittedRequest:
    """One request that was let in. Use `Admission.admit`.

    Attributes:
        deadline: Until when it is to be answered, on the event loop's clock.
        held: How many bytes it holds; they are given back when it is over.
    """

    def __init__(self, admission: Admission, deadline: float) -> None:
        self.deadline = deadline
        self.held = 0
        self._admission = admission
        self._picture_bytes = 0

    def check_examples(self, count: int, cost: int) -> None:
        """Make sure that examples of this request may join the queue of the model.

        Args:
            count: How many they are.
            cost: Their tokens.

        Raises:
            QueueFullError: The queue has no room, or they would hardly be scored before the deadline.
        """
        self._admission.check_examples(count, cost, self._seconds_to_use())

    def check_pictures(self, count: int) -> None:
        """Make sure that sets of pictures of this request may wait to be decoded.

        Raises:
            QueueFullError: They would hardly be decoded before the deadline.
        """
        self._admission.check_pictures(count, self._seconds_to_use())

    def hold(self, nbytes: int) -> None:
        """Count bytes that this request holds until it is over.

        Raises:
            QueueFullError: All requests together hold too many already.
        """
        self._admission.hold(nbytes)
        self.held += nbytes

    def release(self, nbytes: int) -> None:
        """Give bytes back."""
        self._admission.held -= nbytes
        self.held -= nbytes

    def hold_picture(self, nbytes: int) -> None:
        """Count bytes of a picture: of its file, its pixels or its patches.

        Raises:
            QueueFullError: All requests together hold too many already.
            ImageError: This request alone has too many, now and later.
        """
        if self._picture_bytes + nbytes > self._admission.max_picture_bytes:
            raise ImageError(
                "the pictures of this request take up more memory than one request may have; send fewer or smaller "
                "ones at a time",
                code="image_too_large",
            )
        self.hold(nbytes)
        self._picture_bytes += nbytes

    def release_picture(self, nbytes: int) -> None:
        """Give bytes of a picture back."""
        self.release(nbytes)
        self._picture_bytes -= nbytes

    def _seconds_to_use(self) -> float:
        return _AT_QUEUE * (self.deadline - asyncio.get_running_loop().time())
