"""Paths and URLs of files, and opening regular files."""

from __future__ import annotations

import errno
import os
import re
import stat
from io import BufferedReader

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Tell whether `text` is a URL rather than a path."""
    return _URL.match(text) is not None


def open_regular_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading; a pipe is refused without waiting for its writer.

    Raises:
        OSError: It is not there or cannot be read, its path is not valid, or it is a folder, pipe, socket or device.
    """
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except ValueError:  # a NUL in the path, or half of a surrogate pair
        raise OSError(errno.EINVAL, "the path is not valid") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe, socket or device")
    return file


def local_path(location: str) -> str:
    """Return the path of a file: URL; any other location unchanged."""
    match = re.match(r"file://(localhost)?(?=/)", location, re.IGNORECASE)
    return location[match.end() :] if match else location
