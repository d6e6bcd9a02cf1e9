"""A thread that follows answers: it refits heads, writes the data set, and looks for what other processes wrote."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from qwen_vl_classifier.errors import JournalError, one_line

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0  # between looks for what other processes have written
_WRITE_SECONDS = 1.0  # between writes of the data set, at least


class Background:
    """Does the work that no request waits for.

    Args:
        follow: Reads what was written, and returns a number that differs whenever answers have changed.
        refit: Fits heads to all answers.
        measure: Computes learning curves; told whether there is nothing else to do.
        write: Writes the data set.

    Attributes:
        is_busy: Whether it refits.
        problem: What went wrong in the last work that it did, or "".
    """

    def __init__(
        self,
        follow: Callable[[], int],
        refit: Callable[[], None],
        measure: Callable[[bool], None],
        write: Callable[[], None],
    ) -> None:
        self.is_busy = False
        self.problem = ""
        self._follow, self._refit, self._measure, self._write = follow, refit, measure, write
        self._condition = threading.Condition()
        self._ending = self._settled = False
        self._woken = True
        self._thread = threading.Thread(target=self._run, name="labelling", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Say that answers have changed."""
        with self._condition:
            self._woken, self._settled = True, False
            self._condition.notify_all()

    def settle(self, timeout: float) -> bool:
        """Wait until heads have followed all answers; return whether they have in time."""
        with self._condition:
            return self._condition.wait_for(lambda: self._settled, timeout)

    def stop(self) -> bool:
        """End the thread; return whether this call did it."""
        with self._condition:
            first, self._ending = not self._ending, True
            self._condition.notify_all()
        self._thread.join()
        return first

    def _run(self) -> None:
        fitted = written = -1
        next_write = 0.0
        while True:
            with self._condition:
                if self._ending:
                    return
                self._woken = False
            try:
                changes = self._follow()
            except JournalError as error:  # a request says so, too
                _log.warning("%s", one_line(error))
                changes = fitted
            if written != changes and time.monotonic() >= next_write:
                self._attempt(self._write)
                written, next_write = changes, time.monotonic() + _WRITE_SECONDS
            is_new = fitted != changes
            if is_new:
                self.is_busy = True
                self._attempt(self._refit)
                self.is_busy = False
                fitted = changes
            self._attempt(lambda: self._measure(not is_new))  # noqa: B023 - called at once
            with self._condition:
                self._settled = not self._woken and fitted == changes
                self._condition.notify_all()
                if not self._woken and not self._ending:
                    until_write = next_write - time.monotonic() if written != changes else _LOOK_SECONDS
                    self._condition.wait(min(max(until_write, 0.0), _LOOK_SECONDS))

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do some work. Answers are taken in any case, so a defect ends neither the thread nor labelling."""
        self.problem = ""
        try:
            work()
        except Exception as error:
            self.problem = f"heads or data set do not follow the answers ({type(error).__name__}); answers are kept"
            _log.exception("%s", self.problem)
