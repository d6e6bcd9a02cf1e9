"""TIFF (version 6, and BigTIFF): the first picture of a file, copied to a file of its own with nothing but its pixels.

libtiff reads the copy, which has one directory of known tags, strips that lie in the file one after the other, and no
offset that leads elsewhere: no metadata, thumbnails, further pages or private tags.
"""

from __future__ import annotations

import itertools
import math
import struct
from typing import BinaryIO, NamedTuple

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.header_parts import MAX_PARTS, ImageHeader, exactly

_NEW_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 274, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _SAMPLE_FORMAT = 322, 323, 324, 325, 339
_DNG = 50706
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _YCBCR = 0, 1, 6

# Tags of a single number: besides those above, fill order, options of T.4 and T.6, predictor and ink set.
_SINGLE = frozenset({_WIDTH, _HEIGHT, _COMPRESSION, _PHOTOMETRIC, 266, _SAMPLES, _ROWS, _PLANAR, 292, 293, 317})
_SINGLE |= {_TILE_WIDTH, _TILE_HEIGHT, 332}
# All tags that pixels need: also colour map, extra samples, tables of JPEG, and how YCbCr is meant.
_KEPT = _SINGLE | {_BITS, 320, 338, _SAMPLE_FORMAT, 347, 529, 530, 531, 532}
_READ = _KEPT | {_NEW_SUBFILE, _STRIPS, _ORIENTATION, _STRIP_BYTES, _TILES, _TILE_BYTES, _DNG}

_RAW = 1
_COMPRESSIONS = frozenset({_RAW, 2, 3, 4, 5, 7, 8, 32946, 32773, 50000})
"""None, CCITT, T.4, T.6, LZW, JPEG, Deflate (two codes), PackBits, Zstandard."""

# Bytes of a value and, of whole numbers, how it is read.
_TYPES = {1: (1, "B"), 2: (1, ""), 3: (2, "H"), 4: (4, "I"), 5: (8, ""), 6: (1, ""), 7: (1, ""), 8: (2, ""), 9: (4, "")}
_TYPES |= {10: (8, ""), 11: (4, ""), 12: (8, ""), 13: (4, "I"), 16: (8, "Q"), 17: (8, ""), 18: (8, "Q")}
_SHORT, _LONG = 3, 4
_MAX_TAGS = 1 << 16
_MAX_VALUE_BYTES = 1 << 20
_MAX_SAMPLES = 8
_MAX_TILE = 1 << 22  # pixels; a decoder makes room for a whole tile, however little of it the picture needs


class _Tag(NamedTuple):
    type: int
    length: int
    value: bytes


class _Directory:
    """The tags of one picture, and the byte order of its file: "<" or ">"."""

    def __init__(self, order: str, tags: dict[int, _Tag]) -> None:
        self.order = order
        self.tags = tags

    def numbers(self, tag: int) -> tuple[int, ...]:
        """Return the whole numbers of a tag; none where it is missing or of another type."""
        if tag not in self.tags:
            return ()
        kind, length, value = self.tags[tag]
        letter = _TYPES[kind][1]
        return struct.unpack(f"{self.order}{length}{letter}", value) if letter else ()

    def number(self, tag: int, default: int) -> int:
        """Return the first number of a tag."""
        return next(iter(self.numbers(tag)), default)

    def longs(self, *numbers: int) -> _Tag:
        """Return a tag of numbers of 32 bits."""
        return _Tag(_LONG, len(numbers), struct.pack(f"{self.order}{len(numbers)}I", *numbers))


