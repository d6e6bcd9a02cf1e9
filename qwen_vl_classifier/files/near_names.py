"""Suggest files with nearly the requested name: in another case or Unicode form, with a blank, in a subfolder."""

from __future__ import annotations

import functools
import itertools
import os
import unicodedata
from pathlib import Path

_MAX_ENTRIES = 100_000  # of one folder
_MAX_SUBFOLDERS = 50


def beside(path: str | os.PathLike[str]) -> str:
    """Describe a file with nearly the same name in the folder of a missing file; return "" if there is none.

    Example:
        >>> beside("no/such/folder/a.png")
        ''
    """
    folder, name = os.path.split(os.fspath(path))
    return NearNames(Path(folder or ".")).describe(name)


class NearNames:
    """Find files with nearly a name in a folder and below; links to folders are not followed.

    Args:
        folder: The folder that names are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listing = functools.cache(_listing)  # many rows may have the same mistake

    def describe(self, name: str) -> str:
        """Describe a file with nearly a name, such as "there is 'a.png', in another case"; "" if there is none."""
        found = self.find(name)
        if not found:
            return ""
        if found == name.replace("\\", "/"):
            how = "with / in place of \\"
        elif _composed(found) == _composed(name):
            how = "the same in another Unicode form"
        elif found.strip() == name.strip():
            how = "with other spaces around it"
        elif _folded(found) == _folded(name):
            how = "in another case"
        elif os.path.basename(found) == os.path.basename(name):  # noqa: PTH119
            how = "in another folder"
        else:
            how = ""
        return f"there is {found!r}{', ' * bool(how)}{how}"

    def find(self, name: str) -> str:
        """Return the relative path of a file with nearly a name; "" if there is none."""
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if not parts or ".." in parts or "\0" in name:
            return ""
        for first in range(len(parts)):  # a row may name folders that are above the data file
            if found := self._walk(self._folder, parts[first:]):
                return found
        folders, _ = self._listing(self._folder)
        for subfolder in itertools.islice(folders.values(), _MAX_SUBFOLDERS):
            if found := self._walk(self._folder / subfolder, parts):
                return f"{subfolder}/{found}"
        return ""

    def _walk(self, folder: Path, parts: list[str]) -> str:
        walked = []
        for part in parts[:-1]:
            folders, _ = self._listing(folder)
            actual = folders.get(_folded(part))
            if actual is None:
                return ""
            walked.append(actual)
            folder /= actual
        _, files = self._listing(folder)
        last = files.get(_folded(parts[-1])) or files.get(_stem(_folded(parts[-1])))
        return "/".join([*walked, last]) if last else ""


def _listing(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return names of folders and files by their normalised form; files also without their suffix."""
    folders: dict[str, str] = {}
    files: dict[str, str] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, _MAX_ENTRIES):
                if entry.is_dir(follow_symlinks=False):
                    folders[_folded(entry.name)] = entry.name
                elif entry.is_file(follow_symlinks=False):
                    files[_folded(entry.name)] = entry.name
    except (OSError, ValueError):
        return {}, {}
    for name in list(files.values()):
        files.setdefault(_stem(_folded(name)), name)
    return folders, files


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).strip().casefold()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122
