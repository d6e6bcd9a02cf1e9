"""Where the rows of a data set lie: data files, by name, glob or folder; a folder of pictures; or rows in Python."""

from __future__ import annotations

import hashlib
import itertools
import os
import posixpath
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from qwen_vl_classifier.config.fields import MAX_TEXT_CHARS
from qwen_vl_classifier.config.spelling import flags_in_use, name_flags
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.folders import IMAGE_SUFFIXES, METADATA, is_leftover, metadata_name, picture_problem, walk
from qwen_vl_classifier.data.in_memory import dataset_rows, frame_rows, is_dataset, is_frame, iterable_rows
from qwen_vl_classifier.data.locating import Locate, file_locator, store_locator
from qwen_vl_classifier.data.readers import read_table
from qwen_vl_classifier.data.table import Columns, LoadOptions, Row, settled
from qwen_vl_classifier.data.text_files import FORMATS, advice_for, format_of
from qwen_vl_classifier.errors import DataError, ImageError
from qwen_vl_classifier.files.locations import storage_of
from qwen_vl_classifier.files.paths import local_path
from qwen_vl_classifier.files.storage import LocalStorage, Storage
from qwen_vl_classifier.images.identity import picture_identity
from qwen_vl_classifier.images.limits import ImageLimits, current_limits, set_image_limits

_EXPECTED = f"expected {', '.join(FORMATS)} files by name, glob or folder, or a folder of pictures"
_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """How the rows of a data set are read; `make_plan` makes it. JSON in both directions.

    Attributes:
        format: "jsonl", "csv", "tsv", "json", "parquet", "pictures" (a folder of these) or "given" (rows in Python).
        name: The data, for messages.
        unit: What a row's number counts: "line", "row" or "picture".
        columns: Names of the columns.
        text: One text for all rows, in place of the text column.
        allow_outside: Allow image paths to leave the folder of their data file.
        max_text_chars: Longest text of an example.
        url_hosts: Hosts from which pictures may be fetched; none where URLs are off.
        kept: Columns whose values go along with each row, as text.
        root: Where there are several files, the folder that holds them: messages name them by what follows.
        limits: Which pictures are let in.
        flags: Whether messages name options as the command line does.
        storage_options: Options of fsspec for data by URL. They may hold secrets: never show or keep them.
    """

    format: str
    name: str
    unit: str
    columns: Columns
    text: str | None = None
    allow_outside: bool = False
    max_text_chars: int = MAX_TEXT_CHARS
    url_hosts: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    root: str = ""
    limits: ImageLimits = field(default_factory=current_limits)
    flags: bool = field(default_factory=flags_in_use)
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SourceSpec:
        """Make a specification from its fields."""
        return cls(
            **{
                **record,
                "columns": Columns(**record["columns"]),
                "url_hosts": tuple(record["url_hosts"]),
                "kept": tuple(record["kept"]),
                "limits": ImageLimits.from_json(record["limits"]),
            }
        )

    def adopt(self) -> None:
        """Apply the driver's picture limits and spelling of options in the process of a worker."""
        set_image_limits(self.limits)
        name_flags(self.flags)


def picture_locator(spec: SourceSpec, source: str, storage: Storage | None) -> Locate:
    """Return a function from what a row calls a picture to where it is.

    Args:
        spec: How rows are read.
        source: Path or URL of the data file, or of the folder of pictures.
        storage: Where it lies; `None` for rows given in Python.
    """
    confined, urls = not spec.allow_outside, bool(spec.url_hosts)
    if storage is None:
        return file_locator(None, confined=confined, urls=urls)
    folder = source if spec.format == "pictures" else storage.parent(source)
    if not storage.is_local:
        return store_locator(folder, confined=confined, urls=urls)
    return file_locator(Path(folder), confined=confined, urls=urls)


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

    def some(self, start: int, count: int) -> tuple[str, ...]:
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
        raise DataError(f"the path of the data is empty; {_EXPECTED}; name one")
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
        raise DataError(f"{shown} cannot be opened ({error.strerror}); {_EXPECTED}; check the path") from None
    if found.kind == "folder":
        return _in_folder(storage, location)
    if found.kind == "other":
        raise DataError(f"{shown} is a pipe, socket or device; {_EXPECTED}; copy it to a file")
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
            walk(folder, follow_links=follow_links)
            if isinstance(files.storage, LocalStorage)
            else files.storage.tree(folder)
        )
        for entry in found:
            if not any(map(is_leftover, entry.name.split("/"))):
                names.append(entry.name, entry.size)
                seen = seen or is_picture(files, entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); expected a folder; check it") from None
    if not seen:
        raise DataError(f"{folder} holds neither pictures nor data files; {_EXPECTED}; check the path")
    return names