def tiff_header(stream: BinaryIO) -> ImageHeader:
    """Read size, orientation and kind of the first picture of a TIFF file."""
    directory = _read_directory(stream)
    number = directory.number
    if _DNG in directory.tags or number(_NEW_SUBFILE, 0) & 1:
        raise ImageError("a camera's raw file, whose first picture is a small copy", code="image_format")
    if number(_COMPRESSION, _RAW) not in _COMPRESSIONS:
        raise ImageError(f"a TIFF file of compression {number(_COMPRESSION, _RAW)}", code="image_format")
    bits = max(directory.numbers(_BITS) or (1,))
    photometric = number(_PHOTOMETRIC, _WHITE_IS_ZERO)
    grey = photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) and number(_SAMPLES, 1) == 1
    if grey and bits > 8:
        if bits > 16 or max(directory.numbers(_SAMPLE_FORMAT) or (1,)) != 1:
            raise ImageError("a TIFF file of numbers that have no fixed range of brightness", code="image_format")
        if bits not in (12, 16) or (bits == 12 and directory.order == ">"):
            ending = " in big-endian order" if directory.order == ">" else ""
            raise ImageError(f"a TIFF file of {bits}-bit grey{ending}, not of 8 or 16 bits", code="image_format")
    orientation = number(_ORIENTATION, 1)
    return ImageHeader(
        "TIFF",
        number(_WIDTH, 0),
        number(_HEIGHT, 0),
        orientation if 1 <= orientation <= 8 else 1,
        grey_bits=bits if grey and 8 < bits < 16 else 0,
        white_is_zero=grey and bits > 8 and photometric == _WHITE_IS_ZERO,
    )


def tiff_pixels(stream: BinaryIO, header: ImageHeader) -> bytes:
    """Return a TIFF file with the first picture of another, and nothing else."""
    directory = _read_directory(stream)
    strips = _strips(stream, directory, header)
    kept = {tag: value for tag, value in directory.tags.items() if tag in _KEPT}
    if directory.number(_PLANAR, 1) == 2:
        strips = _interleaved(strips, directory)
        if directory.number(_COMPRESSION, _RAW) == _RAW:
            del kept[_PLANAR]
    for tag in _SINGLE & kept.keys():  # Pillow would warn of more numbers
        kept[tag] = directory.longs(directory.number(tag, 0))
    if header.white_is_zero:  # Pillow has a reader for the other order alone
        kept[_PHOTOMETRIC] = _Tag(_SHORT, 1, struct.pack(f"{directory.order}H", _BLACK_IS_ZERO))
    offset_tag, count_tag = (_TILES, _TILE_BYTES) if _TILES in directory.tags else (_STRIPS, _STRIP_BYTES)
    sizes = [len(strip) for strip in strips]
    kept[count_tag] = directory.longs(*sizes)
    kept[offset_tag] = directory.longs(*sizes)  # as long as the offsets, which follow from the lengths of all values
    values_from = 8 + 2 + 12 * len(kept) + 4
    strips_from = values_from + sum(len(tag.value) + len(tag.value) % 2 for tag in kept.values() if len(tag.value) > 4)
    kept[offset_tag] = directory.longs(*itertools.accumulate(sizes[:-1], initial=strips_from))
    return b"".join([_written(directory.order, kept, values_from), *strips])


def _written(order: str, tags: dict[int, _Tag], values_from: int) -> bytes:
    """Write the header and the one directory of a file, followed by the values that do not fit into it."""
    entries, values = struct.pack(f"{order}H", len(tags)), b""
    for tag, (kind, length, value) in sorted(tags.items()):
        entries += struct.pack(f"{order}HHI", tag, kind, length)
        if len(value) <= 4:
            entries += value.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", values_from + len(values))
            values += value + bytes(len(value) % 2)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return start + entries + bytes(4) + values


