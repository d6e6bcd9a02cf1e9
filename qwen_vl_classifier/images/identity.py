"""Tell whether two pictures are the same: by the pixels that the model reads, not by the names of files.

The identity of a picture is a digest of its size and of its upright RGB pixels, as `open_image` returns them. A copy, a
link, another spelling of a path, a PIL image and a file that was saved again without loss are the same picture. A JPEG
that was compressed again is another picture that looks alike (`look_alikes.py`).

Identities of pictures that were opened are remembered, so that no picture is decoded again to compute its identity.
Without decoding anything, `stamp_of` tells which sources are certainly the same.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.limits import current_limits, decoding_threads
from qwen_vl_classifier.images.look_alikes import Looks, look_of
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.images.source import ImageSource

_MOST_IDENTITIES = 1 << 18  # about 200 bytes each
_MOST_LOOKS = 1 << 15  # about 350 bytes each

_STRIP_BYTES = 1 << 18  # of pixels copied at a time: faster, since they fit into the cache of the processor
_STAT = struct.Struct("<5Q")
_WORD = (1 << 64) - 1


class _Memo:
    """A dictionary of bounded size that forgets its oldest entries; safe in several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def get(self, key: bytes) -> bytes | None:
        return self._kept.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        with self._lock:
            self._kept[key] = value
            if len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]


_identities = _Memo(_MOST_IDENTITIES)  # by stamp
_looks = _Memo(_MOST_LOOKS)  # by identity


def pixel_identity(picture: Image.Image) -> bytes:
    """Return the identity of a picture, 32 bytes.

    Args:
        picture: As `open_image` returned it: upright, of mode RGB.
    """
    width, height = picture.size
    digest = hashlib.sha256(b"%d %d " % (width, height))
    rows = max(1, _STRIP_BYTES // (3 * width))
    for top in range(0, height, rows):
        digest.update(picture.crop((0, top, width, min(height, top + rows))).tobytes())
    return digest.digest()


def stamp_of(source: ImageSource) -> bytes:
    """Return a key that is equal for sources that certainly have the same pixels, without decoding anything.

    For a file, it is made of device, inode, size and times of change: links and all spellings of a path have one stamp,
    and a file that is written again gets another. For bytes, it is their digest. For a PIL image, whose pixels may be
    changed at any time, it names the object and is valid while the object is alive.
    """
    if isinstance(source, bytes):
        return b"bytes " + hashlib.sha256(source).digest()
    if isinstance(source, Image.Image):
        return b"object %d" % id(source)
    try:
        found = Path(source).stat()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return b"path " + os.fsencode(Path(os.path.normpath(source)).absolute())
    words = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return b"file " + _STAT.pack(*(word & _WORD for word in words))


def remember(stamp: bytes, source: ImageSource, picture: Image.Image) -> bytes:
    """Remember the identity of a picture that was just opened for its source, where it is not yet, and return it.

    Args:
        stamp: What `stamp_of` returned for the source before it was opened.
        source: Where the picture came from.
        picture: As `open_image` returned it.
    """
    may_change = isinstance(source, Image.Image)
    known = None if may_change else _identities.get(_known_as(stamp))
    if known is not None and _looks.get(known) is not None:  # hashing takes as long as decoding a JPEG
        return known
    identity = pixel_identity(picture)
    if _looks.get(identity) is None:
        _looks.put(identity, look_of(picture))
    if not may_change and stamp_of(source) == stamp:  # else the file may have been replaced while it was read
        _identities.put(_known_as(stamp), identity)
    return identity


def picture_identity(source: ImageSource) -> bytes:
    """Return the identity of a picture, 32 bytes; it is opened only if it was not opened before.

    Raises:
        ImageError: The picture cannot be opened.
    """
    stamp = stamp_of(source)
    known = None if isinstance(source, Image.Image) else _identities.get(_known_as(stamp))
    return known if known is not None else remember(stamp, source, open_image(source))


def picture_identities(rows: Iterable[Sequence[ImageSource]], *, lenient: bool = False) -> list[tuple[bytes, ...]]:
    """Return the identities of the pictures of each row, 32 bytes each.

    Pictures that were not opened before are opened in several threads, each source once.

    Args:
        rows: The pictures of each row: none, one or several.
        lenient: A picture that cannot be opened gets an identity by its path or bytes, in place of an error.

    Raises:
        ImageError: A picture cannot be opened.
    """

    def identify(source: ImageSource) -> bytes:
        try:
            return picture_identity(source)
        except ImageError:
            if not lenient:
                raise
            return hashlib.sha256(stamp_of(source)).digest()

    rows = list(rows)
    objects = {id(source): source for row in rows for source in row}  # alive, so that each has an `id` of its own
    stamps = {number: stamp_of(source) for number, source in objects.items()}
    distinct = {stamps[number]: source for number, source in objects.items()}
    with ThreadPoolExecutor(decoding_threads(), thread_name_prefix="identify") as executor:
        found = dict(zip(distinct, executor.map(identify, distinct.values()), strict=True))
    return [tuple(found[stamps[id(source)]] for source in row) for row in rows]


def looks_of(sources: Sequence[ImageSource]) -> Looks:
    """Describe pictures, to find those that look alike; one that was opened before is not opened again.

    Raises:
        ImageError: A picture cannot be opened.
    """
    return Looks.joined([_look(source) for source in sources])


def _known_as(stamp: bytes) -> bytes:
    """Return the key under which an identity is kept: pixels also depend on the limits' `grey_bits`."""
    return stamp + bytes([current_limits().grey_bits])


def _look(source: ImageSource) -> bytes:
    identity = picture_identity(source)
    known = _looks.get(identity)
    if known is None:
        known = look_of(open_image(source))
        _looks.put(identity, known)
    return known
