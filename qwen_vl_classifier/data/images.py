"""The one door by which pixels come in: path, bytes or PIL image to an RGB picture, or to an `ImageError`."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import BinaryIO

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from qwen_vl_classifier.data.example import ImageSource
from qwen_vl_classifier.data.image_headers import Header, exif_orientation, pixel_data, read_header
from qwen_vl_classifier.errors import ConfigError, ImageError

# The classes themselves, not `Image.open`: it would apply a pixel limit of its own, with a warning.
_DECODERS: dict[str, type[ImageFile]] = {"JPEG": JpegImageFile, "PNG": PngImageFile, "WEBP": WebPImageFile}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The largest picture that is let in; checked before anything is decoded.

    Attributes:
        max_pixels: Width times height.
        max_bytes: Size of the file. PIL images have none and are not held to it.
        max_aspect_ratio: Longer side divided by shorter side. Qwen's image processor fails beyond 200.

    Raises:
        ConfigError: If a limit is below 1.
    """

    max_pixels: int = 25_000_000
    max_bytes: int = 50 * 1024**2
    max_aspect_ratio: float = 200.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 1:
                raise ConfigError(f"{field.name} is {value}; wanted at least 1; raise it or leave it out")


DEFAULT_LIMITS = ImageLimits()


def open_image(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Open a picture as RGB pixels, upright, with nothing left to load or to close.

    Files may be JPEG, PNG or WebP, told apart by content. Of several frames the first is taken; of an
    animated PNG, its default image. EXIF orientation is applied, transparency is laid on white, 16-bit grey
    is scaled from its full range, 0 to 65535, to 8 bits. A PIL image may come from any format, since its
    decoder was the caller's choice; it is not changed, except that a lazy one is loaded.

    Args:
        source: Path, bytes of an image file, or PIL image. URLs are not fetched.
        limits: The largest picture to let in.

    Returns:
        A new image of mode RGB, without metadata.

    Raises:
        ImageError: If the picture is missing, damaged, of another kind, or beyond a limit.

    Example:
        >>> open_image(Image.new("L", (3, 2), 128)).getpixel((0, 0))
        (128, 128, 128)
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        _check_shape(source.size, name, limits)
        return _upright_rgb(source, _orientation(source, name), name)
    with _opened(source, name, limits) as stream:
        header = _checked_header(stream, name, limits)
        with _refusing_damage(name):
            image = _DECODERS[header.format](io.BytesIO(pixel_data(stream, header)))
    if image.size != (header.width, header.height):
        raise ImageError(f"{name} declares two different sizes; wanted an undamaged file; save it again")
    return _upright_rgb(image, header.orientation, name)


def image_size(source: ImageSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Return (width, height) in pixels that `open_image` would give, from the header alone.

    A damaged picture may still have a sound header, so `open_image` can fail where this does not.

    Raises:
        ImageError: As `open_image` does for all that the header shows.
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        width, height = source.size
        _check_shape(source.size, name, limits)
        orientation = _orientation(source, name)
    else:
        with _opened(source, name, limits) as stream:
            header = _checked_header(stream, name, limits)
        width, height, orientation = header.width, header.height, header.orientation
    return (height, width) if orientation >= 5 else (width, height)


def is_url(text: str) -> bool:
    """Tell whether `text` names something to fetch rather than a file."""
    return _URL.match(text) is not None


def _name(source: ImageSource) -> str:
    """Name a picture in an error, in one line of bounded length; refuse what cannot be a picture."""
    if isinstance(source, bytes):
        return f"<bytes> of length {len(source)}"
    if isinstance(source, Image.Image):
        path = getattr(source, "filename", "")
        return f"<PIL image> of {_quoted(path)}" if path else "<PIL image>"
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise ImageError(
            f"the picture is of type {kind}; wanted a path, bytes or a PIL image; convert it",
            code="image_refused",
        )
    name = _quoted(os.fspath(source))
    if isinstance(source, str) and is_url(source):
        raise ImageError(
            f"{name} is a URL; wanted a local file, because URLs are off; download it first", code="image_refused"
        )
    return name


def _quoted(path: object) -> str:
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}")


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes, name: str, limits: ImageLimits) -> Iterator[BinaryIO]:
    """Give a stream of at most `limits.max_bytes` over bytes or a regular file."""
    if isinstance(source, bytes):
        _check_bytes(len(source), name, limits)
        yield io.BytesIO(source)
        return
    try:
        file = open(source, "rb", opener=open_without_waiting)  # noqa: SIM115
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL or cannot be encoded
        reason = getattr(error, "strerror", None) or "the path is not valid"
        raise ImageError(
            f"{name} cannot be opened ({reason}); wanted an image file; check the path",
            code="image_missing" if isinstance(error, FileNotFoundError) else "image_refused",
        ) from None
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(
                f"{name} is a pipe, socket or device; wanted a regular file; copy it to one", code="image_refused"
            )
        _check_bytes(status.st_size, name, limits)
        yield file


