"""Tell paths and URLs of files apart."""

from __future__ import annotations

import re

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Tell whether `text` is a URL rather than a path."""
    return _URL.match(text) is not None


def local_path(location: str) -> str:
    """Return the path of a file: URL; any other location unchanged."""
    match = re.match(r"file://(localhost)?(?=/)", location, re.IGNORECASE)
    return location[match.end() :] if match else location
