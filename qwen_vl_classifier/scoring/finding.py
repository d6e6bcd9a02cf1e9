"""What a path or URL names: one data file, a glob or a folder of these, or a folder of pictures."""

from __future__ import annotations

import hashlib
import itertools
import os
import posixpath
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_classifier.data.folders import IMAGE_SUFFIXES, METADATA, is_leftover, metadata_name, problem_of, walk
from qwen_vl_classifier.data.text_files import FORMATS, format_of
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.files.locations import storage_of
from qwen_vl_classifier.files.paths import local_path
from qwen_vl_classifier.files.storage import LocalStorage, Storage

_WANTED = f"wanted {', '.join(FORMATS)} files by name, glob or folder, or a folder of pictures"
_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class DataFiles:
    """What was found.

    Attributes:
        storage: Where it lies.
        format: "jsonl", "csv", "tsv", "json", "parquet" or "pictures".
        root: The folder that holds everything, by which files have names that do not change when it is moved.
        paths: Paths or URLs of the files, in order; of pictures, their folder alone.
    """

    storage: Storage
    format: str
    root: str
    paths: tuple[str, ...]

    def name(self, path: str) -> str:
        """Return the name of a file in `root`."""
        return path.removeprefix(self.root).lstrip("/")


class PictureNames:
    """Names of the pictures of a folder, in order: in memory they take little more than their letters."""

    def __init__(self) -> None:
        self._letters = bytearray()
        self._ends = array("Q", [0])
        self._digest = hashlib.sha256()

    def append(self, name: str, size: int) -> None:
        """Add a picture by its name in the folder and its size in bytes."""
        encoded = os.fsencode(name)
        self._letters += encoded
        self._ends.append(len(self._letters))
        self._digest.update(b"%b\0%d\0" % (encoded, size))

    def digest(self) -> str:
        """Return the SHA-256 of all names and sizes."""
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def part(self, start: int, count: int) -> tuple[str, ...]:
        """Return consecutive names."""
        ends = self._ends[start : start + count + 1]
        return tuple(os.fsdecode(bytes(self._letters[begin:end])) for begin, end in itertools.pairwise(ends))


def find_files(location: str, options: Mapping[str, Any] | None = None) -> DataFiles:
    """Find the files of a data set.

    A folder that holds data files is read as these, in order of name, but for names that begin with "." or "_"; what
    lies in its subfolders is left alone. One that holds none is a folder of pictures, subfolders included.

    Args:
        location: Path, URL of a store, or glob of either.
        options: Options of fsspec for a URL.

    Raises:
        DataError: There is nothing, or something else, or files of several formats.
        ConfigError: The URL is of no known store, or holds a password.
        MissingExtraError: It is a URL, and fsspec is not installed.
    """
    if not location:
        raise DataError(f"the path of the data is empty; {_WANTED}; name one")
    location = local_path(location)
    storage = storage_of(location, options)
    shown = repr(location[:300])
    if storage.is_local:
        location = str(Path(location).absolute())  # workers may stand elsewhere
    try:
        found = storage.entry(location)
    except OSError as error:
        if _MAGIC.search(location):
            return _matching(storage, location)
        raise DataError(f"{shown} cannot be opened ({error.strerror}); {_WANTED}; check the path") from None
    if found.kind == "folder":
        return _in_folder(storage, location)
    if found.kind == "other":
        raise DataError(f"{shown} is a pipe, socket or device; {_WANTED}; copy it to a file")
    return DataFiles(storage, _one_format([location], shown), storage.parent(location), (location,))


def list_pictures(files: DataFiles, *, follow_links: bool) -> PictureNames:
    """List a folder of pictures with all its subfolders, in order of name; hidden files and leftovers are left out.

    Args:
        files: The folder.
        follow_links: Enter links to folders that lead outside.

    Raises:
        DataError: It cannot be read, or holds no picture, or a link to a folder that is not to be followed.
    """
    names, seen = PictureNames(), False
    (folder,) = files.paths
    try:
        found = (
            walk(folder, files.storage, follow_links=follow_links)
            if isinstance(files.storage, LocalStorage)
            else files.storage.tree(folder)
        )
        for entry in found:
            if not any(map(is_leftover, entry.name.split("/"))):
                names.append(entry.name, entry.size)
                seen = seen or is_picture(files, entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); wanted a folder; check it") from None
    if not seen:
        raise DataError(f"{folder} holds neither pictures nor data files; {_WANTED}; check the path")
    return names


def is_picture(files: DataFiles, name: str) -> bool:
    """Tell whether a file in a folder of pictures is one, by its header where its name does not say so."""
    if files.storage.is_local:
        return not problem_of(Path(files.root), name)
    return name.lower().endswith(IMAGE_SUFFIXES)


def _matching(storage: Storage, pattern: str) -> DataFiles:
    try:
        paths = [path for path in storage.glob(pattern) if not _is_hidden(path)]
    except OSError as error:
        raise DataError(f"{pattern[:300]!r} cannot be looked for ({error.strerror}); {_WANTED}; check it") from None
    if not paths:
        raise DataError(f"{pattern[:300]!r} matches no file; {_WANTED}; check the pattern")
    root = _MAGIC.split(pattern, maxsplit=1)[0].rpartition("/")[0]
    return DataFiles(storage, _one_format(paths, repr(pattern[:300])), root, tuple(paths))


def _in_folder(storage: Storage, folder: str) -> DataFiles:
    try:
        entries = [entry for entry in storage.entries(folder) if not _is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"{folder[:300]!r} cannot be read ({error.strerror}); {_WANTED}; check it") from None
    names = [entry.name for entry in entries if entry.kind in ("file", "other")]  # others cannot be opened: an error
    # JSON lies beside pictures for many reasons: alone in a folder it is data.
    tables = [name for name in names if _format(name) not in (None, "json")] or (
        names if all(_format(name) == "json" for name in names) else []
    )
    if not tables:
        return DataFiles(storage, "pictures", folder, (folder,))
    if all(name in METADATA for name in tables) and (metadata := metadata_name(tables, folder)):
        return DataFiles(storage, FORMATS[posixpath.splitext(metadata)[1]], folder, (storage.join(folder, metadata),))
    kind = _one_format(names, repr(folder[:300]))
    return DataFiles(storage, kind, folder, tuple(storage.join(folder, name) for name in names))


def _one_format(names: list[str], shown: str) -> str:
    first = names[0]
    kind = _format(first)
    other = first if kind is None else next((name for name in names if _format(name) != kind), None)
    if other is None:
        assert kind is not None
        return kind
    if len(names) == 1:
        suffix = posixpath.splitext(other)[1]
        raise DataError(f"{shown} ends in {suffix[:20]!r}; {_WANTED}; convert or rename it")
    beside = next(name for name in names if name != other)
    raise DataError(
        f"{shown} holds {posixpath.basename(other)[:100]!r} beside {posixpath.basename(beside)[:100]!r}; wanted data "
        "files of one format; say which by a glob such as 'folder/*.jsonl'"
    )


def _format(name: str) -> str | None:
    return format_of(posixpath.basename(name))


def _is_hidden(path: str) -> bool:
    name = posixpath.basename(path)
    return name.startswith("_") or is_leftover(name)
