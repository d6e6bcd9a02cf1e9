"""Read the picture of a request: the bytes of an image file, or an `ImageError`.

What the request itself carries is always read; URLs and paths only where the operator allows them. No message repeats
anything of the text: answers and logs must not tell what a caller tried, nor what lies on this machine.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final
from urllib.parse import unquote_to_bytes

from qwen_vl_classifier.errors import ConfigError, ImageError, one_of
from qwen_vl_classifier.images.limits import ImageLimits

if TYPE_CHECKING:
    from qwen_vl_classifier.images.fetching import Fetcher

# RFC 2397 with base64 asked for; the media type is not believed, the content says what the picture is.
_DATA_URI: Final = re.compile(r"data:(?:image/[\w.+-]*)?(?:;[\w.+-]+=[\w.+-]*)*;base64,", re.IGNORECASE | re.ASCII)
_LONGEST_START: Final = 256  # characters of a data URI before its data
_WEB: Final = re.compile(r"https?:", re.IGNORECASE | re.ASCII)
_FILE: Final = re.compile(r"file:(?://(?:localhost)?(?=/))?", re.IGNORECASE | re.ASCII)
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE | re.ASCII)

_PIECE: Final = 262_144  # characters of base64 that are decoded at once, while no other thread runs

_LONGEST_PATH: Final = 4096
_FETCHES: Final = 16  # at one time; they wait for other hosts
_READS: Final = 4  # of base64 and of files


class MediaReader:
    """Reads pictures as requests hold them.

    A text is, in this order: a data URI, an http or https URL, base64, a path or `file:` URL. A path that could be
    base64 as well, without a dot and of a length divisible by 4, is taken for base64: put `./` before it.

    Args:
        limits: The largest file to read.
        fetcher: What fetches URLs; without one they are refused.
        root: The folder that paths are relative to, and that they must not leave; without one they are refused.

    Raises:
        ConfigError: `root` is no folder.
    """

    def __init__(self, *, limits: ImageLimits, fetcher: Fetcher | None, root: Path | None) -> None:
        if root is not None and not root.is_dir():
            raise ConfigError(f"image_root {str(root)!r} is not a folder; give one, or leave it out to allow no paths")
        self._limits = limits
        self._fetcher = fetcher
        self._root = root
        self._fetches = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch-image")
        self._reads = ThreadPoolExecutor(_READS, thread_name_prefix="read-image")

    async def read(self, text: str) -> bytes:
        """Return an image file; whether it can be decoded is not looked at.

        Args:
            text: A data URI (RFC 2397) with base64, or base64 alone (RFC 4648, section 4), in which white space is
                passed over; where allowed, an http or https URL, a path, or a `file:` URL (RFC 8089).

        Raises:
            ImageError: It is something else (code image_refused), not there (image_missing), or too large
                (image_too_large). The message holds nothing of the text.
        """
        loop = asyncio.get_running_loop()
        if not _WEB.match(text):
            return await loop.run_in_executor(self._reads, self._read, text)
        if self._fetcher is None:
            raise ImageError(
                "the image is a URL, and URLs are not allowed; send the picture itself", code="image_refused"
            )
        return await loop.run_in_executor(self._fetches, self._fetcher.fetch, text)

    def may_wait(self, text: str) -> bool:
        """Tell whether reading a picture may be a wait for another host or a file system."""
        return bool(_WEB.match(text)) or (self._root is not None and not _DATA_URI.match(text, 0, _LONGEST_START))

    def close(self) -> None:
        """Let the threads end once they are done; what waits for one is given up."""
        for threads in (self._fetches, self._reads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, text: str) -> bytes:
        carried = decode_base64(text, self._limits.max_bytes)
        if carried is not None:
            return carried
        if self._root is None or not text.strip() or _is_other_uri(text):
            raise _unreadable(self._limits.formats)
        return read_below(self._root, text, self._limits.max_bytes)


def decode_base64(text: str, max_bytes: int) -> bytes | None:
    """Decode what a request carries, or return `None` if it is neither a data URI with base64 nor base64.

    Raises:
        ImageError: It is more than `max_bytes`.
    """
    start = _DATA_URI.match(text, 0, _LONGEST_START)
    first = start.end() if start else 0
    too_large = ImageError(
        f"the image is too large; expected at most {max_bytes:,} bytes; compress it or scale it down",
        code="image_too_large",
    )
    if len(text) > longest_base64(max_bytes):
        raise too_large
    if not text.isascii():
        return None
    # Two bytes may be padding.
    if (len(text) - first) // 4 * 3 - 2 > max_bytes and sum(map(len, _pieces(text, first))) // 4 * 3 - 2 > max_bytes:
        raise too_large
    data = bytearray()
    left = b""  # characters of a group of four that goes on in the next piece
    for piece in _pieces(text, first):
        piece = left + piece
        whole = len(piece) // 4 * 4
        left = piece[whole:]
        if len(data) % 3 and whole:  # padding in the middle
            return None
        try:
            data += base64.b64decode(piece[:whole], validate=True)
        except binascii.Error:
            return None
    return bytes(data) or None if not left else None


def longest_base64(max_bytes: int) -> int:
    """Return the greatest length of base64 for a file of `max_bytes`; half of it may be white space."""
    return _LONGEST_START + 2 * (max_bytes // 3 * 4 + 4)


def _pieces(text: str, first: int) -> Iterator[bytes]:
    """Return a text of ASCII from a place on, without white space, in pieces that are little work each."""
    for place in range(first, len(text), _PIECE):
        yield text[place : place + _PIECE].encode().translate(None, b" \t\n\r\v\f")


def read_below(root: Path, text: str, max_bytes: int) -> bytes:
    """Read a regular file below a folder.

    Links are followed as long as they stay below it. The path without them is then opened folder by folder, and a
    link that somebody puts there in the meantime is not followed. What is outside cannot be told from what is not
    there.

    Args:
        root: The folder.
        text: A path relative to it, an absolute one that begins with it, or a `file:` URL of such.
        max_bytes: Largest file.

    Raises:
        ImageError: It is refused, missing or too large. The message holds nothing of the path.
    """
    try:
        folder = root.resolve(strict=True)
        path = _plain_path(text, root, folder).resolve(strict=True)
        if not path.is_relative_to(folder):
            raise FileNotFoundError
        with _opened(folder, path.relative_to(folder).parts) as file:
            status = os.fstat(file.fileno())
            content = file.read(max_bytes + 1) if status.st_size <= max_bytes else None
    except (OSError, RuntimeError, UnicodeError):  # RuntimeError: links in a circle
        raise ImageError(
            "the image's path is not that of a readable file in the server's folder of pictures; check it",
            code="image_missing",
        ) from None
    if content is None or len(content) > max_bytes:
        raise ImageError(
            f"the image's file is too large; expected at most {max_bytes:,} bytes; compress it or scale it down",
            code="image_too_large",
        )
    return content


def _plain_path(text: str, root: Path, folder: Path) -> Path:
    """Return the path that a text names, refusing by its letters alone whatever does not stay below the folder."""
    start = _FILE.match(text)
    if start:
        text = os.fsdecode(unquote_to_bytes(text[start.end() :]))
        if not text.startswith("/"):
            raise _refused("the image's file: URL has no absolute path of this machine")
    if (
        text.endswith(("/", "/."))
        or len(text) > _LONGEST_PATH
        or "\0" in text
        or "\\" in text
        or ".." in text.split("/")
    ):
        raise _refused("the image's path leaves the server's folder of pictures, or could be misread")
    if not text.startswith("/"):
        return folder / text
    path = Path(text)
    for top in (folder, root):
        if path.is_relative_to(top):
            return folder / path.relative_to(top)
    raise _refused("the image's path leaves the server's folder of pictures, or could be misread")


@contextlib.contextmanager
def _opened(folder: Path, parts: tuple[str, ...]) -> Iterator[BinaryIO]:
    """Open a regular file for reading, by a path of which no part is a link."""
    with contextlib.ExitStack() as opened:

        def descend(part: str | Path, kind: int, above: int | None = None) -> int:
            descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=above)
            opened.callback(os.close, descriptor)
            return descriptor

        here = descend(folder, os.O_DIRECTORY)
        for part in parts[:-1]:
            here = descend(part, os.O_DIRECTORY, here)
        # To open a device can set it going, and to open a pipe can wait for ever; so look first, and then again.
        if not parts or not stat.S_ISREG(os.lstat(parts[-1], dir_fd=here).st_mode):
            raise _refused("the image's path is not that of a regular file")
        here = descend(parts[-1], os.O_NONBLOCK, here)
        if not stat.S_ISREG(os.fstat(here).st_mode):
            raise _refused("the image's path is not that of a regular file")
        yield opened.enter_context(os.fdopen(here, "rb", closefd=False))


def _is_other_uri(text: str) -> bool:
    """Tell whether a text names something that is neither fetched nor read, such as `data:` without base64."""
    return _SCHEME.match(text) is not None and _FILE.match(text) is None


def _refused(seen: str) -> ImageError:
    return ImageError(f"{seen}; expected the path of a picture in that folder; check it", code="image_refused")


def _unreadable(formats: Sequence[str]) -> ImageError:
    return ImageError(
        f"the image is neither a data URI nor base64; expected a {one_of(formats)} file as one of these; URLs and "
        f"paths are accepted only if the operator allows them",
        code="image_refused",
    )
