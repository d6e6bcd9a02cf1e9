"""AVIF and HEIC (ISO/IEC 23008-12): size and orientation of the primary picture, from the boxes before its pixels."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.header_parts import MAX_PARTS, ImageHeader, exactly

_MAX_META = 1 << 24  # bytes of the box that describes all pictures
_METADATA = (b"Exif", b"mime")  # items that pixels do not need

# From a rotation by quarter turns, anticlockwise, followed by a mirror, to the EXIF orientation that does the same.
_ORIENTATIONS: dict[tuple[int, int | None], int] = {(0, None): 1, (1, None): 8, (2, None): 3, (3, None): 6}
_ORIENTATIONS |= {(0, 0): 4, (1, 0): 5, (2, 0): 2, (3, 0): 7}  # mirror 0: top and bottom are exchanged
_ORIENTATIONS |= {(0, 1): 2, (1, 1): 7, (2, 1): 4, (3, 1): 5}  # mirror 1: left and right


class _Box(NamedTuple):
    kind: bytes
    start: int  # of what follows its size and kind
    end: int


def avif_header(stream: BinaryIO) -> ImageHeader:
    """Read size and orientation of the primary picture of an AVIF file."""
    return _header(stream, "AVIF")


def heic_header(stream: BinaryIO) -> ImageHeader:
    """Read size and orientation of the primary picture of a HEIC file."""
    return _header(stream, "HEIC")


def heif_pixels(stream: BinaryIO, header: ImageHeader) -> bytes:
    """Return an AVIF or HEIC file whose items of metadata are marked as something to skip; no byte moves."""
    content = bytearray(exactly(stream, 0, stream.seek(0, 2)))
    meta = _meta(stream)
    for box in _boxes(stream, meta.start + 4, meta.end):
        if box.kind != b"iinf":
            continue
        short = content[box.start] == 0  # version
        for entry in _boxes(stream, box.start + (6 if short else 8), box.end):
            if entry.kind == b"infe" and content[entry.start] in (2, 3):
                at = entry.start + (8 if content[entry.start] == 2 else 10)
                if content[at : at + 4] in _METADATA:
                    content[at : at + 4] = b"skip"
    return bytes(content)


def _header(stream: BinaryIO, format: str) -> ImageHeader:
    meta = _meta(stream)
    data = exactly(stream, meta.start, meta.end - meta.start)
    inner = io.BytesIO(data)
    boxes = _first_of_each_kind(inner, 4, len(data))
    try:
        primary = _primary_item(data, boxes[b"pitm"])
        properties = _first_of_each_kind(inner, boxes[b"iprp"].start, boxes[b"iprp"].end)
        container = list(_boxes(inner, properties[b"ipco"].start, properties[b"ipco"].end))
        chosen = [container[index - 1] for index in _associated(data, properties[b"ipma"], primary) if index]
    except (KeyError, IndexError, struct.error):
        raise ImageError(f"a file of {format} that does not say which picture it shows") from None
    width = height = angle = 0
    mirror: int | None = None
    for box in chosen:
        content = data[box.start : box.end]
        if box.kind == b"ispe" and len(content) >= 12:
            width, height = struct.unpack_from(">II", content, 4)
        elif box.kind == b"clap" and len(content) >= 16 and format == "HEIC":  # Pillow's AVIF decoder does not crop
            across, across_parts, down, down_parts = struct.unpack_from(">4I", content)
            width, height = round(across / max(across_parts, 1)), round(down / max(down_parts, 1))
        elif box.kind == b"irot" and content:
            angle = content[0] & 3
        elif box.kind == b"imir" and content:
            mirror = content[0] & 1
    # Tiles, thumbnails and masks are decoded too: none may be larger than the picture itself.
    for box in container:
        if box.kind == b"ispe" and box.end - box.start >= 12:
            across, down = struct.unpack_from(">II", data, box.start + 4)
            if across * down > max(width * height, 1 << 20):
                raise ImageError(f"a file of {format} with a part larger than its picture", code="image_too_large")
    return ImageHeader(format, width, height, _ORIENTATIONS[angle, mirror])


def _meta(stream: BinaryIO) -> _Box:
    """Return the box that describes the pictures of a file."""
    for box in _boxes(stream, 0, stream.seek(0, 2)):
        if box.kind == b"meta":
            if box.end - box.start > _MAX_META:
                raise ImageError("a description of pictures of more than 16 MiB", code="image_too_large")
            return box
    raise ImageError("the file is truncated")


def _boxes(stream: BinaryIO, start: int, end: int) -> Iterator[_Box]:
    """Yield the boxes between two offsets, as far as they are complete."""
    for _ in range(MAX_PARTS):
        if start + 8 > end:
            return
        size, kind = struct.unpack(">I4s", exactly(stream, start, 8))
        head = 8
        if size == 1 and start + 16 <= end:
            (size,) = struct.unpack(">Q", exactly(stream, start + 8, 8))
            head = 16
        size = size or end - start  # 0: up to the end
        if size < head or start + size > end:
            return
        yield _Box(kind, start + head, start + size)
        start += size


def _first_of_each_kind(stream: BinaryIO, start: int, end: int) -> dict[bytes, _Box]:
    return {box.kind: box for box in reversed(list(_boxes(stream, start, end)))}


def _primary_item(data: bytes, box: _Box) -> int:
    (number,) = struct.unpack_from(">H" if data[box.start] == 0 else ">I", data, box.start + 4)
    return int(number)


def _associated(data: bytes, box: _Box, item: int) -> list[int]:
    """Return the positions, from 1, of an item's properties; 0 stands for none."""
    version, wide = data[box.start], data[box.start + 3] & 1
    (entries,) = struct.unpack_from(">I", data, box.start + 4)
    at = box.start + 8
    for _ in range(min(entries, MAX_PARTS)):
        (number,) = struct.unpack_from(">H" if version == 0 else ">I", data, at)
        at += 2 if version == 0 else 4
        count = data[at]
        at += 1
        if number == item:
            found = struct.unpack_from(f">{count}{'H' if wide else 'B'}", data, at)
            return [one & (0x7FFF if wide else 0x7F) for one in found]
        at += count * (2 if wide else 1)
    raise KeyError(item)
