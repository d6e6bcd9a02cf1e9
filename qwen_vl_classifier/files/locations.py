"""Open a folder of output by path or URL, on this machine or in a store."""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_vl_classifier.files.bounded import MOST_JSON, open_regular_file, read_file
from qwen_vl_classifier.files.object_stores import UrlStorage
from qwen_vl_classifier.files.paths import is_url, local_path
from qwen_vl_classifier.files.storage import Content, Entry, LocalStorage, Storage
from qwen_vl_classifier.files.whole import PARTIAL, is_partial


class Folder:
    """A folder of output, on this machine or in a store. Names are relative, with "/" between their parts.

    Args:
        storage: The storage of the folder.
        path: Its path or URL.

    Attributes:
        path: Its path or URL, for messages.
        is_local: Whether it is on this machine's file systems, so that it can be locked.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage = storage
        self.path = path
        self.is_local = storage.is_local

    def read(self, name: str, most: int = MOST_JSON) -> bytes:
        """Return the content of a regular file inside the folder, of at most `most` bytes.

        Raises:
            FileNotFoundError: The file does not exist.
            OSError: The file cannot be read, or is larger, or leads out of the folder.
        """
        if self.is_local:
            return read_file(self._path(name), most=most, inside=self.path)
        content = self._storage.read(self._path(name), most + 1)
        if len(content) > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
        return content

    def digest(self, name: str, sizes: Collection[int]) -> tuple[int, str]:
        """Return the size of a file and its SHA-256 in hexadecimal, which is "" where it has none of these sizes.

        Raises:
            FileNotFoundError: The file does not exist.
            OSError: The file cannot be read.
        """
        if not self.is_local:
            content = self._storage.read(self._path(name))
            return len(content), hashlib.sha256(content).hexdigest()
        with open_regular_file(self._path(name)) as file:
            size = os.fstat(file.fileno()).st_size
            return size, hashlib.file_digest(file, "sha256").hexdigest() if size in sizes else ""

    def write(self, name: str, content: Content, *, once: bool = False) -> None:
        """Write a file, whole or not at all; on return it is on disk, and so are its folders.

        Args:
            name: Its name.
            content: Its content, or a function that writes to the file it receives.
            once: Fail if the file exists.

        Raises:
            FileExistsError: The file exists, and `once` is set.
            OSError: The file cannot be written; nothing of it is visible.
        """
        self._storage.write(self._path(name), content, once=once)

    def move(self, name: str, other: str) -> None:
        """Rename a file, or whatever has its name, to a name that is free.

        Raises:
            OSError: It cannot be moved.
        """
        self._storage.move(self._path(name), self._path(other))

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of all files that begin with `prefix`, in order, without partial files.

        Raises:
            OSError: The folder cannot be read; a missing folder counts as empty.
        """
        return (entry.name for entry in self.entries(prefix))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yield all files that begin with `prefix`, with their sizes: as `names`."""
        return (entry for entry in self._entries(prefix) if not is_partial(entry.name))

    def remove(self, name: str) -> None:
        """Remove a file if it exists.

        Raises:
            OSError: The file cannot be removed.
        """
        with suppress(FileNotFoundError):
            self._storage.remove(self._path(name))

    def sweep(self, name: str = "") -> None:
        """Remove partial files of killed writers; call it only while nobody else writes these files.

        Args:
            name: The name of the complete file; "" stands for all files.

        Raises:
            OSError: A file cannot be removed.
        """
        folder, end = posixpath.split(name)
        prefix = posixpath.join(folder, f".{end}.") if name else ""
        for left in [entry.name for entry in self._entries(prefix) if is_partial(entry.name)]:
            if not name or posixpath.basename(left).removesuffix(PARTIAL).rpartition(".")[0] == f".{end}":
                self.remove(left)

    def _entries(self, prefix: str) -> Iterator[Entry]:
        inner = posixpath.dirname(prefix)
        try:
            for entry in self._storage.tree(self._path(inner) if inner else self.path):
                name = posixpath.join(inner, entry.name)
                if name.startswith(prefix):
                    yield replace(entry, name=name)
        except FileNotFoundError:
            return

    def _path(self, name: str) -> str:
        if name.startswith("/") or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"{name!r} is not the name of a file inside a folder")
        return self._storage.join(self.path, name)


def storage_of(location: str, options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage of a path or URL.

    Raises:
        ConfigError: The URL is of no known store, or holds a password.
        MissingExtraError: It is a URL, and fsspec is not installed.
    """
    if "://" not in location and not is_url(location):
        return LocalStorage()
    return UrlStorage(location, options or {})


def open_folder(location: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Folder:
    """Return a folder by path or URL, without accessing it yet.

    Args:
        location: A path, or a URL of a store.
        options: fsspec's options for a store.

    Raises:
        ConfigError: The URL is of no known store, or holds a password.
        MissingExtraError: It is a URL, and fsspec is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = open_folder(place)
        ...     folder.write("shards/0", b"scores")
        ...     list(folder.names()), folder.read("shards/0")
        (['shards/0'], b'scores')
    """
    path = local_path(os.fspath(location))
    return Folder(storage_of(path, options), path if is_url(path) else str(Path(path)))
