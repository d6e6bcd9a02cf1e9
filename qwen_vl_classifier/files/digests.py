"""Compute the SHA-256 of large files, and cache it until a file changes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from qwen_vl_classifier.files.bounded import open_regular_file, read_json
from qwen_vl_classifier.files.cache import cache_folder
from qwen_vl_classifier.files.whole import write_file

_SHA256 = re.compile("[0-9a-f]{64}")
_MOST_RECORDS = 2000
_MOST_THREADS = 8
# A file that changed within the last tick may change again with the same time stamp. If all its times are whole
# seconds, the clock of the file system may have ticks of seconds.
_TICK, _LONG_TICK = 0.05, 2.0


def file_digests(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of files, in their order, as `file_digest` does: several are read at a time.

    One core hashes 1 to 2 GB a second, less than what memory and fast disks deliver.

    Raises:
        OSError: A file cannot be read.
    """
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS)) as pool:
        return list(pool.map(file_digest, paths))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal, and read the file only if it has changed since the last time.

    A file has not changed while its real path, size, inode and time stamps are the same.

    Raises:
        OSError: The file cannot be read.
    """
    is_link, path = path.is_symlink(), path.resolve()
    # In the hub's cache a weight file is a link to a blob that is named by its SHA-256.
    if is_link and path.parent.name == "blobs" and _SHA256.fullmatch(path.name):
        return path.name
    folder = cache_folder("digests")
    if folder is None:
        return _digest(path)
    state = _state(path)
    record = folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    known = _read(record, state)
    if known is not None:
        return known
    digest = _digest(path)
    if _state(path) == state and _is_settled(state):
        with suppress(OSError):  # a full disk: the next process computes it again
            _forget_oldest(folder)
            write_file(record, json.dumps({**state, "sha256": digest}))
    return digest


def _digest(path: Path) -> str:
    with open_regular_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> dict[str, str | int]:
    status = path.stat()
    return {
        "path": os.fsencode(path).decode(errors="backslashreplace"),
        "size": status.st_size,
        "inode": status.st_ino,
        "device": status.st_dev,
        "modified": status.st_mtime_ns,
        "changed": status.st_ctime_ns,
    }


def _read(record: Path, state: dict[str, str | int]) -> str | None:
    """Return the digest in a record if the record is sound and about a file in this state."""
    try:
        content = read_json(record)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    digest = content.pop("sha256", None)
    return digest if content == state and isinstance(digest, str) and _SHA256.fullmatch(digest) else None


def _is_settled(state: dict[str, str | int]) -> bool:
    times = [int(state[name]) for name in ("modified", "changed")]
    tick = _TICK if any(moment % 10**9 for moment in times) else _LONG_TICK
    return time.time() - max(times) / 10**9 > tick


def _forget_oldest(folder: Path) -> None:
    """Delete the oldest records if there are too many: those of deleted files are never used again."""
    records = list(folder.glob("*.json"))
    if len(records) >= _MOST_RECORDS:
        ages = sorted((path.stat().st_mtime, path) for path in records)
        for _, path in ages[: _MOST_RECORDS // 10]:
            path.unlink(missing_ok=True)