def is_picture(files: DataFiles, name: str) -> bool:
    """Tell whether a file in a folder of pictures is one, by its header where its name does not say so."""
    if files.storage.is_local:
        return not picture_problem(Path(files.root), name)
    return name.lower().endswith(IMAGE_SUFFIXES)


def _matching(storage: Storage, pattern: str) -> DataFiles:
    try:
        paths = [path for path in storage.glob(pattern) if not _is_hidden(path)]
    except OSError as error:
        raise DataError(f"{pattern[:300]!r} cannot be searched ({error.strerror}); {_EXPECTED}; check it") from None
    if not paths:
        raise DataError(f"{pattern[:300]!r} matches no file; {_EXPECTED}; check the pattern")
    root = _MAGIC.split(pattern, maxsplit=1)[0].rpartition("/")[0]
    return DataFiles(storage, _one_format(paths, repr(pattern[:300])), root, tuple(paths))


def _in_folder(storage: Storage, folder: str) -> DataFiles:
    try:
        entries = [entry for entry in storage.entries(folder) if not _is_hidden(entry.name)]
    except OSError as error:
        raise DataError(f"{folder[:300]!r} cannot be read ({error.strerror}); {_EXPECTED}; check it") from None
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
        raise DataError(f"{shown} ends in {suffix[:20]!r}; {_EXPECTED}; {advice_for(suffix)}")
    beside = next(name for name in names if name != other)
    raise DataError(
        f"{shown} holds {posixpath.basename(other)[:100]!r} beside {posixpath.basename(beside)[:100]!r}; expected data "
        "files of one format; choose them with a glob such as 'folder/*.jsonl'"
    )


def _format(name: str) -> str | None:
    return format_of(posixpath.basename(name))


def _is_hidden(path: str) -> bool:
    name = posixpath.basename(path)
    return name.startswith("_") or is_leftover(name)


class GivenRows:
    """Rows that this process holds.

    Args:
        source: A Hugging Face data set, a table in memory, one row, or an iterable of rows, which is read to its end.
        columns: Names of the columns.

    Attributes:
        name: The source, for messages.

    Raises:
        DataError: It is something else.
    """

    def __init__(self, source: Any, columns: Columns) -> None:
        self.name = read_table(source, LoadOptions(columns)).name
        if isinstance(source, (Example, Mapping)):
            source = [source]
        in_place = isinstance(source, (list, tuple)) or is_dataset(source) or is_frame(source)
        self._items: Any = source if in_place else list(source)
        self._columns = columns

    def __len__(self) -> int:
        return len(self._items)

    def rows(self, start: int, count: int) -> Iterator[Row]:
        """Yield consecutive rows, numbered from 1 in all of the source."""
        stop = min(start + count, len(self))
        needed = self._columns.needed
        if is_frame(self._items):
            yield from frame_rows(self._items, needed, start, stop)
            return
        if not is_dataset(self._items):
            yield from iterable_rows(self._items[start:stop], self._columns, start + 1)
            return
        chosen = self._items.select(range(start, stop))
        for row in dataset_rows(chosen, self._columns.label, needed=needed):
            yield replace(row, number=start + row.number)

    def digest(self, count: int, kept: Sequence[str] = ()) -> str:
        """Return the SHA-256 of the pictures, texts and ids of the first rows, and of further columns."""
        digest = hashlib.sha256()
        names = (self._columns.image, *self._columns.file_names, self._columns.text, self._columns.id, *kept)
        for row in self.rows(0, count):
            values = settled(row.values, self._columns.needed)
            cells = [_stable(values.get(name)) for name in names]
            digest.update(repr([row.problem, *cells]).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()


def _stable(cell: Any) -> object:
    """Return something whose `repr` is the same for the same content, in every process."""
    if isinstance(cell, Image.Image):
        try:
            return ("picture", picture_identity(cell).hex())
        except ImageError as error:
            return str(error)
    if isinstance(cell, bytes):
        return ("bytes", hashlib.sha256(cell).hexdigest())
    if isinstance(cell, Mapping):
        return {name: _stable(value) for name, value in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [_stable(one) for one in cell]
    return os.fspath(cell) if isinstance(cell, os.PathLike) else cell
