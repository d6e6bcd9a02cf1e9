"""What an image file says of itself, read before any decoder runs.

JPEG (ITU-T T.81, annex B), PNG (W3C PNG, section 5) and WebP (RFC 9649) are walked here; GIF and BMP in
`bitmap_headers`, TIFF in `tiff_headers`, AVIF and HEIC in `heif_headers`. Pillow does not do it, for four reasons:

- Size limits must come first, and Pillow allocates a WebP's canvas while it opens the file.
- Pillow reports damaged metadata through `warnings`; silencing those changes state that all threads share.
- Any library in the process may set `LOAD_TRUNCATED_IMAGES` of Pillow: half a picture then passes.
- Metadata parsers are where hostile files do their work. `pixel_data` leaves out all that pixels do not need:
  EXIF, colour profiles, text, thumbnails, further pictures, and whatever was appended to the file.

Errors say what was seen; `images.open_image` puts the file's name before it, and what was wanted after it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.bitmap_headers import bmp_header, bmp_spans, gif_header, gif_pixels
from qwen_vl_classifier.images.file_kinds import KIND_BYTES, file_kind, is_bmp
from qwen_vl_classifier.images.header_parts import MAX_PARTS, Header, exactly, exif_orientation
from qwen_vl_classifier.images.heif_headers import AVIF_BRANDS, HEIC_BRANDS, brands, heif_header, heif_pixels
from qwen_vl_classifier.images.tiff_headers import tiff_header, tiff_pixels

__all__ = ["Header", "exif_orientation", "pixel_data", "read_header"]

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

# A progressive JPEG has about ten scans, each of which costs a pass over all pixels however few bytes it takes.
_MAX_SCANS = 100
_WINDOW = 1 << 14


def image_format(stream: BinaryIO) -> str:
    """Tell the format of an image file by its first bytes: JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or HEIC.

    Raises:
        ImageError: If it is of none of them; the message names the kind of file it is.
    """
    stream.seek(0)
    start = stream.read(KIND_BYTES)
    if start[:2] == _JPEG_START:
        return "JPEG"
    if start.startswith(_PNG_SIGNATURE):
        return "PNG"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if is_bmp(start):
        return "BMP"
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "TIFF"
    if brands(start) & AVIF_BRANDS:
        return "AVIF"
    if brands(start) & HEIC_BRANDS:
        return "HEIC"
    raise ImageError(f"this is {file_kind(start)}, not a picture that can be read", code="image_format")


def read_header(stream: BinaryIO) -> Header:
    """Read format, size and orientation of an image file without decoding it.

    Args:
        stream: The file, readable and seekable.

    Raises:
        ImageError: If the file is of no known format or breaks off.
    """
    kind = image_format(stream)
    if kind in ("AVIF", "HEIC"):
        return heif_header(stream, kind)
    readers = {"JPEG": _jpeg_header, "PNG": _png_header, "WEBP": _webp_header}
    readers |= {"GIF": gif_header, "BMP": bmp_header, "TIFF": tiff_header}
    return readers[kind](stream)


def pixel_data(stream: BinaryIO, header: Header) -> bytes:
    """Return the file of `header` with only the parts that its pixels need.

    Of a file that holds several pictures (MPO, APNG, GIF, TIFF) the first, or default, one is kept; an animated WebP
    keeps all of its frames, and AVIF and HEIC all but their metadata.

    Raises:
        ImageError: If the file breaks off, or costs unreasonably much to decode.
    """
    if header.format == "GIF":
        return gif_pixels(stream, header)
    if header.format == "TIFF":
        return tiff_pixels(stream, header)
    if header.format in ("AVIF", "HEIC"):
        return heif_pixels(stream)
    spans = {"JPEG": _jpeg_spans, "PNG": _png_spans, "WEBP": _webp_spans, "BMP": bmp_spans}[header.format]
    return b"".join(exactly(stream, start, end - start) for start, end in spans(stream))


def _jpeg_segments(stream: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Yield (marker code, start, end) of each segment up to the end of the first image.

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
    while True:
        stream.seek(position)
        window = stream.read(_WINDOW)
        match = _JPEG_MARKER.search(window)
        if match:
            return position + match.start()
        if len(window) < 2:
            raise ImageError("the file breaks off before its end")
        position += len(window) - 1  # a marker may lie across two windows


def _jpeg_header(stream: BinaryIO) -> Header:
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
    return Header("JPEG", width, height, orientation or 1)


def _jpeg_spans(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield what is kept. Stray bytes after metadata go with it: a decoder would not know the file by its start."""
    yield 0, len(_JPEG_START)
    kept_from: int | None = None
    scans = 0
    for marker, start, end in _jpeg_segments(stream):
        if marker in _JPEG_METADATA:
            if kept_from is not None:
                yield kept_from, start
            kept_from = None
            continue
        if kept_from is None:
            kept_from = start
        if marker == _JPEG_SCAN:
            scans += 1
            if scans > _MAX_SCANS:
                raise ImageError(f"a JPEG file of more than {_MAX_SCANS} scans", code="image_too_large")
        elif marker == _JPEG_END:
            yield kept_from, end


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


def _png_header(stream: BinaryIO) -> Header:
    width = height = 0
    orientation = None
    for kind, start, end in _png_chunks(stream):
        if kind == b"IHDR":
            width, height = struct.unpack(">II", exactly(stream, start + 8, 8))
        elif kind == b"eXIf" and orientation is None:  # may stand after the pixels
            orientation = exif_orientation(exactly(stream, start + 8, end - start - 12))
    return Header("PNG", width, height, orientation or 1)


def _png_spans(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    yield 0, len(_PNG_SIGNATURE)
    for kind, start, end in _png_chunks(stream):
        if kind in _PNG_PIXEL_CHUNKS:
            yield start, end


def _webp_end(stream: BinaryIO) -> int:
    return 8 + int.from_bytes(exactly(stream, 4, 4), "little")


def _webp_header(stream: BinaryIO) -> Header:
    kind = exactly(stream, 12, 4)
    if kind == b"VP8 ":
        start_code, width, height = struct.unpack("<3sHH", exactly(stream, 23, 7))
        if start_code != b"\x9d\x01\x2a":
            raise ImageError("a WebP file without a key frame")
        return Header("WEBP", width & 0x3FFF, height & 0x3FFF, 1)  # the upper two bits are a scale
    if kind == b"VP8L":
        bits = int.from_bytes(exactly(stream, 21, 4), "little")
        return Header("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1)
    if kind == b"VP8X":
        canvas = exactly(stream, 24, 6)
        width, height = int.from_bytes(canvas[:3], "little") + 1, int.from_bytes(canvas[3:], "little") + 1
        return Header("WEBP", width, height, _webp_orientation(stream))
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


def _webp_spans(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    yield 0, _webp_end(stream)
