"""Names of files, and how files of others are opened."""

from __future__ import annotations

import os
import re

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Tell whether `text` names something to fetch rather than a file."""
    return _URL.match(text) is not None


def open_without_waiting(path: str, flags: int) -> int:
    """Open for reading, but do not wait for a writer where `path` is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
