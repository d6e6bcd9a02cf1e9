"""What a row calls its picture -> where that picture is; a path may not leave the folder of its data file."""

from __future__ import annotations

import functools
import posixpath
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import shown
from qwen_vl_classifier.files.near_names import NearNames, beside
from qwen_vl_classifier.files.paths import is_url

Locate: TypeAlias = Callable[[str], str]
"""A function from what a row calls a picture to its path or URL; it raises `CellError`."""

INVALID_ROW = "invalid_row"
"""The code of a row that cannot be used for another reason than its picture."""


class CellError(Exception):
    """A cell cannot be used; the message follows the column's name: what it is, and what was wanted.

    Attributes:
        code: What is wrong, in one word for programs: `INVALID_ROW` or a code of `ImageError`.
    """

    def __init__(self, message: str, *, code: str = INVALID_ROW) -> None:
        super().__init__(message)
        self.code = code


def shown_url(url: str) -> str:
    """Describe a URL in an error, without what may be secret in it: password, query and fragment."""
    scheme, mark, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return shown(scheme + mark + host.rpartition("@")[2] + slash + path)


def file_locator(folder: Path | None, *, confined: bool, urls: bool = False, allow_missing: bool = False) -> Locate:
    """Return a function from an image path in a row to that of a file that is there.

    Args:
        folder: Where relative paths begin; `None` for the working directory.
        confined: Refuse what lies outside of `folder`, by an absolute path, by `..` or by a symbolic link.
        urls: Let http:// and https:// URLs through, to be fetched later.
        allow_missing: Let paths through where no file is, to be found when they are opened.
    """
    root = folder.resolve() if folder is not None and confined else None
    names = NearNames(folder or Path())

    @functools.cache  # data sets have few folders: following links for each costs little
    def inside(parent: Path) -> bool:
        return root is None or parent.resolve().is_relative_to(root)

    def link_out(path: Path) -> str:
        """Return the first link on the way to a path that leads outside, or "" where there is none."""
        if folder is None or not path.is_relative_to(folder):
            return ""
        place = folder
        for part in path.relative_to(folder).parts:
            place /= part
            if part == "..":
                return ""
            if place.is_symlink() and not inside(place.resolve()):
                return str(place.relative_to(folder))
        return ""

    @functools.cache  # and often several rows about one picture
    def locate(name: str) -> str:
        if is_url(_not_blank(name)):
            return _fetchable(name, urls)
        path = Path(name) if folder is None else folder / name
        try:
            allowed = inside(path.parent)
            if allowed and path.is_symlink():
                allowed = inside(path.resolve())
            there = allowed and stat.S_ISREG(path.stat().st_mode)
        except (OSError, ValueError, RuntimeError):  # too long; a NUL in it; links in a circle
            allowed, there = True, False
        if not allowed:
            raise _outside(name, link_out(path))
        if not there and not allow_missing:
            if _is_broken_link(path):
                raise CellError(f"{shown(name)} is a link to what is not there, wanted a file", code="image_missing")
            near = beside(path) if path.is_absolute() and Path(name).is_absolute() else names.describe(name)
            raise CellError(f"{shown(name)} is not there, wanted a file{'; ' * bool(near)}{near}", code="image_missing")
        return str(path)

    return locate


def _is_broken_link(path: Path) -> bool:
    try:
        return path.is_symlink() and not path.exists()
    except (OSError, ValueError, RuntimeError):  # as above
        return False


def store_locator(folder: str, *, confined: bool, urls: bool = False) -> Locate:
    """Return a function from an image path in a row to the URL of a picture in the store of its data file.

    Nobody asks the store: whether the picture is there shows when it is read. A store's own links are not followed,
    where it has any: who can make links there can read the whole store anyway.

    Args:
        folder: URL where relative paths begin.
        confined: Refuse what lies outside of `folder`. Else an absolute path begins at the top of the store's bucket
            or host, and another URL of the same kind of store may be given.
        urls: Let http:// and https:// URLs through, to be fetched later.
    """
    scheme, _, place = folder.partition("://")
    host, _, path = place.partition("/")

    def locate(name: str) -> str:
        if name.lower().startswith(f"{scheme}://"):
            if not confined:
                return name
            if not name.startswith(f"{folder}/"):
                raise _outside(name)
            name = name[len(folder) + 1 :]
        elif is_url(_not_blank(name)):
            return _fetchable(name, urls)
        if "\0" in name:
            raise CellError(f"{shown(name)} is not there, wanted a file", code="image_missing")
        if confined and (name.startswith("/") or ".." in name.replace("\\", "/").split("/")):
            raise _outside(name)
        # From "/", so that ".." cannot go above the bucket or host.
        return f"{scheme}://{host}{posixpath.normpath(posixpath.join('/', path, name))}"

    return locate


def _not_blank(name: str) -> str:
    if not name:
        raise CellError("is blank, wanted a path or null")
    return name


def _fetchable(url: str, urls: bool) -> str:
    if not urls:
        raise CellError(f"{shown_url(url)} is a URL, wanted a file since URLs are off", code="image_refused")
    if not url.lower().startswith(("http://", "https://")):
        raise CellError(f"{shown_url(url)} is a URL of another kind, wanted http:// or https://", code="image_refused")
    return url


def _outside(name: str, link: str = "") -> CellError:
    through = f" (through the link {shown(link)})" if link else ""
    permit = spelled("allow_outside", True)
    return CellError(
        f"{shown_url(name)}{through} is outside the folder of the data file; add {permit} to permit it",
        code="image_refused",
    )
