"""Folders of pictures: a subfolder for each class, or one file of metadata beside the pictures.

Files that operating systems and archives leave beside pictures are passed over. A link to a folder is followed if it
stays inside; the folder that a user names may itself be a link.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.labels import listed_counts
from qwen_vl_classifier.data.table import LoadOptions, Row
from qwen_vl_classifier.data.text_files import format_of
from qwen_vl_classifier.errors import DataError, ImageError
from qwen_vl_classifier.files.storage import Entry, LocalStorage
from qwen_vl_classifier.images.opening import image_size

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Files with these suffixes count as pictures until they are opened; the headers of all others are read."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files that name the pictures of their folder, in Hugging Face's layout "imagefolder"."""

_LEFTOVERS = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "lost+found"))
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"))
_PLAIN_CLASSES = ["0", "1"]


def is_leftover(name: str) -> bool:
    """Tell whether a file or folder is hidden, or one that systems and archives leave behind."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


def metadata_name(names: Iterable[str], folder: str) -> str | None:
    """Return which of the names in a folder is its file of metadata, or `None`.

    Raises:
        DataError: There are several.
    """
    found = [name for name in names if name in METADATA]
    if len(found) > 1:
        raise DataError(f"{folder} holds {' and '.join(found)}; expected one file of metadata; name the one to read")
    return found[0] if found else None


def folder_rows(folder: Path, options: LoadOptions) -> Iterator[Row]:
    """Read the pictures of a folder, in order of name; each subfolder is a class and may have subfolders of its own.

    Raises:
        DataError: Its subfolders are not classes, or nothing says which of them is class 1.
        OSError: It cannot be read.
    """
    columns, names = options.columns, _classes(folder, options)
    label_of = {name: int(name) if names == _PLAIN_CLASSES else name for name in names}
    number = 0
    for entry in walk(str(folder), follow_links=options.allow_outside):
        first, slash, _ = entry.name.partition("/")
        if names and not slash:  # beside the class folders
            if (folder / first).is_symlink() and not (folder / first).exists():  # as of a disk that is not mounted
                raise DataError(
                    f"{folder / first} is a broken link; expected a folder of pictures or a file; "
                    "mount what it leads to, or remove the link"
                )
            continue
        number += 1
        problem = picture_problem(folder, entry.name)
        if problem:
            yield Row(number, problem=problem)
        else:
            yield Row(number, {columns.image: entry.name} | ({columns.label: label_of[first]} if names else {}))


def picture_problem(folder: Path, name: str) -> str:
    """Return what is wrong with a file in a folder of pictures by its header, else ""; see `IMAGE_SUFFIXES`."""
    if name.lower().endswith(IMAGE_SUFFIXES):
        return ""
    try:
        image_size(folder / name)
    except ImageError as error:
        return f"{name!r} in a folder of pictures: {error}"
    return ""


def walk(folder: str, *, follow_links: bool, root: str = "", above: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Yield the files in a folder of this machine and below, in order of the parts of their names.

    Hidden files and leftovers are passed over. What cannot be opened is yielded too, so that it becomes an error. A
    link back to a folder in which it lies is not followed.

    Args:
        folder: Where to begin.
        follow_links: Enter links to folders that lead outside.
        root: The real path of the folder that links may not leave; that of `folder` where it is empty.
        above: Real paths of the folders on the way here.

    Raises:
        DataError: A link to a folder leads outside, and is not to be followed.
        OSError: A folder cannot be read.
    """
    here = os.path.realpath(folder)
    root, above = root or here, (*above, here)
    for entry in LocalStorage().entries(folder):
        if is_leftover(entry.name):
            continue
        if entry.kind in ("file", "other"):
            yield entry
            continue
        path = f"{folder}/{entry.name}"
        if entry.kind == "linked folder":
            target = os.path.realpath(path)
            if target in above:
                continue
            if not follow_links and not Path(target).is_relative_to(root):
                raise DataError(
                    f"{path} is a link to a folder that leads out of {root}; expected folders; add "
                    f"{spelled('allow_outside', True)} to follow it, or give the folder that it leads to"
                )
        for inner in walk(path, follow_links=follow_links, root=root, above=above):
            yield Entry(f"{entry.name}/{inner.name}", inner.kind, inner.size)


def _classes(folder: Path, options: LoadOptions) -> list[str]:
    """Return the names of the subfolders that are classes; none where pictures have no labels."""
    if not options.read_labels and not options.one_of:
        return []
    entries = [entry for entry in LocalStorage().entries(str(folder)) if not is_leftover(entry.name)]
    names = [entry.name for entry in entries if entry.kind in ("folder", "linked folder")]
    if names == _PLAIN_CLASSES:
        return names
    tables = [entry.name for entry in entries if entry.kind == "file" and format_of(entry.name)]
    if tables:
        raise DataError(
            f"{folder} holds the data file {tables[0]!r}; expected pictures in a folder for each class; to read that "
            f"file name it: {folder / tables[0]}"
        )
    if names and all(name.lower() in _SPLITS for name in names):
        raise DataError(
            f"{folder} holds the parts {_quoted(names)} of a data set; expected one of them; name it, such as "
            f"{folder / names[0]}"
        )
    if len(names) == 1:
        raise DataError(
            f"{folder} holds one folder, {names[0]!r}; expected one for each of two classes, such as 0 and 1; if the "
            f"classes are inside, name it: {folder / names[0]}"
        )
    if not names and options.require_labels:
        raise DataError(
            f"{folder} has no subfolders; expected one for each class, such as 0 and 1, with the pictures of that "
            "class; sort the pictures so, or name a data file with labels"
        )
    if names and not options.has_words and not options.one_of:
        files = walk(str(folder), follow_links=options.allow_outside)
        counts = Counter(entry.name.partition("/")[0] for entry in files if "/" in entry.name)
        raise DataError(
            f"{folder} has the class folders {listed_counts(counts, 'files') or _quoted(names)}; expected 0 and 1, or "
            f"{spelled('positive')} with the name of the one that counts as 1, every other then counting as 0"
        )
    return names


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, itertools.islice(names, 10)))
