"""Files of pictures for tests, in every format, and a reading of them by Pillow alone."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

from qwen_vl_classifier.images.file_kinds import KIND_BYTES, image_format
from qwen_vl_classifier.images.header_parts import ImageHeader
from qwen_vl_classifier.images.headers import pixel_data, read_header

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)

COLOUR = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn).resize((61, 43)) for turn in (0, 90, 180)])
GREY = COLOUR.convert("L")
MODES = {
    "1": COLOUR.convert("1"),
    "L": GREY,
    "P": COLOUR.quantize(19),
    "RGB": COLOUR,
    "RGBA": Image.merge("RGBA", (*COLOUR.split(), GREY)),
    "LA": Image.merge("LA", (GREY, GREY)),
    "CMYK": COLOUR.convert("CMYK"),
}
ORIENTED = {turn: Image.Exif() for turn in range(1, 9)}
for _turn, _exif in ORIENTED.items():
    _exif[0x0112] = _turn


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, color: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body + chunk(b"IEND")


def exif_of(orientation: int) -> bytes:
    return b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def pixels(picture: Image.Image) -> list[tuple[int, int, int]]:
    return list(picture.get_flattened_data())


def corners(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Draw red, green, blue and white quarters: no turn or flip of it looks the same."""
    picture = Image.new("RGB", (2, 2))
    picture.putdata([RED, GREEN, BLUE, WHITE])
    return picture.resize(size, Image.Resampling.NEAREST)


def header_of(data: bytes) -> ImageHeader:
    """Read the header of a file of any format."""
    format = image_format(data[:KIND_BYTES])
    assert format is not None
    return read_header(io.BytesIO(data), format)


def kept_of(data: bytes) -> bytes:
    """Return what of a file reaches a decoder."""
    return pixel_data(io.BytesIO(data), header_of(data))


def by_pillow(data: bytes) -> Image.Image:
    """Open a picture as Pillow does, upright and on white."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    page = Image.new("RGB", layer.size, "white")
    page.paste(layer, mask=layer)
    return page


def tiff(*entries: tuple[int, int, int, bytes], order: str = "<", data: bytes = b"") -> bytes:
    """Write a TIFF file of entries of 4 bytes at most; the data begins where the last entry ends."""
    body = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0")
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + body + bytes(4) + data


def grey_tiff(values: np.ndarray, order: str, bits: int, photometric: int = 1, **tags: int) -> bytes:
    """Write grey values of 16 bits, or packed ones of 12."""
    height, width = values.shape
    if bits == 12:
        wide = values.astype(np.uint32).reshape(height, -1, 2)
        both = (wide[..., 0] << 12) | wide[..., 1]
        data = np.stack([both >> 16, both >> 8 & 255, both & 255], -1).astype(np.uint8).tobytes()
    else:
        data = values.astype(f"{order}u2").tobytes()
    numbers = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height, 279: len(data)}
    numbers |= {int(tag[1:]): value for tag, value in tags.items()}
    numbers[273] = 8 + 2 + 12 * (len(numbers) + 1) + 4
    entries = [(tag, 4, 1, struct.pack(f"{order}I", value)) for tag, value in sorted(numbers.items())]
    return tiff(*entries, order=order, data=data)


RAMP = np.tile(np.arange(64, dtype=np.uint16), (40, 1))


SMALL = {
    "JPEG": encoded(corners(), "JPEG", exif=exif_of(6)),
    "progressive JPEG": encoded(corners(), "JPEG", progressive=True),
    "CMYK JPEG": encoded(corners().convert("CMYK"), "JPEG"),
    "PNG": encoded(corners(), "PNG", exif=exif_of(8)),
    "palette PNG": encoded(corners().quantize(4), "PNG", transparency=b"\0\x80"),
    "WebP": encoded(corners(), "WEBP"),
    "lossless WebP": encoded(corners().convert("RGBA"), "WEBP", lossless=True, exif=exif_of(3)[6:]),
    "animated WebP": encoded(corners(), "WEBP", save_all=True, append_images=[Image.new("RGB", (48, 32))]),
}

FILES = {
    **{f"GIF {mode}": encoded(MODES[mode], "GIF") for mode in ("1", "L", "P", "RGB", "RGBA")},
    "GIF transparent": encoded(MODES["P"], "GIF", transparency=3, comment=b"a comment"),
    "GIF interlaced": encoded(MODES["P"], "GIF", interlace=1),
    **{f"BMP {mode}": encoded(MODES[mode], "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")},
    **{f"TIFF {mode}": encoded(picture, "TIFF") for mode, picture in MODES.items()},
    **{
        f"TIFF {mode} {compression}": encoded(MODES[mode], "TIFF", compression=compression)
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
        for mode in ("L", "P", "RGB", "RGBA")
    },
    "TIFF jpeg": encoded(COLOUR, "TIFF", compression="jpeg"),
    "TIFF group4": encoded(MODES["1"], "TIFF", compression="group4"),
    "TIFF big": encoded(COLOUR, "TIFF", big_tiff=True),
    **{f"TIFF turned {turn}": encoded(COLOUR, "TIFF", exif=exif) for turn, exif in ORIENTED.items()},
    **{f"AVIF {mode}": encoded(MODES[mode], "AVIF") for mode in ("L", "RGB", "RGBA")},
    **{f"AVIF turned {turn}": encoded(COLOUR, "AVIF", exif=exif.tobytes()) for turn, exif in ORIENTED.items()},
}
