"""GIF (version 89a) and BMP (Windows and OS/2 1): their size, and the bytes that the first frame needs."""

from __future__ import annotations

import struct
from typing import BinaryIO

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.header_parts import MAX_PARTS, ImageHeader, exactly

_EXTENSION, _IMAGE, _END = 0x21, 0x2C, 0x3B
_MAX_BLOCKS = 400_000  # encoders fill blocks of 255 bytes: 50 MiB have 206,000
_GRAPHIC_CONTROL = 0xF9  # holds the transparent colour of the frame that follows

_BMP_CORE = 12  # bytes of the header of OS/2 1, which has sizes of 16 bits
_BMP_HEADERS = (40, 52, 56, 64, 108, 124)
_BMP_BITS = (1, 4, 8, 16, 24, 32)
_BMP_RGB, _BMP_BITFIELDS = 0, 3
_BMP_COMPRESSIONS = (_BMP_RGB, 1, 2, _BMP_BITFIELDS)  # 1 and 2 are run lengths; others hold a JPEG, a PNG or CMYK
_MAX_RUN_BYTES, _MAX_RUN_PIXELS = 1 << 22, 10_000_000  # Pillow decodes run lengths in Python


def gif_header(stream: BinaryIO) -> ImageHeader:
    """Read the size of a GIF: that of its canvas, or of its first frame where that is larger."""
    _, frame = _gif_first_frame(stream)
    width, height = struct.unpack("<HH", exactly(stream, 6, 4))
    left, top, frame_width, frame_height = struct.unpack("<4H", exactly(stream, frame + 1, 8))
    return ImageHeader("GIF", max(width, left + frame_width), max(height, top + frame_height), 1)


def gif_pixels(stream: BinaryIO, header: ImageHeader) -> bytes:
    """Return a GIF with the first frame alone, without comments and extensions of programs."""
    control, frame = _gif_first_frame(stream)
    (flags,) = exactly(stream, frame + 9, 1)
    data = frame + 10 + _colours(flags) + 1  # a byte before the data says how its codes begin
    end = _after_blocks(stream, data)
    canvas = exactly(stream, 0, 6) + struct.pack("<HH", header.width, header.height)
    colours = exactly(stream, 10, 3 + _colours(exactly(stream, 10, 1)[0]))
    return canvas + colours + control + exactly(stream, frame, end - frame) + bytes([_END])


def _gif_first_frame(stream: BinaryIO) -> tuple[bytes, int]:
    """Return the graphic control extension of the first frame, if any, and where its descriptor begins."""
    position = 13 + _colours(exactly(stream, 10, 1)[0])
    control = b""
    for _ in range(MAX_PARTS):
        (kind,) = exactly(stream, position, 1)
        if kind == _IMAGE:
            return control, position
        if kind != _EXTENSION:
            raise ImageError("a GIF file without a frame")
        start = position
        (label,) = exactly(stream, position + 1, 1)
        position = _after_blocks(stream, position + 2)
        if label == _GRAPHIC_CONTROL:
            control = exactly(stream, start, position - start)
    raise ImageError(f"a GIF file of more than {MAX_PARTS} extensions", code="image_too_large")


def _after_blocks(stream: BinaryIO, position: int) -> int:
    """Return where a sequence of blocks ends: each has its length of up to 255 before it, and the last has none."""
    for _ in range(_MAX_BLOCKS):
        (length,) = exactly(stream, position, 1)
        position += 1 + length
        if not length:
            return position
    raise ImageError(f"a GIF file of more than {_MAX_BLOCKS} blocks of data", code="image_too_large")


def _colours(flags: int) -> int:
    """Return the bytes of a table of colours."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def bmp_header(stream: BinaryIO) -> ImageHeader:
    """Read the size of a BMP, and make sure that its pixels are complete."""
    (offset,) = struct.unpack("<I", exactly(stream, 10, 4))
    (size,) = struct.unpack("<I", exactly(stream, 14, 4))
    compression = _BMP_RGB
    if size == _BMP_CORE:
        width, height, _, bits = struct.unpack("<4H", exactly(stream, 18, 8))
    elif size in _BMP_HEADERS:
        width, height, _, bits, compression = struct.unpack("<iiHHI", exactly(stream, 18, 16))
        height = abs(height)  # negative where rows go from top to bottom
    else:
        raise ImageError("a BMP file of an unknown kind")
    if bits not in _BMP_BITS or compression not in _BMP_COMPRESSIONS:
        raise ImageError(f"a BMP file of {bits} bits and compression {compression}", code="image_format")
    if compression in (_BMP_RGB, _BMP_BITFIELDS):
        if width > 0:
            exactly(stream, offset + (width * bits + 31) // 32 * 4 * height - 1, 1)
    elif stream.seek(0, 2) > _MAX_RUN_BYTES or width * height > _MAX_RUN_PIXELS:
        raise ImageError("a BMP file of more than 4 MiB or 10 megapixels of run lengths", code="image_too_large")
    return ImageHeader("BMP", max(width, 0), height, 1)


def bmp_pixels(stream: BinaryIO, header: ImageHeader) -> bytes:
    """Return the whole of a BMP: it has no metadata that a decoder would look at."""
    return exactly(stream, 0, stream.seek(0, 2))
