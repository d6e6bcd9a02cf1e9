"""Read and write files by URL through fsspec: object stores, and network file systems that are not mounted."""

from __future__ import annotations

import errno
import io
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from qwen_vl_classifier.errors import ConfigError, MissingExtraError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.files.storage import Content, Entry, Storage
from qwen_vl_classifier.files.whole import partial_name

_OBJECTS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
"""Stores with an atomic put of a whole object, but no atomic rename."""

_FILES = ("hdfs", "webhdfs", "sftp", "ssh", "smb")
"""Stores with an atomic rename, in which partly written files are visible.

A rename does not replace a file there. So a file that is written again is missing for a moment, or, after a kill at
that moment, until the next run writes it.
"""

_BUFFER_BYTES = 1 << 20


class UrlStorage(Storage):
    """Files in one store. Paths are URLs.

    Args:
        url: Any URL of the store.
        options: fsspec's options for this kind of store.

    Raises:
        ConfigError: The URL is of no known store or holds a password, or the options do not fit.
        MissingExtraError: fsspec, or the package that it needs for this store, is not installed.
    """

    is_local = False

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        scheme, _, place = url.partition("://")
        self._scheme = scheme.lower()
        if self._scheme not in (*_OBJECTS, *_FILES):
            raise ConfigError(
                f"{scheme[:20]}:// is not a supported store; expected a local path, or a URL that begins with one of "
                f"{', '.join((*_OBJECTS, *_FILES))}; copy the data to one of these"
            )
        if "@" in place.partition("/")[0] and ":" in place.partition("@")[0]:
            raise ConfigError(
                f"the {scheme}:// URL holds a password, which would be stored with the scores; remove it; pass "
                "credentials in the environment or the store's own configuration"
            )
        fsspec = require("fsspec", extra="scale")
        try:
            parsed = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise MissingExtraError(f"{scheme}:// needs one more package: {str(error)[:200]}") from None
        except Exception as error:
            raise ConfigError(
                f"the store of {scheme}:// cannot be reached ({type(error).__name__}); check URL, options and access"
            ) from None
        self._files = parsed[0]

    def entry(self, path: str) -> Entry:
        """Return the entry at a URL."""
        with _as_os_error():
            info = self._files.info(self._key(path))
        return _entry_of(path, info)

    def entries(self, folder: str) -> list[Entry]:
        """List one level of the store."""
        with _as_os_error():
            self._files.invalidate_cache()
            found = self._files.ls(self._key(folder), detail=True)
        return sorted(self._named(folder, found), key=lambda entry: entry.name)

    def tree(self, folder: str) -> Iterator[Entry]:
        """List all of the store below a URL: object stores do so in few requests."""
        with _as_os_error():
            self._files.invalidate_cache()
            found = self._files.find(self._key(folder), detail=True)
        files = (entry for entry in self._named(folder, found.values()) if entry.kind == "file")
        yield from sorted(files, key=lambda entry: entry.name.split("/"))

    def glob(self, pattern: str) -> list[str]:
        """Return the URLs that match."""
        folder = pattern[: re.search(r"[*?[]|$", pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
        with _as_os_error():
            self._files.invalidate_cache()
            found = self._files.glob(self._key(pattern), detail=True)
        files = (entry for entry in self._named(folder, found.values()) if entry.kind == "file")
        return sorted(self.join(folder, entry.name) for entry in files)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading; what is read is fetched in blocks."""
        with _as_os_error():
            file = self._files.open(self._key(path), "rb")
        # fsspec's own files are slow at finding lines, and their errors differ between stores.
        return io.BufferedReader(_Guarded(file), _BUFFER_BYTES)

    def read(self, path: str, most: int = -1) -> bytes:
        """Fetch a file in one request."""
        with _as_os_error():
            content: bytes = self._files.cat_file(self._key(path), end=None if most < 0 else most)
        return content

    def write(self, path: str, content: Content, *, once: bool = False) -> None:
        """Put a whole object, or write a file beside the path and rename it; see `storage.py`."""
        if not isinstance(content, bytes):
            file = io.BytesIO()
            content(file)
            content = file.getvalue()
        key = self._key(path)
        with _as_os_error():
            if self._scheme not in _OBJECTS:
                self._write_beside(key, content, once=once)
            elif once:
                self._put_once(key, content)
            else:
                self._files.pipe_file(key, content)

    def move(self, path: str, other: str) -> None:
        """Move a file; in an object store that is a copy and a deletion."""
        key = self._key(other)
        with _as_os_error():
            if self._scheme not in _OBJECTS:
                self._files.makedirs(posixpath.dirname(key), exist_ok=True)
            self._files.mv(self._key(path), key)

    def remove(self, path: str) -> None:
        """Remove a file."""
        with _as_os_error():
            self._files.rm_file(self._key(path))

    def parent(self, path: str) -> str:
        """Return the folder of a file."""
        scheme, _, place = path.partition("://")
        return f"{scheme}://{posixpath.dirname(place)}"

    def _put_once(self, key: str, content: bytes) -> None:
        try:
            self._files.pipe_file(key, content, mode="create")
        except Exception:
            self._files.invalidate_cache()
            if self._files.exists(key):  # each store has its own words for that
                raise FileExistsError from None
            raise

    def _write_beside(self, key: str, content: bytes, *, once: bool) -> None:
        if once and self._files.exists(key):
            raise FileExistsError
        folder, name = posixpath.split(key)
        self._files.makedirs(folder, exist_ok=True)
        partial = posixpath.join(folder, partial_name(name))
        try:
            self._files.pipe_file(partial, content)
            if self._files.exists(key):  # HDFS and SFTP rename to no name that is taken
                self._files.rm_file(key)
            self._files.mv(partial, key)
        except BaseException:
            with suppress(Exception):
                self._files.rm_file(partial)
            raise

    def _named(self, folder: str, found: Iterable[Mapping[str, Any]]) -> Iterator[Entry]:
        """Yield entries found below a folder, with names relative to it."""
        start = len(self._key(folder).strip("/"))
        for info in found:
            name = info["name"].strip("/")[start:].strip("/")
            if name:  # some stores list the folder itself too
                yield _entry_of(name, info)

    def _key(self, url: str) -> str:
        key: str = self._files._strip_protocol(url)
        return key


class _Guarded(io.RawIOBase):
    """A file of a store whose errors are those of `Storage`."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _as_os_error():
            content: bytes = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _as_os_error():
            place: int = self._file.seek(offset, whence)
        return place

    def tell(self) -> int:
        place: int = self._file.tell()
        return place

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn any error of a store into an `OSError` without its message, which may contain credentials."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
    except PermissionError:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
    except MemoryError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise OSError(code, f"{os.strerror(code)}, {type(error).__name__}") from None


def _entry_of(name: str, info: Mapping[str, Any]) -> Entry:
    if info["type"] == "directory":
        return Entry(name, "folder")
    return Entry(name, "file", info.get("size") or 0) if info["type"] == "file" else Entry(name, "other")
