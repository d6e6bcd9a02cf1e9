"""Read the size and orientation of an image file before any decoder runs, and leave out what pixels do not need.

JPEG (ITU-T T.81, annex B), PNG (W3C PNG, section 5) and WebP (RFC 9649) are read here; GIF and BMP in
`bitmap_headers`, TIFF in `tiff_headers`, AVIF and HEIC in `heif_headers`. Pillow's own readers would not do:

- Size limits must come first, and Pillow allocates a WebP's canvas while it opens the file.
- Pillow reports damaged metadata through `warnings`; silencing those changes state that all threads share.
- Any library in the process may set `LOAD_TRUNCATED_IMAGES` of Pillow: half a picture then passes.
- Parsers of metadata are a common target of hostile files. `pixel_data` leaves out all that pixels do not need: EXIF,
  colour profiles, text, thumbnails, further pictures, and whatever was appended to the file.

Errors say what was seen; `open_image` adds the name of the file, what was expected and what to do.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.bitmap_headers import bmp_header, bmp_pixels, gif_header, gif_pixels
from qwen_vl_classifier.images.header_parts import MAX_PARTS, ImageHeader, exactly, exif_orientation
from qwen_vl_classifier.images.heif_headers import avif_header, heic_header, heif_pixels
from qwen_vl_classifier.images.tiff_headers import tiff_header, tiff_pixels

_JPEG_START = b"\xff\xd8"

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})

# SOF0 to SOF15; the gaps are tables and an extension.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN, _JPEG_END, _JPEG_EXIF = 0xDA, 0xD9, 0xE1
# APP0 (JFIF) and APP14 (Adobe) stay: they tell the decoder which colour space the samples are in.
_JPEG_METADATA = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})
# A marker is 0xFF and a code; 0xFF00 is an escaped sample, 0xFFFF padding, 0xFFD0-7 a restart within a scan.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_JPEG_STANDALONE = frozenset({0x01, 0xD8})

# A progressive JPEG has about ten scans (of CMYK 18), each of which costs a pass over all pixels however few bytes it
# takes.
_MAX_SCANS = 100
_MAX_SCANS_OF_LARGE = 32
_LARGE_PIXELS = 8_000_000
# Pillow reads each table of a JPEG in Python. Encoders write a few hundred bytes of them for each scan.
_MAX_TABLE_BYTES = 1 << 20
_WINDOW = 1 << 14


def read_header(stream: BinaryIO, format: str) -> ImageHeader:
    """Read size and orientation of an image file without decoding it.

    Args:
        stream: The file, readable and seekable.
        format: Its format, as `image_format` tells it.

    Raises:
        ImageError: The file is damaged, or of a kind of its format that is not read.
    """
    return _READERS[format][0](stream)


def pixel_data(stream: BinaryIO, header: ImageHeader) -> bytes:
    """Return the file of `header` with only the parts that its pixels need.

    Of a file that holds several pictures (MPO, APNG, GIF, TIFF) the first, or default, one is kept; an animated WebP
    keeps all of its frames, and AVIF and HEIC all but their metadata.

    Raises:
        ImageError: The file breaks off, or costs unreasonably much to decode.
    """
    return _READERS[header.format][1](stream, header)


def _jpeg_segments(stream: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Yield (marker code, start, end) of each segment up to the end of the first picture.

    Entropy-coded data lies between a scan's header and the next segment.
    """
    position = 2
    for _ in range(MAX_PARTS):
        position = _next_marker(stream, position)
        marker = exactly(stream, position, 2)[1]
        if marker == _JPEG_END:
            yield marker, position, position + 2
            return
        end = position + 2
        if marker not in _JPEG_STANDALONE:
            length = int.from_bytes(exactly(stream, end, 2), "big")
            if length < 2:  # its own two bytes are part of it
                raise ImageError("a JPEG file with a segment of no length")
            end += length
        yield marker, position, end
        position = end
    raise ImageError(f"a JPEG file of more than {MAX_PARTS} segments", code="image_too_large")


def _next_marker(stream: BinaryIO, position: int) -> int:
    """Return where the next marker begins, past padding, stray bytes and entropy-coded data."""
    size = 2  # mostly it is here: a window for each of many small segments would cost more than they do
    while True:
        stream.seek(position)
        window = stream.read(size)
        match = _JPEG_MARKER.search(window)
        if match:
            return position + match.start()
        if len(window) < 2:
            raise ImageError("the file is truncated")
        position += len(window) - 1  # a marker may lie across two windows
        size = min(_WINDOW, 16 * size)


def _jpeg_header(stream: BinaryIO) -> ImageHeader:
    width = height = 0
    orientation = None
    for marker, start, end in _jpeg_segments(stream):
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack(">HH", exactly(stream, start + 5, 4))
        elif marker == _JPEG_EXIF and orientation is None:
            content = exactly(stream, start + 4, max(0, end - start - 4))
            if content.startswith(b"Exif\0"):  # other APP1 segments hold XMP; of several blocks the first counts
                orientation = exif_orientation(content)
        elif marker == _JPEG_SCAN:
            break
    return ImageHeader("JPEG", width, height, orientation or 1)


