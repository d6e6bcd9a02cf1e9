"""Storages of files: this machine, or a store named by URL (s3://, gs://, hdfs://, memory://, ...).

Files are written whole or not at all. On this machine and on network file systems, a file is written beside its path,
brought to disk and renamed. Object stores have no rename, only a copy followed by a deletion, which a kill can
interrupt. But one put of a whole object is atomic: readers see the old object or the new one, and on S3 every read
after the put sees the new one (strong consistency since December 2020). So an object is put at once under its final
key. Two writers of the same key do no harm as long as both write the same bytes, as is the case for the scores of a
shard. Where only the first may win, `once` requests a put that fails if the key exists (S3: `If-None-Match: *`, since
August 2024). Network file systems have no such request; there, existence is checked just before.
"""

from __future__ import annotations

import errno
import glob
import os
import posixpath
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

from qwen_vl_classifier.files.bounded import open_regular_file
from qwen_vl_classifier.files.whole import make_folders, new_file

Content: TypeAlias = bytes | Callable[[BinaryIO], object]
"""What to write: bytes, or a function that writes to the file it is given."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in a folder.

    Attributes:
        name: Its name relative to the folder that was listed, with "/" between parts.
        kind: A file, a folder, a link that is a folder, or something else such as a pipe or a broken link.
        size: In bytes, of a file; else 0.
    """

    name: str
    kind: Literal["file", "folder", "linked folder", "other"]
    size: int = 0


class Storage(ABC):
    """Files by path or URL. Errors are an `OSError` whose `strerror` contains neither path, URL nor credentials.

    Attributes:
        is_local: Whether this is the machine's own file system, network mounts included.
    """

    is_local: bool

    @abstractmethod
    def entry(self, path: str) -> Entry:
        """Return the entry at a path; links are followed."""

    @abstractmethod
    def entries(self, folder: str) -> list[Entry]:
        """List a folder in order of names."""

    @abstractmethod
    def tree(self, folder: str) -> Iterator[Entry]:
        """Yield all files below a folder, in order of the parts of their names; no link to a folder is followed."""

    @abstractmethod
    def glob(self, pattern: str) -> list[str]:
        """Return matching paths that are not folders, in order; `**` matches any folders."""

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """Open a file for reading, anywhere in it."""

    @abstractmethod
    def read(self, path: str, most: int = -1) -> bytes:
        """Return the content of a file, or its first `most` bytes."""

    @abstractmethod
    def write(self, path: str, content: Content, *, once: bool = False) -> None:
        """Write a file whole or not at all: see `Folder.write`."""

    @abstractmethod
    def move(self, path: str, other: str) -> None:
        """Rename an existing file to a name that is free."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove an existing file."""

    def join(self, folder: str, name: str) -> str:
        """Return the path of a name in a folder."""
        return f"{folder.rstrip('/')}/{name}" if name else folder

    def parent(self, path: str) -> str:
        """Return the folder of a file."""
        return posixpath.dirname(path)


class LocalStorage(Storage):
    """Files on this machine."""

    is_local = True

    def entry(self, path: str) -> Entry:
        """Return the entry at a path."""
        try:
            status = Path(path).stat()
        except ValueError:  # a NUL in the path, or half of a surrogate pair
            raise OSError(errno.EINVAL, "the path is not valid") from None
        if stat.S_ISREG(status.st_mode):
            return Entry(path, "file", status.st_size)
        return Entry(path, "folder" if stat.S_ISDIR(status.st_mode) else "other")

    def entries(self, folder: str) -> list[Entry]:
        """List a folder; links to folders are a separate kind of entry."""
        with os.scandir(folder) as found:
            return sorted(map(_entry_of, found), key=lambda entry: entry.name)

    def tree(self, folder: str) -> Iterator[Entry]:
        """Yield all files below a folder, one folder after the other."""
        for entry in self.entries(folder):
            if entry.kind == "folder":
                for inner in self.tree(self.join(folder, entry.name)):
                    yield Entry(f"{entry.name}/{inner.name}", inner.kind, inner.size)
            elif entry.kind == "file":
                yield entry

    def glob(self, pattern: str) -> list[str]:
        """Return the files that match, as the shell would find them."""
        return sorted(path for path in glob.glob(pattern, recursive=True) if not Path(path).is_dir())  # noqa: PTH207

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading."""
        return open_regular_file(path)

    def read(self, path: str, most: int = -1) -> bytes:
        """Return the content of a file."""
        with self.open(path) as file:
            return file.read(most)

    def write(self, path: str, content: Content, *, once: bool = False) -> None:
        """Write a file beside its path, bring it to disk, and rename it."""
        place = Path(path)
        make_folders(place.parent)
        with new_file(place, durable=True, once=once, clear=False) as file:  # `Folder.sweep` clears
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)

    def move(self, path: str, other: str) -> None:
        """Rename a file; a link itself is renamed."""
        make_folders(Path(other).parent)
        Path(path).rename(other)

    def remove(self, path: str) -> None:
        """Remove a file."""
        Path(path).unlink()

    def parent(self, path: str) -> str:
        """Return the folder of a file."""
        return str(Path(path).parent)


def _entry_of(found: os.DirEntry[str]) -> Entry:
    try:
        if found.is_dir():
            return Entry(found.name, "linked folder" if found.is_symlink() else "folder")
        if found.is_file():
            return Entry(found.name, "file", found.stat().st_size)
    except OSError:  # links in a circle, or gone meanwhile
        pass
    return Entry(found.name, "other")