def open_without_waiting(path: str, flags: int) -> int:
    """Open for reading, but do not wait for a writer where `path` is a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _checked_header(stream: BinaryIO, name: str, limits: ImageLimits) -> Header:
    with _refusing_damage(name):
        header = read_header(stream)
    _check_shape((header.width, header.height), name, limits)
    return header


def _check_bytes(size: int, name: str, limits: ImageLimits) -> None:
    if size > limits.max_bytes:
        raise ImageError(
            f"{name} has {size:,} bytes; wanted at most {limits.max_bytes:,}; compress it or raise max_bytes",
            code="image_too_large",
        )


def _check_shape(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} pixels; wanted at least 1x1; leave it out")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{name} is {width}x{height}, {width * height:,} pixels; wanted at most {limits.max_pixels:,}; "
            "scale it down or raise max_pixels",
            code="image_too_large",
        )
    if max(size) > limits.max_aspect_ratio * min(size):
        raise ImageError(
            f"{name} is {width}x{height} pixels; wanted a longer side of at most {limits.max_aspect_ratio:g} "
            "times the shorter; crop it",
            code="image_too_large",
        )


@contextmanager
def _refusing_damage(name: str) -> Iterator[None]:
    """Turn whatever a damaged picture makes the readers raise into an `ImageError`.

    On hostile input Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error and,
    by its own defects, nearly any other `Exception`. Its texts can hold heap addresses (CVE-2026-22778), so
    they are not passed on. A MemoryError is: the picture is within its limits, the machine has no room.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        seen = str(error) if isinstance(error, ImageError) else "the pixels cannot be decoded"
        raise ImageError(
            f"{name}: {seen}; wanted a complete JPEG, PNG or WebP file; save it again as one of these",
            code=error.code if isinstance(error, ImageError) else "image_damaged",
        ) from None


def _orientation(image: Image.Image, name: str) -> int:
    """Return the EXIF orientation of a PIL image, 1 to 8."""
    if image.format == "PNG":
        with _refusing_damage(name):
            image.load()  # a PNG's EXIF may stand after its pixels
    return exif_orientation(image.info.get("exif"))


def _upright_rgb(image: Image.Image, orientation: int, name: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(
            f"{name} has no fixed range of values; wanted 8-bit or 16-bit pixels; scale it to 0..255",
            code="image_format",
        )
    with _refusing_damage(name):
        image.load()
        rgb = _on_white(_eight_bit(image))
        rgb = rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb
    # Without the EXIF that has been applied, opening the result again changes nothing.
    rgb.info = {}
    return rgb


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey ("I;16" and its kin, or "I") to "L" or "LA"; return any other image as it is."""
    if not image.mode.startswith("I"):
        return image
    wide = image.convert("I")
    # Pillow's own conversion would cut off at 255. Rounds to nearest; "L" then clips what is out of range.
    grey = wide.point(lambda value: value / 257 + 0.5).convert("L")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and 0 <= transparent <= 0xFFFF:
        alpha = [255] * 0x10000
        alpha[transparent] = 0
        grey.putalpha(wide.point(alpha, "L"))
    grey.info.pop("transparency", None)
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(layer, mask=layer)
    return page
