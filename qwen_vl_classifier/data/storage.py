"""Where files lie: on this machine, or in a store named by URL (s3://, gs://, hdfs://, memory://, ...)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO


class Folder:
    """A folder of output, on this machine or in a store. Names are relative, with "/" between their parts.

    Attributes:
        path: The folder, for messages.
        is_local: Whether it lies on this machine's file systems, so that it can be locked.
    """

    path: str
    is_local: bool

    def read(self, name: str) -> bytes:
        """Return what a file holds.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: It cannot be read.
        """
        raise NotImplementedError

    def write(self, name: str, content: bytes | Callable[[BinaryIO], object], *, once: bool = False) -> None:
        """Write a file, whole or not at all; on return it is there to stay, and so are the folders it needs.

        Args:
            name: Its name.
            content: What to write, or a function that writes it to the file it is given.
            once: Fail where the file is there already.

        Raises:
            FileExistsError: It is there already, and `once` was asked for.
            OSError: It cannot be written; nothing of it is visible.
        """
        raise NotImplementedError

    def names(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of all files below that begin with `prefix`, in order, without what a kill left."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is fine."""
        raise NotImplementedError

    def sweep(self) -> None:
        """Remove what writers that were killed left behind; only while nobody else writes."""
        raise NotImplementedError


def open_folder(location: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Folder:
    """Return a folder by path or URL. Nothing is made or looked at yet.

    Args:
        location: A path, or a URL of a store.
        options: Options of fsspec for a store.

    Raises:
        ConfigError: The URL is of no known store, or holds a password.
        MissingExtraError: It is a URL, and fsspec is not installed.
    """
    raise NotImplementedError
