"""Containers: what the header says, which bytes reach the decoder, and bounds on the work of finding out."""

from __future__ import annotations

import io
import random
import re
import struct
import zlib

import pytest
from PIL import Image

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.header_parts import ImageHeader, exif_orientation
from qwen_vl_classifier.images.headers import pixel_data
from qwen_vl_classifier.images.opening import open_image
from tests.images.picture_files import by_pillow, chunk, encoded, header_of, kept_of, pixels

PICTURE = Image.linear_gradient("L").resize((40, 30)).convert("RGB")


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1]))


def exif_block(orientation: int, *, order: str = "<", kind: int = 3) -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, kind, 1, orientation, 0, 0)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WebP", {}),
        ("WebP", {"lossless": True}),
        ("WebP", {"exif": exif_block(1)}),
    ],
)
def test_header_gives_format_and_size(format, options):
    assert header_of(encoded(PICTURE, format, **options)) == ImageHeader(format, 40, 30, 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_header_gives_orientation(format, order):
    data = encoded(PICTURE, format, exif=b"Exif\0\0" + exif_block(6, order=order))
    assert header_of(data).orientation == 6


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_is_read_in_both_byte_orders(value):
    assert exif_orientation(exif_block(value)) == exif_orientation(b"Exif\0\0" + exif_block(value, order=">")) == value


@pytest.mark.parametrize(
    "exif",
    [
        None,
        "text",
        b"",
        b"Exif\0\0",
        b"II*\0",
        exif_block(6)[:-8],
        exif_block(0),
        exif_block(9),
        exif_block(6, kind=2),
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff" + bytes(30),
    ],
)
def test_damaged_exif_means_upright(exif):
    assert exif_orientation(exif) == 1


def segment(marker: int, data: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def test_jpeg_reaches_the_decoder_without_metadata():
    plain = encoded(PICTURE, "JPEG")
    colour = segment(0xEE, b"Adobe" + bytes(7))  # the one segment besides JFIF, APP0, that pixels need
    metadata = [segment(marker, b"x" * 60_000) for marker in (*range(0xE1, 0xEE), 0xEF, 0xFE)]
    data = plain[:20] + b"".join(metadata[:9]) + colour + b"".join(metadata[9:]) + plain[20:]
    assert kept_of(data + b"appended") == plain[:20] + colour + plain[20:]


def test_orientation_is_that_of_the_exif_segment():
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"<x:xmpmeta/>")
    plain = encoded(PICTURE, "JPEG")
    for parts in ([xmp, segment(0xE1, b"Exif\0\0" + exif_block(6))], [segment(0xE1, b"Exif\0\0" + exif_block(6)), xmp]):
        assert header_of(plain[:20] + b"".join(parts) + plain[20:]).orientation == 6


def test_the_first_of_several_exif_blocks_counts():
    plain = encoded(PICTURE, "JPEG")
    one, six, none = (segment(0xE1, b"Exif\0\0" + exif_block(turn)) for turn in (1, 6, 9))
    for parts, turn in (([one, six], 1), ([six, one], 6), ([none, six], 1)):
        assert header_of(plain[:2] + b"".join(parts) + plain[2:]).orientation == turn


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "letter"), [(1, "B"), (3, "H"), (4, "I")])
def test_orientation_is_read_whatever_unsigned_type_it_has(order, kind, letter):
    head = b"II*\0" if order == "<" else b"MM\0*"
    value = struct.pack(order + letter, 6).ljust(4, b"\0")
    assert exif_orientation(head + struct.pack(f"{order}IHHHI", 8, 1, 0x0112, kind, 1) + value) == 6


STRAY = [bytes(16), b"hello", b"\x12" * 3000, b"\xff\xff\xff"]


@pytest.mark.parametrize("stray", STRAY, ids=["zeros", "text", "many", "padding"])
@pytest.mark.parametrize("marker", [0xE1, 0xED, 0xFE], ids=["APP1", "APP13", "comment"])
def test_stray_bytes_after_a_first_segment_of_metadata(stray, marker):
    """Some editors write segments that are longer than they say."""
    plain = encoded(PICTURE, "JPEG")
    after_header = 20
    for start in (2, after_header):
        for damage in (segment(marker, b"metadata") + stray, stray, segment(marker) + stray + segment(marker) + stray):
            data = plain[:start] + damage + plain[start:]
            assert open_image(data).tobytes() == open_image(plain).tobytes()
    without_jfif = plain[:2] + segment(marker, b"metadata") + stray + plain[after_header:]
    assert open_image(without_jfif).size == (40, 30)


def test_webp_chunks_start_at_even_offsets():
    chunks = b"VP8X" + struct.pack("<I", 10) + b"\x28\0\0\0" + b"\x27\0\0" + b"\x1d\0\0"
    chunks += (
        b"ICCP" + struct.pack("<I", 3) + b"odd\0" + b"EXIF" + struct.pack("<I", len(exif_block(6))) + exif_block(6)
    )
    data = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    assert header_of(data) == ImageHeader("WebP", 40, 30, 6)


def test_webp_scale_is_no_part_of_the_size():
    data = bytearray(encoded(PICTURE, "WebP"))
    data[27] |= 0x40
    data[29] |= 0x80
    assert header_of(bytes(data)) == ImageHeader("WebP", 40, 30, 1)


