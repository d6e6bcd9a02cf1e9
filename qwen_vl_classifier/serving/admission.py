"""Decide whether the server accepts a request now, in one place and by three limits.

A request is let in before its body is read if few enough requests are in progress and the model will have time for one
of the usual size early enough. A body that is long in coming gives its place to a newcomer. No request may hold more
bytes than are free. Examples join a queue only if it has room and they will be done before their deadline, by the rate
at which earlier ones were done and with fair shares for all (`fair_queue`): what one request has queued, however much,
is no reason to refuse a small one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.errors import ExplanationError, ImageError, QueueFullError
from qwen_vl_classifier.serving.fair_queue import FairQueue, Share

_AT_ARRIVAL = 0.7
"""Part of the time until its deadline that queued work may take for a request to be let in: less than for its examples
to be queued later, so that few requests are let in and then refused after their pictures are decoded."""

_AT_QUEUE = 0.8

_MIN_UPLOAD_SECONDS = 1.0
"""How long a body may take to arrive while other requests wait to be admitted."""

_SET_ASIDE = 8  # one such part of the bytes is for small requests, however much large ones hold

_MAX_EXPLANATIONS = 4  # in progress; they take turns, so that a short one does not wait for the end of a long one

_TELLING_PASSES = 2  # of an explanation, after which its own speed is known


class AdmissionObserver(Protocol):
    """Observe admission."""

    def in_flight(self, count: int) -> None:
        """Record how many requests are in progress."""


class Admission:
    """Let requests in, and count what they hold.

    Args:
        config: The bounds: `queue_size`, `max_batch`, `queue_bytes` and `deadline`.
        model: What waits for the model.
        pictures: What waits to be decoded.
        observer: Told how many requests are in progress.

    Attributes:
        requests: How many requests are in progress, from before their body is read until they are answered.
        held: How many bytes they hold.
    """

    def __init__(
        self, config: ServeConfig, *, model: FairQueue[Any], pictures: FairQueue[Any], observer: AdmissionObserver
    ) -> None:
        self.requests = 0
        self.held = 0
        self._config = config
        self._most_requests = config.queue_size + config.max_batch
        self._model = model
        self._pictures = pictures
        self._uploads: dict[asyncio.Timeout, float] = {}  # since when each takes
        self._given_way = 0  # requests that must end to make room, and have not yet
        self._observer = observer
        self._explanations: list[AdmittedExplanation] = []  # as they came
        self._seconds_per_token = 0.0  # seconds for each token in the fastest pass of recent explanations
        self._seconds_per_token_until = 0.0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admit(self) -> Iterator[AdmittedRequest]:
        """Let a request in before its body is read, until the context ends.

        Raises:
            QueueFullError: Too many requests are in progress, or too much work is queued.
        """
        most = self._most_requests
        if self.requests - self._given_way >= most and not self._make_room():
            raise self._refusal(f"{self.requests} requests are in progress; expected at most {most}", self._model)
        self.check_examples(Share(), 1, self._model.typical.value, _AT_ARRIVAL * self._config.deadline)
        request = AdmittedRequest(self, asyncio.get_running_loop().time() + self._config.deadline)
        self._count_requests(1)
        try:
            yield request
        finally:
            self._count_requests(-1)
            request.release(request.held)

    def check_examples(self, share: Share, count: int, cost: float, seconds: float) -> None:
        """Make sure that examples may join the queue of the model; use `AdmittedRequest.check_examples`.

        Raises:
            QueueFullError: The queue has no room, or they would hardly be scored in time.
        """
        waiting, most = self._model.waiting_before(share, count), self._config.queue_size
        if waiting + count > most:
            why = f"{waiting} examples are waiting and {count} more arrived; expected at most {most} in all"
            raise self._refusal(why, self._model)
        self._check_time(self._model, share, cost, seconds, f"{count} more examples")

    def check_pictures(self, share: Share, count: int, cost: float, seconds: float) -> None:
        """Make sure that pictures may wait to be decoded; use `AdmittedRequest.check_pictures`.

        Raises:
            QueueFullError: They would hardly be decoded in time.
        """
        self._check_time(self._pictures, share, cost, seconds, f"{count} more pictures")

    @contextlib.contextmanager
    def explanation(self, request: AdmittedRequest) -> Iterator[AdmittedExplanation]:
        """Let an explanation in, until the context ends.

        Raises:
            QueueFullError: Too many are in progress.
        """
        count = len(self._explanations)
        if count >= _MAX_EXPLANATIONS:
            raise self._refusal(f"{count} explanations are in progress; expected at most that many", self._model)
        explanation = AdmittedExplanation(self, request.deadline, tuple(self._explanations))
        self._explanations.append(explanation)
        try:
            yield explanation
        finally:
            explanation.left = 0
            self._explanations.remove(explanation)

    @property
    def seconds_per_token(self) -> float:
        """Seconds for each token in the fastest pass of recent explanations; 0 if there was none.

        It is forgotten after a while, or one slow moment of the machine would keep explanations out for ever.
        """
        return self._seconds_per_token if asyncio.get_running_loop().time() < self._seconds_per_token_until else 0.0

    def learn_seconds_per_token(self, fastest: float) -> None:
        """Record the seconds for each token in the fastest pass of an explanation; use `AdmittedExplanation`."""
        if not (known := self.seconds_per_token) or fastest < known:
            self._seconds_per_token = fastest
            self._seconds_per_token_until = asyncio.get_running_loop().time() + self._config.deadline

    @property
    def seconds_queued(self) -> float:
        """How long the model takes for the examples that wait or are being scored."""
        return self._model.seconds_for(self._model.cost)

    @property
    def limits(self) -> ServeConfig:
        """The configuration that bounds requests."""
        return self._config

    async def wait_until_idle(self) -> None:
        """Return when no request is in progress."""
        await self._idle.wait()

    def hold(self, nbytes: int, already: int) -> None:
        """Count bytes that a request holds; use `AdmittedRequest.hold`.

        A large request may hold as much as is free (A. K. Choudhury and E. L. Hahne, "Dynamic queue length thresholds
        for shared-memory packet switches", IEEE/ACM Transactions on Networking, 1998), so that others find room beside
        it; and a part is set aside in which every request has a place of the same size.

        Args:
            nbytes: How many more.
            already: How many it holds already.

        Raises:
            QueueFullError: It would hold more than are free then.
        """
        own = already + nbytes
        small = self._config.queue_bytes // _SET_ASIDE // self._most_requests
        if own > small and own > self._config.queue_bytes * (_SET_ASIDE - 1) // _SET_ASIDE - self.held - nbytes:
            raise self._refusal(
                f"requests hold {self.held:,} bytes and {nbytes:,} more arrived; expected at most "
                f"{self._config.queue_bytes:,} in all, and no request to hold more than is free",
                self._model,
            )
        self.held += nbytes

    @property
    def max_picture_bytes(self) -> int:
        """How many bytes the pictures of one request may hold."""
        return self._config.queue_bytes * (_SET_ASIDE - 1) // _SET_ASIDE // 2

    @contextlib.asynccontextmanager
    async def upload(self, until: float) -> AsyncIterator[None]:
        """Give a body time to arrive; use `AdmittedRequest.upload`."""
        loop = asyncio.get_running_loop()
        timeout = asyncio.timeout_at(until)
        self._uploads[timeout] = loop.time()
        try:
            async with timeout:
                yield
        except TimeoutError:
            if timeout not in self._uploads:
                why = "the body arrived too slowly while other requests were waiting"
                raise self._refusal(why, self._model) from None
            raise
        finally:
            if self._uploads.pop(timeout, None) is None:
                self._given_way -= 1

    def _make_room(self) -> bool:
        """Let the body that has been arriving for longest give way, and tell whether there is one."""
        now = asyncio.get_running_loop().time()
        oldest, since = next(iter(self._uploads.items()), (None, now))
        if oldest is None or now - since < _MIN_UPLOAD_SECONDS:
            return False
        del self._uploads[oldest]
        self._given_way += 1
        if not oldest.expired():
            oldest.reschedule(now)
        return True

    def _check_time(self, queue: FairQueue[Any], share: Share, cost: float, seconds: float, more: str) -> None:
        """Raise an error unless work would be done in time; what is alone is, since it would not be faster later."""
        needed = queue.seconds_until_done(share, cost)
        if needed > seconds and queue.has_others(share):
            raise self._refusal(f"{more} would take {needed:.3g} s with those that are waiting", queue)

    def _refusal(self, why: str, queue: FairQueue[Any]) -> QueueFullError:
        """Return an error that says after how many seconds the work of now is done, or given up."""
        seconds = min(queue.seconds_for(queue.cost), self._config.deadline)
        return QueueFullError(f"{why}; try again later", retry_after=max(1, math.ceil(seconds)))

    def _count_requests(self, change: int) -> None:
        self.requests += change
        self._observer.in_flight(self.requests)
        if self.requests:
            self._idle.clear()
        else:
            self._idle.set()


class AdmittedRequest:
    """One admitted request. Use `Admission.admit`.

    Attributes:
        deadline: Until when it is to be answered, on the event loop's clock.
        held: How many bytes it holds; they are given back when it is over.
    """

    def __init__(self, admission: Admission, deadline: float) -> None:
        self.deadline = deadline
        self.held = 0
        self._admission = admission
        self._picture_bytes = 0

    def check_examples(self, share: Share, count: int, cost: float) -> None:
        """Make sure that examples of this request may join the queue of the model.

        Args:
            share: What the request has in that queue.
            count: How many they are.
            cost: Their tokens.

        Raises:
            QueueFullError: The queue has no room, or they would hardly be scored before the deadline.
        """
        self._admission.check_examples(share, count, cost, self._seconds_to_use())

    def check_pictures(self, share: Share, count: int, cost: float) -> None:
        """Make sure that pictures of this request may wait to be decoded.

        Args:
            share: What the request has in that queue.
            count: How many they are.
            cost: The seconds that they are expected to take.

        Raises:
            QueueFullError: They would hardly be decoded before the deadline.
        """
        self._admission.check_pictures(share, count, cost, self._seconds_to_use())

    def upload(self, seconds: float) -> contextlib.AbstractAsyncContextManager[None]:
        """Give the body of this request time to arrive, in the context.

        Args:
            seconds: How long it may take; the deadline bounds it too.

        Raises:
            TimeoutError: It took longer.
            QueueFullError: It took long, and gave way to others.
        """
        until = min(self.deadline, asyncio.get_running_loop().time() + seconds)
        return self._admission.upload(until)

    def hold(self, nbytes: int) -> None:
        """Count bytes that this request holds until it is over.

        Raises:
            QueueFullError: It would hold more than are free.
        """
        self._admission.hold(nbytes, self.held)
        self.held += nbytes

    def release(self, nbytes: int) -> None:
        """Give bytes back."""
        self._admission.held -= nbytes
        self.held -= nbytes

    def hold_picture(self, nbytes: int) -> None:
        """Count bytes of a picture: of its file, its pixels or its patches.

        Raises:
            QueueFullError: It would hold more than are free.
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


class AdmittedExplanation:
    """One admitted explanation. Use `Admission.explanation`.

    How long its passes will take is rather underestimated, since more would refuse what could be done: the fastest of
    its passes so far sets the speed, and before it has run two, of which the first may be slow, that of recent ones.

    Attributes:
        left: How many tokens the passes have that were not run yet.
    """

    def __init__(self, admission: Admission, deadline: float, earlier: Sequence[AdmittedExplanation]) -> None:
        self.left = 0
        self._admission = admission
        self._deadline = deadline
        self._earlier = earlier
        self._seconds = 0.0  # that its passes have taken so far
        self._fastest = math.inf  # seconds for each token
        self._runs = 0

    @property
    def seconds_left(self) -> float:
        """How long the passes that are left take at the least, while nobody else computes."""
        return self.left * (self._admission.seconds_per_token if self._runs < _TELLING_PASSES else self._fastest)

    def begin(self, costs: Sequence[int]) -> None:
        """Make sure that an explanation of such passes may begin.

        Args:
            costs: The tokens of each pass.

        Raises:
            ExplanationError: It has too many tokens, or would take longer than any request may.
            QueueFullError: It would not be done before the deadline beside those that came earlier.
        """
        most = self._admission.limits.max_explain_tokens
        if sum(costs) > most:
            raise ExplanationError(
                f"this explanation takes {len(costs)} passes of {sum(costs):,} tokens in all; expected at most "
                f"{most:,}; send a shorter text or smaller pictures, or choose the method tokens"
            )
        self.left = sum(costs)
        self._check()

    def finish(self, cost: int, seconds: float) -> None:
        """Record a pass, and make sure that those after it can be run in time.

        Raises:
            ExplanationError: As `begin`, and so is `QueueFullError`.
        """
        self.left -= cost
        self._seconds += seconds
        self._runs += 1
        self._fastest = min(self._fastest, seconds / cost)
        if self._runs >= _TELLING_PASSES:
            self._admission.learn_seconds_per_token(self._fastest)
        if self.left:
            self._check()

    def _check(self) -> None:
        alone, most = self._seconds + self.seconds_left, self._admission.limits.deadline
        if alone > most:
            raise ExplanationError(
                f"this explanation would take {alone:.3g} s; expected at most {most:.3g} s; send a shorter text or "
                "smaller pictures, or choose the method tokens"
            )
        # They take turns: each of the others has as many passes before this one is done, or all that it needs.
        others = sum(min(other.seconds_left, self.seconds_left) for other in self._earlier)
        others += self._admission.seconds_queued
        if others + self.seconds_left > self._deadline - asyncio.get_running_loop().time():
            raise QueueFullError(
                "the requests in progress leave too little time for this explanation; try again later",
                retry_after=max(1, math.ceil(others)),
            )
