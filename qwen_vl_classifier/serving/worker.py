"""Run functions one after another in one thread, in turns; independent of HTTP and torch."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from qwen_vl_classifier.errors import ClosedError

T = TypeVar("T")


class Worker:
    """Run functions in one thread, in the order in which they came, for callers in one event loop.

    The thread is a daemon and not an executor's, because the interpreter waits for an executor's threads when it
    exits: one call that hangs would keep the process.

    Args:
        name: Of the thread.

    Attributes:
        turn: A lock for callers who choose what to run only when nothing else runs. It is given in the order in which
            it was asked for.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.turn = asyncio.Lock()
        self._calls: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], asyncio.Future[Any]] | None]
        self._calls = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._began: float | None = None  # the call that runs, on the monotonic clock
        self._stopped = False

    @property
    def running_seconds(self) -> float:
        """How long the call that runs has taken so far; 0 if none runs."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return what a function returns; a call that is cancelled before it begins is left out.

        Raises:
            Exception: What the function raised.
            RuntimeError: It raised what would end a thread or an event loop, such as `SystemExit`.
            ClosedError: The worker takes no more calls.
        """
        if self._stopped:
            raise ClosedError("the server is shutting down; send this to another one")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put((function, arguments, future))
        return await future

    def stop(self) -> None:
        """Accept no more calls, and end the thread after those it has."""
        self._stopped = True
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            function, arguments, future = call
            if not future.cancelled():
                self._began = time.monotonic()
                result, error = _outcome(function, arguments)
                self._began = None
                try:
                    future.get_loop().call_soon_threadsafe(_settle, future, result, error)
                except RuntimeError:  # the event loop is closed: nobody is left to tell
                    return
                del result, error
            del call, function, arguments, future  # or they would stay in memory until the next call


class Steps:
    """Run long work in a worker step by step, each in a turn of its own, so that others wait for one step at most.

    Works that are in progress take turns with each other, in the order in which they ask for their next step.

    Args:
        worker: Whose turn is shared with the others.
        oldest: Tells since when, on the event loop's clock, those of the others who have waited longest wait for
            their turn; infinity if nobody does. Who waits must ask for the turn.
    """

    def __init__(self, worker: Worker, oldest: Callable[[], float]) -> None:
        self._worker = worker
        self._oldest = oldest
        self._next = asyncio.Lock()  # of all steps one waits for the turn
        self._ended = -math.inf  # when the last step was done

    async def run(self, step: Callable[[], T]) -> T:
        """Return what a step returns.

        A caller who goes away does not give the turn to others before the thread is free.

        Raises:
            Exception: As `Worker.run`.
        """
        async with self._next:
            await self._take_turn()
            running = asyncio.create_task(self._worker.run(step))
            running.add_done_callback(self._give_turn)
            return await asyncio.shield(running)

    async def _take_turn(self) -> None:
        """Wait for a turn at which nobody else waits who has waited for a step already."""
        turn = self._worker.turn
        await turn.acquire()
        while self._oldest() <= self._ended:
            turn.release()
            await asyncio.sleep(0)
            await turn.acquire()

    def _give_turn(self, step: asyncio.Task[Any]) -> None:
        self._ended = asyncio.get_running_loop().time()
        self._worker.turn.release()
        if not step.cancelled():
            step.exception()  # has been looked at: nobody may ask


def _outcome(function: Callable[..., T], arguments: tuple[Any, ...]) -> tuple[T | None, Exception | None]:
    try:
        return function(*arguments), None
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            return None, error
        # A future refuses StopIteration; SystemExit and its like would end this thread, or the caller's loop.
        failure = RuntimeError(f"a call raised {type(error).__name__}")
        failure.__cause__ = error
        return None, failure


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
