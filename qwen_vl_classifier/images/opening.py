"""Open pictures: a path, bytes or a PIL image becomes RGB pixels or an `ImageError`; there is no other way in."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import PIL
from PIL import AvifImagePlugin, Image, ImageOps, features
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import ImageError, one_of
from qwen_vl_classifier.extras import install_command
from qwen_vl_classifier.files.bounded import open_regular_file
from qwen_vl_classifier.files.near_names import beside
from qwen_vl_classifier.files.paths import is_url
from qwen_vl_classifier.images.file_kinds import KIND_BYTES, file_kind, image_format
from qwen_vl_classifier.images.header_parts import ImageHeader, exif_orientation
from qwen_vl_classifier.images.headers import pixel_data, read_header
from qwen_vl_classifier.images.limits import (
    FULL_SIZE_PIXELS,
    ImageLimits,
    check_bytes,
    check_shape,
    current_limits,
)
from qwen_vl_classifier.images.source import ImageSource
from qwen_vl_classifier.images.time_limit import TimedBytes


def _heic(stream: BinaryIO) -> Image.Image:
    from pillow_heif import HeifImageFile, options

    options.DECODE_THREADS = 1
    picture: Image.Image = HeifImageFile(stream)
    return picture


def _tiff(stream: BinaryIO) -> Image.Image:
    _silence_libtiff()
    return TiffImageFile(stream)


@functools.cache
def _silence_libtiff() -> None:
    """Keep libtiff from writing what it finds in damaged files to standard error; Pillow has no setting for that."""
    bundled = Path(PIL.__file__).parent.parent.glob("pillow.libs/libtiff*")
    for name in (*map(str, bundled), "libtiff.so.6", "libtiff.so.5"):
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)  # the one that Pillow has loaded, if any
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)


# The classes themselves, not `Image.open`: it would apply a pixel limit of its own, with a warning.
_DECODERS: dict[str, Callable[[BinaryIO], Image.Image]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": _tiff,
    "AVIF": AvifImageFile,
    "HEIC": _heic,
}

_JPEG_SCALES = 8  # the decoder itself can reduce so far
_GREY_PIXELS = 2000  # of fewer, the range of their values says nothing
_TWELVE_BITS = 4095

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: ImageSource, *, limits: ImageLimits | None = None) -> Image.Image:
    """Open a picture as RGB pixels, upright, with nothing left to load or to close.

    Files may be JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC; their content decides which. Of several frames or pages
    the first is taken; of an animated PNG, its default image. EXIF orientation is applied, and transparency is laid on
    white. Grey values of 16 bits are scaled to 8 bits from their full range, 0 to 65535, or from the range that a TIFF
    file declares. A picture of 2,000 pixels or more whose values end at 4095 is refused, since it would be nearly
    black, unless `limits.grey_bits` says what it is. A PIL image may come from any format, since the caller chose its
    decoder; it is not changed, except that a lazy one is loaded.

    A picture above 25 megapixels, where `limits` allow it, is reduced by the smallest power of two that brings it to
    25 megapixels or fewer. A JPEG is reduced by its decoder, so that all its pixels are never in memory.

    Args:
        source: Path, bytes of an image file, or PIL image. URLs are not fetched.
        limits: Which pictures to accept; `None` takes those of `image_limits`.

    Returns:
        A new image of mode RGB, without metadata.

    Raises:
        ImageError: If the picture is missing, damaged, of another kind, or beyond a limit.

    Example:
        >>> open_image(Image.new("L", (3, 2), 128)).getpixel((0, 0))
        (128, 128, 128)
    """
    limits = limits or current_limits()
    name = _name(source)
    if isinstance(source, Image.Image):
        check_shape(source.size, name, limits)
        return _upright_rgb(source, ImageHeader("", *source.size, _orientation(source, name)), name, limits)
    with _opened(source, name, limits) as stream:
        header = _checked_header(stream, name, limits)
        with _refusing_damage(name, limits):
            data = pixel_data(stream, header)
            image = _DECODERS[header.format](TimedBytes(data))
            if header.format == "HEIC":  # its decoder applies the orientation, and may find another size
                image.load()
                header = ImageHeader("HEIC", *_upright_size(header), 1)
    if image.size != (header.width, header.height):
        raise ImageError(f"{name} declares two different sizes; expected an undamaged file; save it again")
    return _upright_rgb(image, header, name, limits)


def image_size(source: ImageSource, *, limits: ImageLimits | None = None) -> tuple[int, int]:
    """Return the (width, height) in pixels of what `open_image` would return, from the header alone.

    The header of a damaged picture may be intact, so `open_image` can fail where this does not.

    Raises:
        ImageError: The picture is missing, or its header shows that it is damaged, of another kind or beyond a limit.
    """
    limits = limits or current_limits()
    name = _name(source)
    if isinstance(source, Image.Image):
        check_shape(source.size, name, limits)
        header = ImageHeader("", *source.size, _orientation(source, name))
    else:
        with _opened(source, name, limits) as stream:
            header = _checked_header(stream, name, limits)
    scale = _reduction(header.width, header.height)
    width, height = _upright_size(header)
    return math.ceil(width / scale), math.ceil(height / scale)


def _upright_size(header: ImageHeader) -> tuple[int, int]:
    return (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)


def _reduction(width: int, height: int) -> int:
    """Return the factor by which a picture is reduced: 1, or the smallest power of two that makes it small enough."""
    scale = 1
    while math.ceil(width / scale) * math.ceil(height / scale) > FULL_SIZE_PIXELS:
        scale *= 2
    return scale


def _has_heic() -> bool:
    return importlib.util.find_spec("pillow_heif") is not None


def prepare_decoders(formats: Sequence[str]) -> None:
    """Load the decoders of some formats and keep them from starting threads, before a process gives up the right to."""
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    _silence_libtiff()
    if "HEIC" in formats and _has_heic():
        from pillow_heif import options

        options.DECODE_THREADS = 1


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
            f"the picture is of type {kind}; expected a path, bytes or a PIL image; convert it",
            code="image_refused",
        )
    name = _quoted(os.fspath(source))
    if isinstance(source, str) and is_url(source):
        raise ImageError(
            f"{name} is a URL, and URLs are not fetched here; expected a local file; download it first",
            code="image_refused",
        )
    return name


def _quoted(path: object) -> str:
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}")


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes, name: str, limits: ImageLimits) -> Iterator[BinaryIO]:
    """Give a stream of at most `limits.max_bytes` over bytes or a regular file."""
    if isinstance(source, bytes):
        check_bytes(len(source), name, limits)
        yield io.BytesIO(source)
        return
    try:
        file = open_regular_file(source)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        near = beside(source) if missing else ""
        raise ImageError(
            f"{name} cannot be opened ({error.strerror}); expected an image file; {near or 'check the path'}",
            code="image_missing" if missing else "image_refused",
        ) from None
    with file:
        check_bytes(os.fstat(file.fileno()).st_size, name, limits)
        yield file


def _checked_header(stream: BinaryIO, name: str, limits: ImageLimits) -> ImageHeader:
    start = stream.read(KIND_BYTES)
    format = image_format(start)
    if format is None:
        raise ImageError(
            f"{name}: this is {file_kind(start)}, not a picture that can be read; expected a complete "
            f"{one_of(limits.formats)} file; save it again as one of these",
            code="image_format",
        )
    if format not in limits.formats:
        raise ImageError(
            f"{name} is {file_kind(start)}; expected {one_of(limits.formats)}; save it as one of these",
            code="image_format",
        )
    if format == "HEIC" and not _has_heic():
        raise ImageError(
            f"{name} is a HEIC picture, and pillow-heif, which reads these, is not installed; "
            f"run: {install_command('heic')}, or save the picture as JPEG",
            code="image_format",
        )
    if format == "AVIF" and not features.check("avif"):
        raise ImageError(
            f"{name} is an AVIF picture, and this build of Pillow cannot decode AVIF; install "
            "Pillow from PyPI, or save the picture as JPEG",
            code="image_format",
        )
    with _refusing_damage(name, limits):
        header = read_header(stream, format)
    check_shape((header.width, header.height), name, limits)
    return header


@contextmanager
def _refusing_damage(name: str, limits: ImageLimits) -> Iterator[None]:
    """Turn any exception that a damaged picture causes in a reader into an `ImageError`.

    On hostile input Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error and, where it
    has defects, nearly any other `Exception`. Its messages can hold heap addresses (CVE-2026-22778), so they are not
    repeated. A MemoryError passes: the picture is within its limits, and the machine has too little memory.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        seen = str(error) if isinstance(error, ImageError) else "the pixels cannot be decoded"
        raise ImageError(
            f"{name}: {seen}; expected a complete {one_of(limits.formats)} file; save it again as one of these",
            code=error.code if isinstance(error, ImageError) else "image_damaged",
        ) from None