def test_png_reaches_the_decoder_without_metadata():
    plain = encoded(PICTURE, "PNG")
    extra = chunk(b"eXIf", exif_block(6)) + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6))) + chunk(b"acTL")
    assert kept_of(plain[:33] + extra + plain[33:] + b"appended") == plain


def test_stray_bytes_and_padding_between_jpeg_segments_are_passed_over():
    plain = encoded(PICTURE, "JPEG", comment=b"x")
    padded = plain[:20] + b"\0\0\x12\xff\xff" + plain[20:]
    assert header_of(padded) == ImageHeader("JPEG", 40, 30, 1)


@pytest.mark.parametrize("distance", [near + by for near in (1, 32, 543, 8734, 25117) for by in range(-2, 3)])
def test_marker_across_two_windows_is_found(distance):
    plain = encoded(PICTURE, "JPEG")
    head, tail = plain[:20] + bytes(max(distance, 0)), plain[20:]
    assert kept_of(head + segment(0xFE, b"comment") + tail) == plain
    assert kept_of(head + tail) == plain


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize("fill", [b"\xff", b"\xff" * 100_000])
def test_fill_bytes_do_not_reach_pillow(options, fill):
    """ITU-T T.81, B.1.1.2: any marker may have them before it. Those after a scan's header are read in C."""
    plain = encoded(PICTURE, "JPEG", **options)
    scan = plain.index(b"\xff\xda")
    markers = [match.start() for match in re.finditer(rb"\xff[\xc0-\xfe]", plain[: scan + 2]) if match.start() > 0]
    assert len(markers) > 3
    for position in markers:
        assert kept_of(plain[:position] + fill + plain[position:]) == plain
    for position in (plain.index(b"\xff", scan + 2), len(plain) - 2):
        padded = plain[:position] + fill + plain[position:]
        assert pixels(open_image(padded)) == pixels(by_pillow(padded))


def test_bytes_that_pillow_would_read_one_by_one_do_not_reach_it():
    plain = encoded(PICTURE, "JPEG")
    scan = plain.index(b"\xff\xda")
    for stray in (b"\xff\0", b"\0", b"\xff\xff\0", b"\x12"):
        assert kept_of(plain[:scan] + stray * 10_000 + plain[scan:]) == plain


@pytest.mark.parametrize("seed", range(4))
def test_what_looks_like_a_segment_in_damaged_data_changes_no_pixels(seed):
    """A decoder takes up again at the next restart, so the data after it has to reach it."""
    generator = random.Random(seed)
    data = bytearray(encoded(noise((64, 64)), "JPEG", quality=95, restart_marker_blocks=3))
    for _ in range(4):
        position = generator.randrange(data.index(b"\xff\xda") + 14, len(data) - 20)
        data[position : position + 4] = bytes([0xFF, generator.randrange(2, 0xC0), 0, 5])
    assert pixels(open_image(bytes(data))) == pixels(by_pillow(bytes(data)))


def test_table_bomb_is_refused():
    plain = encoded(PICTURE, "JPEG")
    scan = plain.index(b"\xff\xda")
    tables = segment(0xDB, (b"\0" + b"\1" * 64) * 1000)
    assert kept_of(plain[:scan] + tables * 10 + plain[scan:])
    with pytest.raises(ImageError, match="more than a megabyte of tables"):
        kept_of(plain[:scan] + tables * 17 + plain[scan:])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_jpeg_ends_at_its_end_marker(options):
    data = encoded(PICTURE, "JPEG", **options)
    assert kept_of(data) == kept_of(data + data) == data


def test_scan_bomb_is_refused():
    data = encoded(PICTURE, "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    assert kept_of(data[:-2] + last_scan * 20 + data[-2:])
    with pytest.raises(ImageError, match="more than 100 scans"):
        kept_of(data[:-2] + last_scan * 100 + data[-2:])


def test_scans_of_a_large_picture_are_fewer():
    data = encoded(PICTURE, "JPEG", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    large = ImageHeader("JPEG", 4000, 3000, 1)
    assert pixel_data(io.BytesIO(data[:-2] + last_scan * 20 + data[-2:]), large)
    with pytest.raises(ImageError, match="more than 32 scans"):
        pixel_data(io.BytesIO(data[:-2] + last_scan * 32 + data[-2:]), large)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8" + b"\xff\xfe\0\2" * 100_001 + b"\xff\xd9",
        b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt") * 100_001 + chunk(b"IEND"),
        b"RIFF" + struct.pack("<I", 8 * 100_100) + b"WEBPVP8X" + bytes(8 * 100_100),
    ],
    ids=["JPEG", "PNG", "WebP"],
)
def test_part_bomb_is_refused(data):
    with pytest.raises(ImageError, match="more than 100000"):
        header_of(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIDAT",
        b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffeXIf",
        b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(14) + b"EXIF\xff\xff\xff\x7f",
        b"\xff\xd8\xff\xe1\xff\xff",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\0\0WEBP",
    ],
)
def test_declared_length_is_not_believed(data):
    with pytest.raises(ImageError, match="is truncated"):
        header_of(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GIF89a" + bytes(20), "a GIF file without a frame"),
        (b"RIFF\x20\0\0\0WEBPXXXX" + bytes(20), "unknown kind"),
        (b"RIFF\x20\0\0\0WEBPVP8 " + bytes(20), "without a key frame"),
    ],
)
def test_kinds_of_a_format_that_are_not_read(data, message):
    with pytest.raises(ImageError, match=message):
        header_of(data)
