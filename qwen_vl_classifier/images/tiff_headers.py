"""TIFF (version 6, and BigTIFF): the first picture of a file, copied to a file of its own with nothing but its pixels.

libtiff reads the copy, which has one directory of known tags, strips that lie in the file one after the other, and
nothing to follow elsewhere: no metadata, thumbnails, further pages or private tags.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import BinaryIO

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.header_parts import MAX_PARTS, Header, exactly

_NEW_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 274, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _SAMPLE_FORMAT = 322, 323, 324, 325, 339
_DNG = 50706
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _YCBCR = 0, 1, 6

# Fill order, options of T.4 and T.6, predictor, colour map, ink set, extra samples, tables of JPEG, and how YCbCr is
# meant: with those above, all that pixels need.
_KEPT = frozenset({_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, 266, _SAMPLES, _ROWS, _PLANAR, 292, 293, 317})
_KEPT |= {320, _TILE_WIDTH, _TILE_HEIGHT, 332, 338, _SAMPLE_FORMAT, 347, 529, 530, 531, 532}

_SINGLE = frozenset({_WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC, 266, _SAMPLES, _ROWS, _PLANAR, 292, 293, 317})
_SINGLE |= {_TILE_WIDTH, _TILE_HEIGHT, 332}

_RAW = 1
_COMPRESSIONS = {_RAW: "none", 2: "CCITT", 3: "T.4", 4: "T.6", 5: "LZW", 7: "JPEG", 8: "Deflate"}
_COMPRESSIONS |= {32946: "Deflate", 32773: "PackBits", 50000: "Zstandard"}

# Bytes of a value and, of whole numbers, how it is read.
_TYPES = {1: (1, "B"), 2: (1, ""), 3: (2, "H"), 4: (4, "I"), 5: (8, ""), 6: (1, ""), 7: (1, ""), 8: (2, ""), 9: (4, "")}
_TYPES |= {10: (8, ""), 11: (4, ""), 12: (8, ""), 13: (4, "I"), 16: (8, "Q"), 17: (8, ""), 18: (8, "Q")}
_MAX_VALUE_BYTES = 1 << 20
_MAX_SAMPLES = 8
_MAX_TILE = 1 << 22  # pixels; a decoder makes room for a whole tile, however little of it the picture needs

_Tags = dict[int, tuple[int, int, bytes]]
"""Type, count and value of each tag."""


def tiff_header(stream: BinaryIO) -> Header:
    """Read size, orientation and kind of the first picture of a TIFF file."""
    order, tags = _directory(stream)
    if _DNG in tags or _number(order, tags, _NEW_SUBFILE, 0) & 1:
        raise ImageError("a camera's raw file, whose first picture is a small copy", code="image_format")
    compression = _number(order, tags, _COMPRESSION, _RAW)
    if compression not in _COMPRESSIONS:
        raise ImageError(f"a TIFF file of compression {compression}", code="image_format")
    bits = max(_numbers(order, tags, _BITS) or (1,))
    photometric = _number(order, tags, _PHOTOMETRIC, _WHITE_IS_ZERO)
    grey = photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) and _number(order, tags, _SAMPLES, 1) == 1
    if grey and bits > 8:
        if bits > 16 or max(_numbers(order, tags, _SAMPLE_FORMAT) or (1,)) != 1:
            raise ImageError("a TIFF file of numbers that have no fixed range of brightness", code="image_format")
        if bits not in (12, 16) or (bits == 12 and order == ">"):
            ending = " in big-endian order" if order == ">" else ""
            raise ImageError(f"a TIFF file of {bits}-bit grey{ending}, not of 8 or 16 bits", code="image_format")
    orientation = _number(order, tags, _ORIENTATION, 1)
    return Header(
        "TIFF",
        _number(order, tags, _WIDTH, 0),
        _number(order, tags, _HEIGHT, 0),
        orientation if 1 <= orientation <= 8 else 1,
        grey_bits=bits if grey and 8 < bits < 16 else 0,
        white_is_zero=grey and bits > 8 and photometric == _WHITE_IS_ZERO,
    )


def tiff_pixels(stream: BinaryIO, header: Header) -> bytes:
    """Return a TIFF file with the first picture of another, and nothing else."""
    order, tags = _directory(stream)
    parts = _parts(stream, order, tags, header)
    kept = {tag: value for tag, value in tags.items() if tag in _KEPT}
    if _number(order, tags, _PLANAR, 1) == 2:
        parts = _together(parts, order, tags)
        if _number(order, tags, _COMPRESSION, _RAW) == _RAW:
            del kept[_PLANAR]
    for tag in _SINGLE & kept.keys():  # Pillow would warn of more
        kept[tag] = (4, 1, struct.pack(f"{order}I", _number(order, tags, tag, 0)))
    if header.white_is_zero:  # Pillow has a reader for the other order alone
        kept[_PHOTOMETRIC] = (3, 1, struct.pack(f"{order}H", _BLACK_IS_ZERO))
    offset_tag, count_tag = (_TILES, _TILE_BYTES) if _TILES in tags else (_STRIPS, _STRIP_BYTES)
    sizes = [len(part) for part in parts]
    kept[count_tag] = (4, len(parts), struct.pack(f"{order}{len(parts)}I", *sizes))
    kept[offset_tag] = (4, len(parts), bytes(4 * len(parts)))  # as long as it will be
    start = 8 + 2 + 12 * len(kept) + 4
    first = start + sum(len(value) + len(value) % 2 for _, _, value in kept.values() if len(value) > 4)
    places = [first + sum_before for sum_before in _sums(sizes)]
    kept[offset_tag] = (4, len(parts), struct.pack(f"{order}{len(parts)}I", *places))
    directory = struct.pack(f"{order}H", len(kept))
    values = b""
    for tag, (kind, count, value) in sorted(kept.items()):
        directory += struct.pack(f"{order}HHI", tag, kind, count)
        if len(value) <= 4:
            directory += value.ljust(4, b"\0")
        else:
            directory += struct.pack(f"{order}I", start + len(values))
            values += value + bytes(len(value) % 2)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return b"".join([head, directory, bytes(4), values, *parts])


def _parts(stream: BinaryIO, order: str, tags: _Tags, header: Header) -> list[bytes]:
    """Read the strips or tiles."""
    width, height = header.width, header.height
    samples = _number(order, tags, _SAMPLES, 1)
    if not 1 <= samples <= _MAX_SAMPLES:
        raise ImageError(f"a TIFF file of {samples} samples for each pixel", code="image_format")
    bits = (_numbers(order, tags, _BITS) or (1,)) * samples
    planes = samples if _number(order, tags, _PLANAR, 1) == 2 else 1
    tiled = _TILES in tags
    if tiled:
        across, down = _number(order, tags, _TILE_WIDTH, 0), _number(order, tags, _TILE_HEIGHT, 0)
        if not 0 < across * down <= max(_MAX_TILE, 2 * width * height):
            raise ImageError(f"a TIFF file of tiles of {across}x{down} pixels", code="image_too_large")
    else:
        across, down = width, min(_number(order, tags, _ROWS, height) or height, height)
    count = math.ceil(width / across) * math.ceil(height / down) * planes
    if count > MAX_PARTS:
        raise ImageError(f"a TIFF file of more than {MAX_PARTS} strips", code="image_too_large")
    offsets = _numbers(order, tags, _TILES if tiled else _STRIPS)[:count]
    end = stream.seek(0, 2)
    raw = _number(order, tags, _COMPRESSION, _RAW) == _RAW
    if raw and _number(order, tags, _PHOTOMETRIC, _WHITE_IS_ZERO) != _YCBCR:
        # What a strip must hold is known: its declared size is not needed, and some writers leave it out.
        sizes = []
        for index in range(count):
            plane, position = divmod(index, count // planes)
            rows = down if tiled else min(down, height - position * down)
            row_bits = across * (bits[plane] if planes > 1 else sum(bits[:samples]))
            sizes.append((row_bits + 7) // 8 * rows)
    else:
        sizes = list(_numbers(order, tags, _TILE_BYTES if tiled else _STRIP_BYTES)[:count])
        if not sizes and count == 1 and offsets:
            sizes = [max(end - offsets[0], 0)]
    if len(offsets) < count or len(sizes) < count or sum(sizes) > end:
        raise ImageError("the file breaks off before its end")
    return [exactly(stream, offset, size) for offset, size in zip(offsets, sizes, strict=True)]


def _together(parts: list[bytes], order: str, tags: _Tags) -> list[bytes]:
    """Return parts that Pillow reads right, of a file that holds each colour by itself.

    Pillow takes some of these for others, in silence. Parts that are not compressed are joined, pixel by pixel.
    """
    planes = _number(order, tags, _SAMPLES, 1)
    if _number(order, tags, _COMPRESSION, _RAW) != _RAW:
        if planes not in (1, 3, 4):
            raise ImageError(f"a TIFF file of {planes} compressed planes", code="image_format")
        return parts
    if _number(order, tags, _BITS, 1) not in (8, 16):
        raise ImageError("a TIFF file of planes that are not of 8 or 16 bits", code="image_format")
    width = _number(order, tags, _BITS, 1) // 8
    across = len(parts) // planes
    joined = []
    for index in range(across):
        pixels = bytearray(len(parts[index]) * planes)
        for plane in range(planes):
            for byte in range(width):
                pixels[plane * width + byte :: planes * width] = parts[plane * across + index][byte::width]
        joined.append(bytes(pixels))
    return joined


def _directory(stream: BinaryIO) -> tuple[str, _Tags]:
    """Read the first directory: the byte order, and those tags that are looked at or kept."""
    start = exactly(stream, 0, 8)
    order = "<" if start[:2] == b"II" else ">"
    big = struct.unpack(f"{order}H", start[2:4])[0] == 43
    word, entry_size = ("Q", 20) if big else ("I", 12)
    (place,) = struct.unpack(f"{order}Q", exactly(stream, 8, 8)) if big else struct.unpack(f"{order}I", start[4:])
    (count,) = struct.unpack(f"{order}{'Q' if big else 'H'}", exactly(stream, place, 8 if big else 2))
    if count > 1 << 16:
        raise ImageError("a TIFF file of too many tags", code="image_too_large")
    entries = exactly(stream, place + (8 if big else 2), count * entry_size)
    tags: _Tags = {}
    for index in range(count):
        entry = entries[index * entry_size : (index + 1) * entry_size]
        tag, kind, length = struct.unpack_from(f"{order}HH{word}", entry)
        if tag not in _KEPT and tag not in _LOOKED_AT:
            continue
        size = _TYPES.get(kind, (0, ""))[0] * length
        inline = entry[4 + struct.calcsize(word) :]
        if size > _MAX_VALUE_BYTES:
            raise ImageError("a TIFF file with a tag of more than a megabyte", code="image_too_large")
        if size > len(inline):
            value = exactly(stream, struct.unpack(f"{order}{word}", inline)[0], size)
        else:
            value = inline[:size]
        if size:
            tags.setdefault(tag, (kind, length, value))
    return order, tags


_LOOKED_AT = frozenset({_NEW_SUBFILE, _STRIPS, _ORIENTATION, _STRIP_BYTES, _TILES, _TILE_BYTES, _DNG})


def _numbers(order: str, tags: _Tags, tag: int) -> tuple[int, ...]:
    kind, count, value = tags.get(tag, (0, 0, b""))
    letter = _TYPES.get(kind, (0, ""))[1]
    return struct.unpack(f"{order}{count}{letter}", value) if letter else ()


def _number(order: str, tags: _Tags, tag: int, default: int) -> int:
    return next(iter(_numbers(order, tags, tag)), default)


def _sums(sizes: Sequence[int]) -> list[int]:
    """Return for each size the sum of those before it."""
    sums, total = [], 0
    for size in sizes:
        sums.append(total)
        total += size
    return sums