def _orientation(image: Image.Image, name: str) -> int:
    """Return the EXIF orientation of a PIL image, 1 to 8."""
    if image.format == "PNG":
        with _refusing_damage(name, current_limits()):
            image.load()  # the EXIF of a PNG may follow its pixels
    return exif_orientation(image.info.get("exif"))


def _upright_rgb(image: Image.Image, header: ImageHeader, name: str, limits: ImageLimits) -> Image.Image:
    if image.mode == "F":
        raise ImageError(
            f"{name} has no fixed range of values; expected 8-bit or 16-bit pixels; scale it to 0..255",
            code="image_format",
        )
    scale = _reduction(*image.size)
    with _refusing_damage(name, limits):
        if scale > 1 and header.format == "JPEG":
            by_decoder = min(scale, _JPEG_SCALES)
            image.draft(None, (image.width // by_decoder, image.height // by_decoder))
            scale //= by_decoder
        image.load()
        if image.mode.startswith("I"):  # 16-bit grey: "I", "I;16" or "I;16B"
            wide = image.convert("I")
            wide.info = image.info
            image = wide
    white = _white(image, header, name, limits)
    with _refusing_damage(name, limits):
        rgb = _on_white(_eight_bit(image, white), is_ours=bool(header.format))
        if scale > 1:
            rgb = rgb.reduce(scale)
        if header.white_is_zero:
            rgb = ImageOps.invert(rgb)
        rgb = rgb.transpose(_UPRIGHT[header.orientation]) if header.orientation in _UPRIGHT else rgb
    # Without the EXIF that has been applied, opening the result again changes nothing.
    rgb.info = {}
    return rgb


def _white(image: Image.Image, header: ImageHeader, name: str, limits: ImageLimits) -> int:
    """Return the value of 16-bit grey that is white."""
    if header.grey_bits:
        return int(2**header.grey_bits - 1)
    if image.mode != "I" or image.width * image.height < _GREY_PIXELS:
        return 0xFFFF
    _, highest = image.getextrema()
    assert isinstance(highest, (int, float))  # of a single band
    if not 0 < highest <= _TWELVE_BITS or limits.grey_bits == 16:
        return 0xFFFF
    if limits.grey_bits == 12:
        return _TWELVE_BITS
    raise ImageError(
        f"{name} has 16-bit grey values up to {highest}: it is nearly black, or its values have 12 bits; choose with "
        f"{spelled('grey_bits', 12)} (scales from 0..4095) or {spelled('grey_bits', 16)} (leaves it dark)",
        code="image_format",
    )


def _eight_bit(image: Image.Image, white: int) -> Image.Image:
    """Scale 16-bit grey, in mode "I", to "L" or "LA"; return any other image as it is."""
    if image.mode != "I":
        return image
    # Pillow's own conversion would cut off at 255. This rounds to nearest, and "L" clips what is out of range.
    unit = white / 255
    grey = image.point(lambda value: value / unit + 0.5).convert("L")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and 0 <= transparent <= 0xFFFF:
        alpha = [255] * 0x10000
        alpha[transparent] = 0
        grey.putalpha(image.point(alpha, "L"))
    grey.info.pop("transparency", None)
    return grey


def _on_white(image: Image.Image, *, is_ours: bool) -> Image.Image:
    """Return an RGB image with transparency laid on white; of a picture that we decoded, its pixels without a copy."""
    if not image.has_transparency_data:
        # Pillow has no public name for this. A copy would take as long as decoding, and twice the memory.
        return image._new(image.im) if is_ours and image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(layer, mask=layer)
    return page