def _strips(stream: BinaryIO, directory: _Directory, header: ImageHeader) -> list[bytes]:
    """Read the strips or tiles, which may hold one colour each."""
    number = directory.number
    width, height = header.width, header.height
    samples = number(_SAMPLES, 1)
    if not 1 <= samples <= _MAX_SAMPLES:
        raise ImageError(f"a TIFF file of {samples} samples for each pixel", code="image_format")
    bits = (directory.numbers(_BITS) or (1,)) * samples
    planes = samples if number(_PLANAR, 1) == 2 else 1
    tiled = _TILES in directory.tags
    if tiled:
        across, down = number(_TILE_WIDTH, 0), number(_TILE_HEIGHT, 0)
        if not 0 < across * down <= max(_MAX_TILE, 2 * width * height):
            raise ImageError(f"a TIFF file of tiles of {across}x{down} pixels", code="image_too_large")
    else:
        across, down = width, min(number(_ROWS, height) or height, height)
    count = math.ceil(width / across) * math.ceil(height / down) * planes
    if tiled and count * across * down > planes * max(_MAX_TILE, 4 * width * height):
        raise ImageError("a TIFF file whose tiles hold far more than its picture", code="image_too_large")
    if count > MAX_PARTS:
        raise ImageError(f"a TIFF file of more than {MAX_PARTS} strips", code="image_too_large")
    offsets = directory.numbers(_TILES if tiled else _STRIPS)[:count]
    end = stream.seek(0, 2)
    if number(_COMPRESSION, _RAW) == _RAW and number(_PHOTOMETRIC, _WHITE_IS_ZERO) != _YCBCR:
        # The size of a strip follows from what it must hold: some writers leave the declared one out.
        sizes = []
        for index in range(count):
            plane, position = divmod(index, count // planes)
            rows = down if tiled else min(down, height - position * down)
            row_bits = across * (bits[plane] if planes > 1 else sum(bits[:samples]))
            sizes.append((row_bits + 7) // 8 * rows)
    else:
        sizes = list(directory.numbers(_TILE_BYTES if tiled else _STRIP_BYTES)[:count])
        if not sizes and count == 1 and offsets:
            sizes = [max(end - offsets[0], 0)]
    if len(offsets) < count or len(sizes) < count or sum(sizes) > end:
        raise ImageError("the file is truncated")
    return [exactly(stream, offset, size) for offset, size in zip(offsets, sizes, strict=True)]


def _interleaved(strips: list[bytes], directory: _Directory) -> list[bytes]:
    """Return strips that Pillow reads right, of a file that holds each colour by itself.

    Pillow takes some of these for others, in silence. Strips that are not compressed are joined, pixel by pixel.
    """
    planes = directory.number(_SAMPLES, 1)
    if directory.number(_COMPRESSION, _RAW) != _RAW:
        if planes not in (1, 3, 4):
            raise ImageError(f"a TIFF file of {planes} compressed planes", code="image_format")
        return strips
    if directory.number(_BITS, 1) not in (8, 16):
        raise ImageError("a TIFF file of planes that are not of 8 or 16 bits", code="image_format")
    width = directory.number(_BITS, 1) // 8
    each = len(strips) // planes
    joined = []
    for index in range(each):
        pixels = bytearray(len(strips[index]) * planes)
        for plane in range(planes):
            for byte in range(width):
                pixels[plane * width + byte :: planes * width] = strips[plane * each + index][byte::width]
        joined.append(bytes(pixels))
    return joined


def _read_directory(stream: BinaryIO) -> _Directory:
    """Read the first directory, with those tags that decide what is read or are kept."""
    start = exactly(stream, 0, 8)
    order = "<" if start[:2] == b"II" else ">"
    big = struct.unpack(f"{order}H", start[2:4])[0] == 43
    word, entry_size, head = ("Q", 20, 8) if big else ("I", 12, 2)
    (offset,) = struct.unpack(f"{order}{word}", exactly(stream, 8, 8) if big else start[4:])
    (count,) = struct.unpack(f"{order}{'Q' if big else 'H'}", exactly(stream, offset, head))
    if count > _MAX_TAGS:
        raise ImageError("a TIFF file of too many tags", code="image_too_large")
    entries = exactly(stream, offset + head, count * entry_size)
    tags: dict[int, _Tag] = {}
    for at in range(0, count * entry_size, entry_size):
        tag, kind, length = struct.unpack_from(f"{order}HH{word}", entries, at)
        if tag not in _READ:
            continue
        size = _TYPES.get(kind, (0, ""))[0] * length
        inline = entries[at + 4 + struct.calcsize(word) : at + entry_size]
        if size > _MAX_VALUE_BYTES:
            raise ImageError("a TIFF file with a tag of more than a megabyte", code="image_too_large")
        if size > len(inline):
            value = exactly(stream, struct.unpack(f"{order}{word}", inline)[0], size)
        else:
            value = inline[:size]
        if size:
            tags.setdefault(tag, _Tag(kind, length, value))
    return _Directory(order, tags)
