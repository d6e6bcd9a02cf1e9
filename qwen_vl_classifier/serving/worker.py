"""One thread that does one thing after the other, and whose turn it is; knows neither HTTP nor torch."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

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
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put((function, arguments, future))
        return await future

    def stop(self) -> None:
        """End the thread after the calls that it has."""
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
