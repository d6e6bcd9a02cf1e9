"""Keep working when standard output or error can no longer be written, as after `head` has closed the pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def lasting_output() -> Iterator[list[OSError]]:
    """Ignore failures to write to standard output and error, until the block ends.

    Yields:
        The failures other than a closed pipe, such as a full disk.
    """
    before, failures = (sys.stdout, sys.stderr), list[OSError]()
    # A stream that was closed before the program began is `None`, and is not written to.
    sys.stdout, sys.stderr = (stream and _Lasting(stream, failures) for stream in before)
    try:
        yield failures
        if sys.stdout is not None:
            sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Lasting:
    """A stream that collects failures to write instead of raising them."""

    def __init__(self, stream: Any, failures: list[OSError]) -> None:
        self._stream = stream
        self._failures = failures

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self._failures.append(error)
            with suppress(OSError):  # what waits to be written goes there too, at the end of the process at the latest
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
