"""Find the storage that a path or URL names, and keep a folder of output there."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen_vl_classifier.files.object_stores import UrlStorage
from qwen_vl_classifier.files.paths import is_url, local_path
from qwen_vl_classifier.files.storage import Content, LocalStorage, Storage
from qwen_vl_classifier.files.whole import PARTIAL, is_partial


class Folder:
    """A folder of output, on this machine or in a store. Names are relative, with "/" between their parts.

    Args:
        storage: Where it lies.
        path: Its path or URL there.

    Attributes:
        path: The folder, for messages.
        is_local: Whether it lies on this machine's file systems, so that it can be locked.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage = storage
        self.path = path
        self.is_local = storage.is_local

    def read(self, name: str) -> bytes:
        """Return what a file holds.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: It cannot be read.
        """
        return self._storage.read(self._place(name))

    def write(self, name: str, content: Content, *, once: bool = False) -> None:
        """Write a file, whole or not at all; on return it is there to stay, and so are the folders it needs.

        Args:
            name: Its name.
            content: What to write, or a function that writes it to the file it is given.
            once: Fail where the file is there already.

        Raises:
            FileExistsError: It is there already, and `once` was asked for.
            OSError: It cannot be written; nothing of it is visible.
        """
        self._storage.write(self._place(name), content, once=once)

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of all files below that begin with `prefix`, in order, without what a kill left.

        Raises:
            OSError: The folder cannot be read; one that is not there is empty.
        """
        return (name for name in self._names(prefix) if not is_partial(name))

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is fine.

        Raises:
            OSError: It cannot be removed.
        """
        with suppress(FileNotFoundError):
            self._storage.remove(self._place(name))

    def sweep(self, name: str = "") -> None:
        """Remove what writers that were killed left of a file, or of all files; only while nobody else writes them.

        Args:
            name: The name of the file that was to be complete; "" stands for all.

        Raises:
            OSError: It cannot be removed.
        """
        folder, end = posixpath.split(name)
        prefix = posixpath.join(folder, f".{end}.") if name else ""
        for left in [left for left in self._names(prefix) if is_partial(left)]:
            if not name or posixpath.basename(left).removesuffix(PARTIAL).rpartition(".")[0] == f".{end}":
                self.remove(left)

    def _names(self, prefix: str) -> Iterator[str]:
        inner = posixpath.dirname(prefix)
        try:
            for entry in self._storage.tree(self._place(inner) if inner else self.path):
                name = posixpath.join(inner, entry.name)
                if name.startswith(prefix):
                    yield name
        except FileNotFoundError:
            return

    def _place(self, name: str) -> str:
        if name.startswith("/") or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"{name!r} is no name of a file in a folder")
        return self._storage.join(self.path, name)


def storage_of(location: str, options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage that a path or URL names.

    Raises:
        ConfigError: The URL is of no known store, or holds a password.
        MissingExtraError: It is a URL, and fsspec is not installed.
    """
    if "://" not in location and not is_url(location):
        return LocalStorage()
    return UrlStorage(location, options or {})


def open_folder(location: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Folder:
    """Return a folder by path or URL. Nothing is made or looked at yet.

    Args:
        location: A path, or a URL of a store.
        options: Options of fsspec for a store.

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
