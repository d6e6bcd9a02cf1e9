"""Read files that others may have written: regular files alone, of a bounded size, JSON of a bounded depth.

Whatever reads such a file opens it here. A pipe would be waited for without end, and a device read without end; a link
could lead to any file of this machine.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

MOST_JSON = 8 << 20
"""Bytes of a JSON file, but for the vocabulary of a tokeniser: the largest that are known have one megabyte."""

_LENGTH_BYTES = 8  # at the start of a file of safetensors: the length of its header
_MOST_HEADER = 16 << 20  # the headers of the largest checkpoints have less than one megabyte

MOST_DEPTH = 64
"""Levels of nesting in JSON."""

REFUSED = (errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.EPERM, errno.EFBIG)
"""The `errno` of errors below that say that this is no such file, rather than that it cannot be read now."""

# In the hub's cache, files of a snapshot are links to blobs, which are named by their SHA-1 or SHA-256.
_BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")

_Path = str | os.PathLike[str]


def open_regular_file(path: _Path, *, most: int | None = None, inside: _Path | None = None) -> BufferedReader:
    """Open a regular file for reading; anything else is refused at once, even a pipe that nobody writes to.

    Args:
        path: The file.
        most: Most bytes that it may have; `None` for any number.
        inside: The folder that the file must be in, links resolved; blobs of the hub's cache count as inside. `None`
            follows links anywhere.

    Raises:
        OSError: It is not there or cannot be read, its path is not valid, it is a folder, pipe, socket or device, it is
            too large, or a link leads out of the folder. `strerror` says which, without the path.
    """
    try:
        _check_kind(Path(path).stat())  # before it is opened: opening some devices does something
        if inside is not None and not _is_inside(path, inside):
            raise OSError(errno.EPERM, "a link leads out of its folder")
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 - the caller closes it
    except ValueError:  # a NUL in the path, or half of a surrogate pair
        raise OSError(errno.EINVAL, "the path is not valid") from None
    try:
        status = os.fstat(file.fileno())
        _check_kind(status)
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, expected at most {most:,}")
    except OSError:
        file.close()
        raise
    return file


def read_file(path: _Path, *, most: int, inside: _Path | None = None) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file.
        most: Most bytes that it may have.
        inside: As in `open_regular_file`.

    Raises:
        OSError: As in `open_regular_file`.
    """
    with open_regular_file(path, most=most, inside=inside) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it grew, or is a file of the kernel, which says it is empty
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
    return content


def read_json(path: _Path, *, most: int = MOST_JSON, inside: _Path | None = None) -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        most: Most bytes that it may have.
        inside: As in `open_regular_file`.

    Raises:
        OSError: As in `open_regular_file`.
        ValueError: It is no JSON in UTF-8, or nested too deeply.
    """
    return parse_json(read_file(path, most=most, inside=inside))


def check_tensor_file(path: _Path, *, inside: _Path | None = None) -> int:
    """Check before safetensors opens a file that it is a regular one with a header of a bounded size.

    Args:
        path: The file.
        inside: As in `open_regular_file`.

    Returns:
        Its size in bytes.

    Raises:
        OSError: As in `open_regular_file`.
        ValueError: Its header is not of a possible size.
    """
    with open_regular_file(path, inside=inside) as file:
        size = os.fstat(file.fileno()).st_size
        header = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 0 < header <= min(_MOST_HEADER, size - _LENGTH_BYTES):
        raise ValueError(f"its header claims {header:,} bytes, and the file has {size:,}")
    return size


def parse_json(text: bytes | str) -> Any:
    """Return the content of JSON text, which is UTF-8 if it is bytes.

    Raises:
        ValueError: It is no JSON in UTF-8, or nested too deeply.
    """
    deep = ValueError(f"it is nested more than {MOST_DEPTH} levels deep")
    try:
        content = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise deep from None
    if is_deeper(content, MOST_DEPTH):  # what walks through it later would fail there
        raise deep
    return content


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def _check_kind(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, socket or device")


def _is_inside(path: _Path, folder: _Path) -> bool:
    real = Path(os.path.realpath(path))
    if real.is_relative_to(os.path.realpath(folder)):
        return True
    return real.parent.name == "blobs" and _BLOB.fullmatch(real.name) is not None


def is_deeper(content: Any, most: int) -> bool:
    """Tell whether the objects and lists of a JSON value are nested more than `most` levels deep."""
    level = [content]
    for _ in range(most):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return any(isinstance(item, (dict, list)) for item in level)
