"""How much a command prints beside its result: `--quiet` and `--verbose`."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGE = __name__.partition(".")[0]


@contextmanager
def telling(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Print only errors, or every step with its time, until the block ends; with neither, change nothing.

    Args:
        quiet: Drop warnings and everything less.
        verbose: Write what the package's loggers tell to standard error, with the seconds since the start.
    """
    own = logging.getLogger(_PACKAGE)
    level, handler = own.level, _StepHandler()
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)  # here and in the logs that a server sets up
        if verbose:
            own.setLevel(logging.DEBUG)
            logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            if quiet:
                logging.disable(logging.NOTSET)
            own.setLevel(level)
            logging.getLogger().removeHandler(handler)


class _StepHandler(logging.Handler):
    """Write a line for each record on standard error, above a progress bar if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        line = f"[{time.monotonic() - self._began:6.1f} s] {record.getMessage()}"
        tqdm.write(line, file=sys.stderr)
