"""The user's cache folder. Everything works without it, only slower."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

_NAME = "qwen-vl-classifier"


def cache_folder(part: str) -> Path | None:
    """Return a subfolder of the user's cache, created if missing, that only this user can write to.

    The cache lies in `XDG_CACHE_HOME` if that is set, else in the platform's usual folder.

    Args:
        part: Name of the subfolder.

    Returns:
        The folder, or `None` if it cannot be created or trusted: it is a link, belongs to another user, or others may
        write to it.
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
    if Path(given).is_absolute():  # the XDG Base Directory Specification ignores relative paths
        return Path(given)
    with suppress(RuntimeError):  # no home
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return None


def _is_ours_alone(folder: Path) -> bool:
    """Tell whether a folder is one, and nobody but this user may write to it."""
    status = folder.lstat()
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not shared
