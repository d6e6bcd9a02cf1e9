"""The user's cache folder: what is cheaper to keep than to compute again. Without it all works, only slower."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

_NAME = "qwen-vl-classifier"


def cache_folder(part: str) -> Path | None:
    """Return a folder of this user alone for one kind of thing that is kept; it is made where it is missing.

    It lies in `XDG_CACHE_HOME` where that is set, else where the platform keeps such folders.

    Args:
        part: The kind of thing, which is the folder's name.

    Returns:
        The folder, or `None` where it cannot be made or is not to be trusted: it is a link, belongs to somebody else,
        or others may write to it.
    """
    base = _user_caches()
    if base is None:
        return None
    folder = base / _NAME / part
    with suppress(OSError):
        base.mkdir(parents=True, exist_ok=True)
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        if all(map(_is_ours_alone, (folder.parent, folder))):
            return folder
    return None


def _user_caches() -> Path | None:
    given = os.environ.get("XDG_CACHE_HOME", "")
    if Path(given).is_absolute():  # others are to be ignored: XDG Base Directory Specification
        return Path(given)
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return Path(local) if local else None
    with suppress(RuntimeError):  # no home
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return None


def _is_ours_alone(folder: Path) -> bool:
    """Tell whether a folder is one, and nobody but this user may write to it."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return False
    if sys.platform == "win32":  # the folder of a user's local data is that user's alone
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
