"""Find a picture by its name in a row; a path may not leave the folder of its data file."""

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
"""A function from the name of a picture in a row to its path or URL; it raises `CellError`."""

INVALID_ROW = "invalid_row"
"""The code of a row that cannot be used for any reason but its picture."""


class CellError(Exception):
    """A cell cannot be used; the message follows the name of the column: what it is, and what was expected.

    Attributes:
        code: What is wrong, in one word for programs: `INVALID_ROW` or a code of `ImageError`.
    """

    def __init__(self, message: str, *, code: str = INVALID_ROW) -> None:
        super().__init__(message)
        self.code = code


def shown_url(url: str) -> str:
    """Describe a URL in an error, without parts that may be secret: password, query and fragment."""
    scheme, mark, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return shown(scheme + mark + host.rpartition("@")[2] + slash + path)


def file_locator(folder: Path | None, *, confined: bool, urls: bool = False) -> Locate:
    """Return a function from an image path in a row to the path of a file that exists.

    Args:
        folder: Where relative paths begin; `None` for the working directory.
        confined: Refuse what lies outside of `folder`, by an absolute path, by `..` or by a symbolic link.
        urls: Accept http:// and https:// URLs, to be fetched later.
    """
    root = folder.resolve() if folder is not None and confined else None
    names = NearNames(folder or Path())

    @functools.cache  # data sets have few folders: their links are followed once
    def inside(parent: Path) -> bool:
        return root is None or parent.resolve().is_relative_to(root)

    def link_out(path: Path) -> str:
        """Return the first link on the way to a path that leads outside, or "" where there is none."""
        if folder is None or not path.is_relative_to(folder):
            return ""
        step = folder
        for part in path.relative_to(folder).parts:
            step /= part
            if part == "..":
                return ""
            if step.is_symlink() and not inside(step.resolve()):
                return str(step.relative_to(folder))
        return ""

    @functools.cache  # a picture often has several rows
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
        if not there:
            if _is_broken_link(path):
                raise CellError(f"{shown(name)} is a broken link, expected a file", code="image_missing")
            near = beside(path) if path.is_absolute() and Path(name).is_absolute() else names.describe(name)
            raise CellError(
                f"{shown(name)} does not exist, expected a file{'; ' * bool(near)}{near}", code="image_missing"
            )
        return str(path)

    return locate


def _is_broken_link(path: Path) -> bool:
    try:
        return path.is_symlink() and not path.exists()
    except (OSError, ValueError, RuntimeError):  # as in `locate`
        return False


def store_locator(folder: str, *, confined: bool, urls: bool = False) -> Locate:
    """Return a function from an image path in a row to the URL of a picture in the store of its data file.

    The store is not queried: a missing picture is found when it is read. Links inside a store are not checked, since
    whoever can make links there can read the whole store anyway.

    Args:
        folder: URL where relative paths begin.
        confined: Refuse what lies outside of `folder`. Otherwise an absolute path begins at the top of the bucket or
            host, and URLs of the same kind of store are accepted.
        urls: Accept http:// and https:// URLs, to be fetched later.
    """
    scheme, _, rest = folder.partition("://")
    host, _, path = rest.partition("/")

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
            raise CellError(f"{shown(name)} does not exist, expected a file", code="image_missing")
        if confined and (name.startswith("/") or ".." in name.replace("\\", "/").split("/")):
            raise _outside(name)
        # From "/", so that ".." cannot go above the bucket or host.
        return f"{scheme}://{host}{posixpath.normpath(posixpath.join('/', path, name))}"

    return locate


def _not_blank(name: str) -> str:
    if not name:
        raise CellError("is blank, expected a path or null")
    return name


def _fetchable(url: str, urls: bool) -> str:
    if not urls:
        raise CellError(f"{shown_url(url)} is a URL, expected a file: URLs are not fetched here", code="image_refused")
    if not url.lower().startswith(("http://", "https://")):
        raise CellError(
            f"{shown_url(url)} is a URL of another kind, expected http:// or https://", code="image_refused"
        )
    return url


def _outside(name: str, link: str = "") -> CellError:
    through = f" (through the link {shown(link)})" if link else ""
    permit = spelled("allow_outside", True)
    return CellError(
        f"{shown_url(name)}{through} is outside the folder of the data file; add {permit} to permit it",
        code="image_refused",
    )