def _jpeg_pixels(stream: BinaryIO, header: ImageHeader) -> bytes:
    """Leave out metadata, and fill bytes and stray ones before the first scan, which Pillow would read one by one."""
    kept = [_JPEG_START]
    most = _MAX_SCANS_OF_LARGE if header.width * header.height > _LARGE_PIXELS else _MAX_SCANS
    scans = tables = previous = 0
    data_follows = False
    for marker, start, end in _jpeg_segments(stream):
        if data_follows:
            kept.append(exactly(stream, previous, start - previous))
        previous = end
        if marker in _JPEG_METADATA:
            data_follows = False
            continue
        if marker == _JPEG_SCAN:
            scans += 1
            if scans > most:
                raise ImageError(f"a JPEG file of more than {most} scans", code="image_too_large")
        data_follows = scans > 0  # also after what only looks like a segment, in data that is damaged
        tables += end - start
        if tables > _MAX_TABLE_BYTES:
            raise ImageError("a JPEG file of more than a megabyte of tables", code="image_too_large")
        kept.append(exactly(stream, start, end - start))
    return b"".join(kept)


def _png_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of each chunk, its length and checksum included, up to IEND."""
    position = len(_PNG_SIGNATURE)
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack(">I4s", exactly(stream, position, 8))
        end = position + 12 + length
        yield kind, position, end
        if kind == b"IEND":
            return
        position = end
    raise ImageError(f"a PNG file of more than {MAX_PARTS} chunks", code="image_too_large")


def _png_header(stream: BinaryIO) -> ImageHeader:
    width = height = 0
    orientation = None
    for kind, start, end in _png_chunks(stream):
        if kind == b"IHDR":
            width, height = struct.unpack(">II", exactly(stream, start + 8, 8))
        elif kind == b"eXIf" and orientation is None:  # may stand after the pixels
            orientation = exif_orientation(exactly(stream, start + 8, end - start - 12))
    return ImageHeader("PNG", width, height, orientation or 1)


def _png_pixels(stream: BinaryIO, header: ImageHeader) -> bytes:
    chunks = [(start, end) for kind, start, end in _png_chunks(stream) if kind in _PNG_PIXEL_CHUNKS]
    return _PNG_SIGNATURE + b"".join(exactly(stream, start, end - start) for start, end in chunks)


def _webp_end(stream: BinaryIO) -> int:
    return 8 + int.from_bytes(exactly(stream, 4, 4), "little")


def _webp_header(stream: BinaryIO) -> ImageHeader:
    kind = exactly(stream, 12, 4)
    if kind == b"VP8 ":
        start_code, width, height = struct.unpack("<3sHH", exactly(stream, 23, 7))
        if start_code != b"\x9d\x01\x2a":
            raise ImageError("a WebP file without a key frame")
        return ImageHeader("WebP", width & 0x3FFF, height & 0x3FFF, 1)  # the upper two bits are a scale
    if kind == b"VP8L":
        bits = int.from_bytes(exactly(stream, 21, 4), "little")
        return ImageHeader("WebP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1)
    if kind == b"VP8X":
        canvas = exactly(stream, 24, 6)
        width, height = int.from_bytes(canvas[:3], "little") + 1, int.from_bytes(canvas[3:], "little") + 1
        return ImageHeader("WebP", width, height, _webp_orientation(stream))
    raise ImageError("a WebP file of an unknown kind")


def _webp_orientation(stream: BinaryIO) -> int:
    position, end = 12, _webp_end(stream)
    for _ in range(MAX_PARTS):
        if position >= end:
            return 1
        kind, length = struct.unpack("<4sI", exactly(stream, position, 8))
        if kind == b"EXIF":
            return exif_orientation(exactly(stream, position + 8, length))
        position += 8 + length + length % 2  # chunks start at even offsets
    raise ImageError(f"a WebP file of more than {MAX_PARTS} chunks", code="image_too_large")


def _webp_pixels(stream: BinaryIO, header: ImageHeader) -> bytes:
    return exactly(stream, 0, _webp_end(stream))


_READERS: dict[str, tuple[Callable[[BinaryIO], ImageHeader], Callable[[BinaryIO, ImageHeader], bytes]]] = {
    "JPEG": (_jpeg_header, _jpeg_pixels),
    "PNG": (_png_header, _png_pixels),
    "WebP": (_webp_header, _webp_pixels),
    "GIF": (gif_header, gif_pixels),
    "BMP": (bmp_header, bmp_pixels),
    "TIFF": (tiff_header, tiff_pixels),
    "AVIF": (avif_header, heif_pixels),
    "HEIC": (heic_header, heif_pixels),
}
