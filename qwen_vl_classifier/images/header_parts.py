"""What the readers of all formats share: the header that they return, bounded reading, and EXIF orientation."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from qwen_vl_classifier.errors import ImageError

MAX_PARTS = 100_000
"""Most segments, chunks, strips or boxes that are read of a file: a bound on work, far above what encoders write.
A PNG of 50 MiB in chunks of 8 KiB has 6,400."""

_ORIENTATION = 0x0112
_UNSIGNED = {1: "B", 3: "H", 4: "I"}  # the specification asks for 3, and some writers use the others


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Format and size of an image file, and how its pixels are meant.

    Attributes:
        format: As its content shows: a name in `IMAGE_FORMATS`.
        width: Stored width in pixels, before `orientation` is applied.
        height: Stored height in pixels, likewise.
        orientation: As in EXIF, 1 (upright) to 8. From 5 on, width and height swap when it is applied.
        grey_bits: Bits of a grey value where the file declares fewer than it stores, such as 12 in 16; else 0.
        white_is_zero: Whether the lowest of grey values of more than 8 bits is white.
    """

    format: str
    width: int
    height: int
    orientation: int
    grey_bits: int = 0
    white_is_zero: bool = False


def exactly(stream: BinaryIO, start: int, count: int) -> bytes:
    """Read `count` bytes at `start`.

    Raises:
        ImageError: The file has fewer.
    """
    if count > 0:  # `read` allocates `count` bytes before it reads: a declared length of 4 GB must first prove true
        stream.seek(start + count - 1)
        if not stream.read(1):
            raise ImageError("the file is truncated")
    stream.seek(start)
    return stream.read(count)


def exif_orientation(exif: object) -> int:
    r"""Read the orientation, 1 to 8, from a block of EXIF (CIPA DC-008, section 4.6.5).

    Tags in XMP or in PNG text are not consulted, as in browsers. Damaged EXIF, or none at all, means 1.

    Example:
        >>> exif_orientation(b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0")
        6
    """
    if not isinstance(exif, bytes):
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(entries):
            at = directory + 2 + 12 * entry
            tag, kind = struct.unpack_from(f"{order}HH", tiff, at)
            if tag == _ORIENTATION and kind in _UNSIGNED:
                (value,) = struct.unpack_from(order + _UNSIGNED[kind], tiff, at + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:  # an offset points outside: show the picture as it is stored
        pass
    return 1
