"""Lock a folder of output for one run, and tell at any time whether the run still has that folder."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import uuid
from pathlib import Path

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.bounded import REFUSED, read_file

LOCK = ".lock"
"""The file in the folder that is locked. The system lifts the lock when its process ends, in whatever way."""

_HOLDER = re.compile(rb"(process \d+ on [\w.-]+), run [0-9a-f]{32}\n", re.ASCII)
_MOST_BYTES = 512
_GONE = (errno.ENOENT, errno.ENOTDIR)


class FolderLock:
    """The lock of a folder on this machine, and the name of the run that holds it.

    Workers of the run, on any machine, make a lock of the same folder and run, and ask `is_held`: they take nothing.

    Args:
        folder: The folder.
        run: Name of the run, where another process has taken the lock; "" makes one.
    """

    def __init__(self, folder: Path, run: str = "") -> None:
        self.run = run or uuid.uuid4().hex
        self._folder = folder
        self._descriptor: int | None = None

    def take(self) -> None:
        """Make the folder if it is missing, and lock it until `release`.

        Raises:
            ConfigError: Another run holds it, or its lock file is none that a run wrote.
            OSError: It cannot be made or written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        while self._descriptor is None:
            descriptor = self._open()
            try:
                self._lock(descriptor)
                # Whoever removed the folder meanwhile may have made it anew: then another file has this name now.
                if self._names(descriptor):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {_host()}, run {self.run}\n".encode(), 0)
                    self._descriptor, descriptor = descriptor, -1
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def is_held(self) -> bool:
        """Tell whether the folder is still there and the run's own: not removed or replaced by another run.

        Raises:
            OSError: The folder cannot be read.
        """
        try:
            content = read_file(self._folder / LOCK, most=_MOST_BYTES, inside=self._folder)
        except OSError as error:
            if error.errno in (*REFUSED, *_GONE):
                return False
            raise
        if not content.endswith(f", run {self.run}\n".encode()):
            return False
        return self._descriptor is None or self._names(self._descriptor)

    def release(self) -> None:
        """Lift the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """Open the lock file, and make sure that it is one: it may have been put there to have another one emptied."""
        path = self._folder / LOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            if error.errno in (*REFUSED, errno.ENXIO):  # the last one: a socket
                raise self._foreign() from None
            raise
        status = os.fstat(descriptor)
        content = os.pread(descriptor, _MOST_BYTES, 0) if stat.S_ISREG(status.st_mode) else None
        if content is None or status.st_nlink > 1 or (content and not _HOLDER.fullmatch(content)):
            os.close(descriptor)
            raise self._foreign()
        return descriptor

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _HOLDER.fullmatch(os.pread(descriptor, _MOST_BYTES, 0))
            raise ConfigError(
                f"{self._folder}: another run is writing here ({holder[1].decode() if holder else 'unknown'}); wait "
                "until it has ended, or give another folder"
            ) from None
        except OSError:  # a file system without locks: the last run that begins has the folder
            pass

    def _names(self, descriptor: int) -> bool:
        """Tell whether the lock file of the folder is the one that is open."""
        try:
            return os.path.samestat(os.fstat(descriptor), (self._folder / LOCK).lstat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _foreign(self) -> ConfigError:
        return ConfigError(
            f"{self._folder}: its {LOCK} was not written by a run (it may be a link); remove it, or give another folder"
        )


def _host() -> str:
    return re.sub(r"[^\w.-]", "-", socket.gethostname(), flags=re.ASCII) or "unknown"
