"""Which pictures are let in: their size, shape and format, checked before anything is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import ConfigError, ImageError

IMAGE_FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC")
"""Names of all formats that can be read; HEIC with the extra `heic`."""

FULL_SIZE_PIXELS = 25_000_000
"""The largest picture that is read in full. A larger one, where it is allowed, is read at a half, a quarter, ..."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Which pictures are let in; checked before anything is decoded.

    Attributes:
        max_pixels: Width times height, as stored.
        max_bytes: Size of the file. PIL images have none and are not held to it.
        max_aspect_ratio: Longer side divided by shorter side. Qwen's image processor fails beyond 200.
        formats: Names of formats, of `IMAGE_FORMATS`; without a choice, those that browsers have long read.
        grey_bits: What a grey picture is whose values are stored in 16 bits and do not pass 4095: 12 scales them from
            0..4095, 16 from 0..65535, which leaves it nearly black; 0 refuses it, since nothing says which it is.

    Raises:
        ConfigError: If a limit is below 1, or a format is not known.
    """

    max_pixels: int = FULL_SIZE_PIXELS
    max_bytes: int = 50 * 1024**2
    max_aspect_ratio: float = 200.0
    formats: tuple[str, ...] = ("JPEG", "PNG", "WebP")
    grey_bits: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_bytes", "max_aspect_ratio"):
            value = getattr(self, name)
            if not value >= 1:
                raise ConfigError(f"{name} is {value}; wanted at least 1; raise it or leave it out")
        for name in self.formats:
            if name not in IMAGE_FORMATS:
                raise ConfigError(f"{name!r} is no image format; expected some of {', '.join(IMAGE_FORMATS)}")
        if self.grey_bits not in (0, 12, 16):
            raise ConfigError(f"grey_bits is {self.grey_bits}; expected 12 or 16; leave it out to refuse such pictures")

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ImageLimits:
        """Make limits of what `to_json` gave."""
        return cls(**{**record, "formats": tuple(record["formats"])})


DEFAULT_LIMITS = ImageLimits(formats=IMAGE_FORMATS)
"""What is let in where nothing else is said: files of this machine and its stores, which are no stranger's."""

_limits = DEFAULT_LIMITS


def current_limits() -> ImageLimits:
    """Return the limits that hold where a call names none."""
    return _limits


@contextmanager
def image_limits(**changes: Any) -> Iterator[None]:
    """Let other pictures in, in all threads of this process, until the block ends.

    Args:
        **changes: Fields of `ImageLimits`; the others stay as they are.

    Example:
        >>> with image_limits(max_pixels=100_000_000):
        ...     current_limits().max_pixels
        100000000
    """
    before = _limits
    set_image_limits(replace(before, **changes))
    try:
        yield
    finally:
        set_image_limits(before)


def set_image_limits(limits: ImageLimits) -> None:
    """Set the limits that hold where a call names none, for good: a worker process takes those of its driver."""
    global _limits
    _limits = limits


def check_bytes(size: int, name: str, limits: ImageLimits) -> None:
    """Refuse a file that is too large.

    Raises:
        ImageError: It is; the message calls it `name`.
    """
    if size > limits.max_bytes:
        raise ImageError(
            f"{name} has {size:,} bytes; wanted at most {limits.max_bytes:,}; "
            f"compress it or raise {spelled('max_bytes', flag='max_image_bytes')}",
            code="image_too_large",
        )


def check_shape(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    """Refuse a picture that is too large, too thin or empty.

    Raises:
        ImageError: It is; the message calls it `name`.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} pixels; wanted at least 1x1; leave it out")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{name} is {width}x{height}, {width * height:,} pixels; wanted at most {limits.max_pixels:,}; "
            f"scale it down or raise {spelled('max_pixels', flag='max_image_pixels')}",
            code="image_too_large",
        )
    if max(size) > limits.max_aspect_ratio * min(size):
        raise ImageError(
            f"{name} is {width}x{height} pixels; wanted a longer side of at most {limits.max_aspect_ratio:g} "
            "times the shorter; crop it",
            code="image_too_large",
        )
