"""Pictures that mean harm, or are broken in one way each, with what becomes of them."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

PICTURE, DAMAGED, FORMAT, TOO_LARGE = "picture", "image_damaged", "image_format", "image_too_large"
EITHER = "picture or image_damaged"  # as the library of codecs was built

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


def saved(format: str, image: Image.Image | None = None, **options: Any) -> bytes:
    """Return a picture as a file."""
    stream = io.BytesIO()
    (image or Image.linear_gradient("L").resize((64, 48)).convert("RGB")).save(stream, format, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes = b"", *, crc: int | None = None, length: int | None = None) -> bytes:
    """Return a chunk of a PNG file."""
    check = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content) if length is None else length) + kind + content + struct.pack(">I", check)


def header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    """Return the first chunk of a PNG file."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(start: bytes, *chunks: bytes, rows: bytes | None = None) -> bytes:
    """Return a PNG file of chunks, and rows that are compressed last."""
    pixels = chunk(b"IDAT", zlib.compress(rows, 1)) if rows is not None else b""
    return _SIGNATURE + start + b"".join(chunks) + pixels + _END


def rows(width: int, height: int, channels: int = 3) -> bytes:
    """Return black rows without filter."""
    return (b"\0" + bytes(width * channels)) * height


def segment(marker: int, content: bytes) -> bytes:
    """Return a segment of a JPEG file."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def after_start(jpeg: bytes, *segments: bytes) -> bytes:
    """Put segments at the start of a JPEG file."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def resized(jpeg: bytes, width: int, height: int) -> bytes:
    """Let a JPEG file claim another size."""
    place = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    return jpeg[: place + 5] + struct.pack(">HH", height, width) + jpeg[place + 9 :]


def riff(*chunks: tuple[bytes, bytes], size: int | None = None) -> bytes:
    """Return a WebP file of chunks."""
    content = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(content) if size is None else size) + content


def canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    """Return the chunk by which an extended WebP file begins."""
    return b"VP8X", bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def zipped() -> bytes:
    """Return a small archive that holds much."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(20_000_000))
    return stream.getvalue()


def _frames(format: str, count: int, **options: Any) -> bytes:
    frames = [Image.new("RGB", (64, 48), (number % 256, 0, 0)) for number in range(count)]
    return saved(format, frames[0], save_all=True, append_images=frames[1:], **options)


def _scans() -> bytes:
    jpeg = saved("JPEG", progressive=True)
    last = jpeg.rfind(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * 2000 + jpeg[-2:]


def _exif_circle() -> bytes:
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x8769, 4, 1, 8) + struct.pack("<I", 8)
    return b"Exif\0\0" + tiff


def _made() -> dict[str, tuple[Callable[[], bytes], str]]:
    jpeg, plain, webp = saved("JPEG"), saved("PNG"), saved("WEBP")
    lossless = saved("WEBP", lossless=True)
    small = rows(8, 8)
    huge_text = zlib.compress(bytes(60_000_000), 9)
    cmyk = saved("JPEG", Image.new("CMYK", (64, 48), (10, 20, 30, 40)))
    page = b"<!doctype html><script>alert(1)</script>"
    return {
        # PNG, of all sizes
        "png of the largest size there is": (lambda: png(header(2**31 - 1, 2**31 - 1), rows=small), TOO_LARGE),
        "png of 65535 squared": (lambda: png(header(65535, 65535, 1, 0), rows=small), TOO_LARGE),
        "png one row beyond 25 MP": (lambda: png(header(5000, 5001, 1, 0), rows=small), TOO_LARGE),
        "png of 25 MP that says nothing": (lambda: png(header(5000, 5000), rows=small), DAMAGED),
        "png of 25 MP in black": (lambda: png(header(5000, 5000), rows=rows(5000, 5000)), PICTURE),
        "png of 25 MP with alpha": (lambda: png(header(5000, 5000, 8, 6), rows=rows(5000, 5000, 4)), PICTURE),
        "png of 25 MP in 16 bits with alpha": (
            lambda: png(header(5000, 5000, 16, 6), rows=rows(5000, 5000, 8)),
            PICTURE,
        ),
        "png of 25 MP in 16-bit grey": (lambda: png(header(5000, 5000, 16, 0), rows=rows(5000, 5000, 2)), PICTURE),
        "png of 25 MP in palette with alpha": (
            lambda: png(
                header(5000, 5000, 8, 3),
                chunk(b"PLTE", bytes(768)),
                chunk(b"tRNS", bytes(256)),
                rows=rows(5000, 5000, 1),
            ),
            PICTURE,
        ),
        "png of 25 MP interlaced": (lambda: png(header(5000, 5000, 8, 0, 1), rows=bytes(26_000_000)), PICTURE),
        "png without width": (lambda: png(header(0, 8), rows=small), DAMAGED),
        "png without height": (lambda: png(header(8, 0), rows=small), DAMAGED),
        "png of one pixel": (lambda: png(header(1, 1), rows=rows(1, 1)), PICTURE),
        "png 200 times as wide as high": (lambda: png(header(200, 1), rows=rows(200, 1)), PICTURE),
        "png 201 times as wide as high": (lambda: png(header(201, 1), rows=rows(201, 1)), TOO_LARGE),
        "png 25 million times as high as wide": (lambda: png(header(1, 25_000_000), rows=small), TOO_LARGE),
        # PNG, of all contents
        "png with far more rows than it has": (lambda: png(header(8, 8), rows=bytes(60_000_000)), PICTURE),
        "png with fewer rows than it has": (lambda: png(header(8, 8), rows=rows(8, 4)), PICTURE),
        "png with compressed text": (
            lambda: png(header(8, 8), chunk(b"zTXt", b"a\0\0" + huge_text), rows=small),
            PICTURE,
        ),
        "png with a compressed profile": (
            lambda: png(header(8, 8), chunk(b"iCCP", b"a\0\0" + huge_text), rows=small),
            PICTURE,
        ),
        "png with international text": (
            lambda: png(header(8, 8), chunk(b"iTXt", b"a\0\x01\0\0\0" + huge_text), rows=small),
            PICTURE,
        ),
        "png with EXIF in a circle": (
            lambda: png(header(8, 8), chunk(b"eXIf", _exif_circle()[6:]), rows=small),
            PICTURE,
        ),
        "png with 300,000 chunks": (
            lambda: png(header(8, 8), chunk(b"tEXt", b"a\0b") * 300_000, rows=small),
            TOO_LARGE,
        ),
        "png with a wrong sum over its header": (
            lambda: png(chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0), crc=1), rows=small),
            DAMAGED,
        ),
        "png with a wrong sum over its pixels": (
            lambda: png(header(8, 8), chunk(b"IDAT", zlib.compress(small), crc=1)),
            PICTURE,
        ),
        "png with a chunk of 4 GB": (lambda: png(header(8, 8), chunk(b"IDAT", b"x", length=2**32 - 1)), DAMAGED),
        "png with pixels that are not compressed": (lambda: png(header(8, 8), chunk(b"IDAT", bytes(300))), DAMAGED),
        "png without pixels": (lambda: png(header(8, 8)), DAMAGED),
        "png without end": (lambda: plain[:-12], DAMAGED),
        "png of two headers": (lambda: png(header(8, 8), header(5000, 5000), rows=small), DAMAGED),
        "png of depth 3": (lambda: png(header(8, 8, 3), rows=small), DAMAGED),
        "png of colour 7": (lambda: png(header(8, 8, 8, 7), rows=small), DAMAGED),
        "png without its palette": (lambda: png(header(8, 8, 8, 3), rows=rows(8, 8, 1)), DAMAGED),
        "png with a palette of 10 MB": (
            lambda: png(header(8, 8, 8, 3), chunk(b"PLTE", bytes(9_000_000)), rows=rows(8, 8, 1)),
            DAMAGED,
        ),
        "png beyond its palette": (
            lambda: png(header(8, 8, 8, 3), chunk(b"PLTE", bytes(3)), rows=(b"\0" + b"\xff" * 8) * 8),
            PICTURE,
        ),
        "png with 300 frames": (lambda: _frames("PNG", 300), PICTURE),
        "png with a frame beyond its canvas": (
            lambda: png(
                header(8, 8),
                chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
                chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 2**31 - 1, 2**31 - 1, 9, 9, 0, 0, 0, 0)),
                rows=small,
            ),
            PICTURE,
        ),
        "png with an archive behind it": (lambda: plain + zipped(), PICTURE),
        "png with a page behind it": (lambda: plain + page, PICTURE),
        "only the start of a png": (lambda: _SIGNATURE, DAMAGED),
        # JPEG
        "jpeg of 65535 squared": (lambda: resized(jpeg, 65535, 65535), TOO_LARGE),
        "jpeg of 25 MP that says nothing": (lambda: resized(jpeg, 5000, 5000), EITHER),
        "jpeg without width": (lambda: resized(jpeg, 0, 48), DAMAGED),
        "jpeg without height": (lambda: resized(jpeg, 64, 0), DAMAGED),
        "jpeg of 2,000 scans": (_scans, TOO_LARGE),
        "jpeg cut in the middle": (lambda: jpeg[: len(jpeg) // 2], DAMAGED),
        "jpeg without end": (lambda: jpeg[:-2], DAMAGED),
        "jpeg in cyan, magenta, yellow and black": (lambda: cmyk, PICTURE),
        "jpeg in cyan, magenta, yellow and black of Adobe": (
            lambda: after_start(cmyk, segment(0xEE, b"Adobe\0\x64\0\0\0\0\x02")),
            PICTURE,
        ),
        "jpeg of several pictures": (lambda: _frames("MPO", 4), PICTURE),
        "jpeg with EXIF in a circle": (lambda: after_start(jpeg, segment(0xE1, _exif_circle())), PICTURE),
        "jpeg with EXIF of nonsense": (
            lambda: after_start(jpeg, segment(0xE1, b"Exif\0\0MM\0*" + b"\xff" * 60_000)),
            PICTURE,
        ),
        "jpeg with a profile of 9 MB": (
            lambda: after_start(jpeg, *(segment(0xE2, b"ICC_PROFILE\0\x01\xff" + bytes(60_000)) for _ in range(150))),
            PICTURE,
        ),
        "jpeg with 100,001 comments": (lambda: after_start(jpeg, segment(0xFE, b"") * 100_001), TOO_LARGE),
        "jpeg with a page in its comment": (lambda: after_start(jpeg, segment(0xFE, page)), PICTURE),
        "jpeg with an archive behind it": (lambda: jpeg + zipped(), PICTURE),
        "jpeg of two sizes": (
            lambda: after_start(jpeg, segment(0xC0, struct.pack(">BHHB", 8, 9000, 9000, 1) + b"\x01\x11\0")),
            DAMAGED,
        ),
        "jpeg of 12 bits": (lambda: jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), DAMAGED),
        "jpeg in arithmetic coding": (lambda: jpeg.replace(b"\xff\xc0", b"\xff\xc9", 1), EITHER),
        "jpeg of the lossless kind": (lambda: jpeg.replace(b"\xff\xc0", b"\xff\xc3", 1), DAMAGED),
        "jpeg without tables of Huffman": (lambda: jpeg.replace(b"\xff\xc4", b"\xff\xfe"), EITHER),
        "jpeg without tables of quanta": (lambda: jpeg.replace(b"\xff\xdb", b"\xff\xfe"), DAMAGED),
        "jpeg with a segment of no length": (lambda: after_start(jpeg, b"\xff\xe5\0\0"), DAMAGED),
        "jpeg of padding": (lambda: b"\xff\xd8" + b"\xff" * 9_000_000, DAMAGED),
        "only the start of a jpeg": (lambda: b"\xff\xd8\xff", DAMAGED),
        # WebP
        "webp with 100 frames": (lambda: _frames("WEBP", 100), PICTURE),
        "webp on a canvas of 16384 squared": (lambda: riff(canvas(16384, 16384), (b"VP8 ", webp[20:])), TOO_LARGE),
        "webp on a canvas of 4 Gigapixels": (lambda: riff(canvas(2**24, 2**24), (b"VP8 ", webp[20:])), TOO_LARGE),
        "webp on a canvas of another size": (lambda: riff(canvas(4000, 4000), (b"VP8 ", webp[20:])), DAMAGED),
        "webp without loss that claims 16384 squared": (
            lambda: lossless[:21] + struct.pack("<I", 0x0FFFFFFF) + lossless[25:],
            TOO_LARGE,
        ),
        "webp cut in the middle": (lambda: webp[: len(webp) // 2], DAMAGED),
        "webp that claims 4 GB": (lambda: webp[:4] + b"\xff\xff\xff\xff" + webp[8:], DAMAGED),
        "webp that claims no bytes": (lambda: webp[:4] + bytes(4) + webp[8:], DAMAGED),
        "webp of nothing": (lambda: riff(), DAMAGED),
        "webp with alpha of nonsense": (
            lambda: riff(canvas(64, 48, 0x10), (b"ALPH", b"\x01" + b"\xff" * 40), (b"VP8 ", webp[20:])),
            DAMAGED,
        ),
        "webp without loss, of nonsense": (lambda: lossless[:26] + b"\xa5" * 200, DAMAGED),
        # Other formats, and none
        "gif": (lambda: saved("GIF"), FORMAT),
        "gif of 65535 squared": (lambda: b"GIF89a\xff\xff\xff\xff\0\0\0", FORMAT),
        "bmp": (lambda: saved("BMP"), FORMAT),
        "tiff": (lambda: saved("TIFF"), FORMAT),
        "ico": (lambda: saved("ICO"), FORMAT),
        "ppm of 4 Gigapixels": (lambda: b"P6 65535 65535 255\n", FORMAT),
        "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", FORMAT),
        "pdf": (lambda: b"%PDF-1.7\n", FORMAT),
        "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', FORMAT),
        "mvg": (lambda: b"push graphic-context\nfill 'url(https://127.0.0.1/\"|id\")'\npop graphic-context", FORMAT),
        "page": (lambda: page, FORMAT),
        "archive": (zipped, FORMAT),
        "gzip": (lambda: gzip.compress(bytes(50_000_000)), FORMAT),
        "psd": (lambda: b"8BPS\0\x01" + bytes(6) + b"\0\x03" + b"\0\0\xff\xff" * 2 + b"\0\x08\0\x03", FORMAT),
        "heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", FORMAT),
        "jpeg 2000": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n", FORMAT),
        "elf": (lambda: b"\x7fELF" + bytes(100), FORMAT),
        "nothing": (lambda: b"", FORMAT),
        "one byte": (lambda: b"a", FORMAT),
        "10 MB and a byte": (lambda: plain + bytes(10_000_001 - len(plain)), TOO_LARGE),
    }


BOMBS = _made()
