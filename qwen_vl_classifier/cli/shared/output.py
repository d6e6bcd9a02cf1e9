"""Standard output and error: quote text from outside, and continue where nobody reads the output.

Names, messages and values from folders, data and libraries may hold sequences that a terminal obeys. All that this
program prints, its progress, logs and tracebacks included, goes through here.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from qwen_vl_classifier.errors import printable


@contextmanager
def lasting_output() -> Iterator[list[OSError]]:
    """Quote what is written to standard output and error, and ignore failures to write, until the block ends.

    Yields:
        The failures other than a closed pipe, such as a full disk.
    """
    sys.excepthook = _print_traceback  # it is called after the end of the block
    before, failures = (sys.stdout, sys.stderr), list[OSError]()
    # A stream that was closed before the program began is `None`, and is not written to.
    sys.stdout, sys.stderr = (stream and _Lasting(stream, failures) for stream in before)
    try:
        yield failures
        if sys.stdout is not None:
            sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


class _Lasting:
    """A stream that writes what is printable, and collects failures to write instead of raising them."""

    def __init__(self, stream: Any, failures: list[OSError]) -> None:
        self._stream = stream
        self._failures = failures

    def write(self, text: str) -> int:
        start = "\r" * text.startswith("\r")  # progress bars begin their line again
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        quoted = start + printable(text[len(start) :])
        self._try(lambda: self._stream.write(quoted.encode(encoding, "backslashreplace").decode(encoding)))
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
