"""Write a file or a folder whole or not at all.

A file or folder is written beside its final path, under a name that ends in `.partial`, and renamed in one step once it
is complete. At every moment, also if the process is killed, the path holds the old version or the new one. The next
write removes what a killed process left. What a running process writes is locked, and is left alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Suffix of a file or folder that is not complete yet."""

_OLD = ".old"  # ends the name of a folder that is being replaced in two steps
_LEFTOVER = re.compile(rf"(?:\.(?P<name>.+)\.)?[0-9a-f]{{32}}(?P<kind>{PARTIAL}|{_OLD})", re.DOTALL)
_AT_WORKING_FOLDER, _RENAME_EXCHANGE = -100, 2  # of Linux: AT_FDCWD, and a flag of renameat2(2)
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EXDEV)


@contextmanager
def new_file(place: Path, *, durable: bool = False, once: bool = False, clear: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when the block ends, and is removed if the block fails.

    A library that wants a path may write to `file.name`.

    Args:
        place: Path of the complete file; its folder exists.
        durable: Bring content and name to disk, so that they survive a loss of power.
        once: Fail if the name is taken.
        clear: Remove what killed writers of this file left, which lists the folder.

    Raises:
        FileExistsError: The name is taken, and `once` is set.
        OSError: The file cannot be written; nothing of it is visible.
    """
    partial, file = _create(place)
    try:
        with file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if once:
                _link(partial, place)
            else:
                partial.replace(place)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    if durable:
        _sync(place.parent)
    if clear:
        clear_leftovers(place.parent, place.name)


def write_file(place: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Write a file whole or not at all; text becomes UTF-8. See `new_file`.

    Raises:
        OSError: It cannot be written; nothing of it is visible.
    """
    with new_file(place, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def encodable(text: str) -> str:
    """Replace what UTF-8 cannot hold: JSON can spell half of a surrogate pair, Parquet cannot."""
    return text.encode("utf-8", "replace").decode()


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """Make an empty folder that gets its name when the block ends, and is removed if the block fails.

    An older folder is replaced in one step where the system can exchange two names (Linux, most file systems).
    Elsewhere two renames are needed; a reader that finds no folder calls `recover_folder`.

    Whoever may read the folder may read its files, too. Some libraries write files that only their owner can read, and
    a server often runs as another user than the training did.

    Args:
        place: Path of the complete folder, no link; folders above it are made.

    Raises:
        OSError: The folder cannot be written; an older one is unchanged.
    """
    make_folders(place.parent)
    recover_folder(place)
    partial, lock = _create_folder(place)
    old = partial.with_suffix(_OLD)
    try:
        yield partial
        _complete_tree(partial)
        if place.exists():
            _replace_folder(partial, place, old)
        else:
            partial.replace(place)
        _sync(place.parent)
    finally:
        if old.exists() and not place.exists():
            old.replace(place)
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
        clear_leftovers(place.parent, place.name)


def recover_folder(place: Path) -> None:
    """Put back the old version of a folder if its replacement was killed between two renames."""
    if place.exists():
        return
    for old in _leftovers(place.parent, place.name, _OLD):
        with suppress(OSError):
            old.replace(place)


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder; what a running process writes stays.

    Args:
        folder: The folder; its subfolders are not searched.
        name: Name of the file or folder that was being written; `None` for all.
    """
    for path in _leftovers(folder, name, PARTIAL):
        _remove_unless_locked(path)
    for path in _leftovers(folder, name, _OLD):
        match = _LEFTOVER.fullmatch(path.name)
        if match and match["name"] and (folder / match["name"]).exists():
            shutil.rmtree(path, ignore_errors=True)


def partial_name(name: str) -> str:
    """Return a unique name for a file or folder that will be renamed to `name`."""
    return f".{name}.{uuid.uuid4().hex}{PARTIAL}"


def is_partial(name: str) -> bool:
    """Tell whether a file name or path was made by `partial_name`."""
    return name.rpartition("/")[2].startswith(".") and name.endswith(PARTIAL)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a loss of power.

    Raises:
        OSError: One of them cannot be made.
    """
    if folder.is_dir():
        return
    make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync(folder.parent)


def exchange(one: Path, other: Path) -> None:
    """Exchange the names of two files or folders in one step.

    Raises:
        OSError: They cannot be exchanged; `errno` is ENOSYS where the system has no such call.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    paths = [ctypes.c_char_p(os.fsencode(path)) for path in (one, other)]
    if rename(_AT_WORKING_FOLDER, paths[0], _AT_WORKING_FOLDER, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def _create(place: Path) -> tuple[Path, BinaryIO]:
    """Create a partial file, locked so that `clear_leftovers` leaves it alone while this process runs."""
    while True:
        partial = place.with_name(partial_name(place.name))
        file = partial.open("xb")
        with suppress(OSError):  # a file system without locks does not lend one to `clear_leftovers` either
            fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():
            return partial, file
        file.close()  # another process took it for a leftover before it was locked


def _create_folder(place: Path) -> tuple[Path, int]:
    """Create a partial folder, locked so that `clear_leftovers` leaves it alone while this process runs."""
    while True:
        partial = place.with_name(partial_name(place.name))
        partial.mkdir()
        with suppress(FileNotFoundError):  # another process took it for a leftover before it was locked
            handle = os.open(partial, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if partial.exists():
                return partial, handle
            os.close(handle)


def _replace_folder(partial: Path, place: Path, old: Path) -> None:
    try:
        exchange(partial, place)
    except OSError as error:
        if error.errno not in _CANNOT_EXCHANGE:
            raise
        place.replace(old)
        partial.replace(place)


def _leftovers(folder: Path, name: str | None, kind: str) -> list[Path]:
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return []
    matches = filter(None, map(_LEFTOVER.fullmatch, names))
    return [folder / match[0] for match in matches if match["kind"] == kind and name in (None, match["name"])]


def _remove_unless_locked(path: Path) -> None:
    with suppress(OSError):
        # Files for writing: some network file systems lock nothing else.
        handle = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the writer lives: it holds the lock
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(handle)


def _sync(path: Path) -> None:
    """Bring the content of a file, or the names in a folder, to disk.

    A file that is on disk under a name that is not would be lost with its name.

    Raises:
        OSError: The disk does not take them.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system on which that has no meaning
            raise
    finally:
        os.close(handle)


def _complete_tree(folder: Path) -> None:
    """Let those read the files who may read the folder, and bring everything to disk."""
    readers = folder.stat().st_mode & (stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
    for path in folder.iterdir():
        if path.is_dir():
            _complete_tree(path)
        else:
            mode = path.lstat().st_mode
            if readers & ~mode and not stat.S_ISLNK(mode):
                path.chmod(stat.S_IMODE(mode) | readers)
            _sync(path)
    _sync(folder)


def _link(partial: Path, place: Path) -> None:
    """Give a file its name unless that is taken, in one step where the file system can."""
    try:
        os.link(partial, place)  # fails where the name is taken, as no rename does
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if place.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        partial.replace(place)
