"""Limits on the size, shape and format of pictures, checked before anything is decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import ConfigError, ImageError

IMAGE_FORMATS = ("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC")
"""Names of all formats that can be read; HEIC with the extra `heic`."""

FULL_SIZE_PIXELS = 25_000_000
"""The largest picture that is read at full size; a larger one, where limits allow it, at a half, a quarter, ..."""

THREADS_VARIABLE = "QWEN_VL_CLASSIFIER_DECODING_THREADS"
"""The environment variable for how many threads of this process open pictures."""

_MOST_THREADS = 16  # each holds a picture at its full size


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Which pictures are accepted.

    Attributes:
        max_pixels: Width times height, as stored.
        max_bytes: Size of the file. PIL images have none and are not held to it.
        max_aspect_ratio: Longer side divided by shorter side. Qwen's image processor fails beyond 200.
        formats: Names in `IMAGE_FORMATS`; by default those that every browser reads.
        grey_bits: How to read grey pictures that store values of at most 4095 in 16 bits: 12 scales them from 0..4095,
            16 from 0..65535, which leaves them nearly black; 0 refuses them, since nothing says which is right.

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
                raise ConfigError(f"{name} is {value}; expected at least 1; raise it or leave it out")
        for name in self.formats:
            if name not in IMAGE_FORMATS:
                raise ConfigError(f"{name!r} is not an image format; expected some of {', '.join(IMAGE_FORMATS)}")
        if self.grey_bits not in (0, 12, 16):
            raise ConfigError(f"grey_bits is {self.grey_bits}; expected 12 or 16; leave it out to refuse such pictures")

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes, as JSON gives it back: with a list of formats."""
        return {**asdict(self), "formats": list(self.formats)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ImageLimits:
        """Make limits from what `to_json` returned."""
        return cls(**{**record, "formats": tuple(record["formats"])})


DEFAULT_LIMITS = ImageLimits(formats=IMAGE_FORMATS)
"""The limits for files of this machine and its stores. What strangers send is limited to `ImageLimits()`."""

_limits = DEFAULT_LIMITS


def current_limits() -> ImageLimits:
    """Return the limits that apply where a call gives none."""
    return _limits


@contextmanager
def image_limits(**changes: Any) -> Iterator[None]:
    """Change the limits that apply where a call gives none, in all threads of this process, until the block ends.

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
    """Set the limits that apply where a call gives none, for good: a worker process takes those of its driver."""
    global _limits
    _limits = limits


def decoding_threads(cores: int = 0) -> int:
    """Return how many threads open pictures at a time, each of which holds one at its full size.

    One for each core, and at most 16. OMP_NUM_THREADS is not looked at: launchers set it to 1 where a GPU computes, and
    pictures are still to be read. The environment variable QWEN_VL_CLASSIFIER_DECODING_THREADS sets another number.

    Args:
        cores: Those that this process was given; 0 for all that it may use, which processes of one machine that train
            together (torchrun) divide among them.

    Raises:
        ConfigError: The variable is no number from 1.
    """
    given = os.environ.get(THREADS_VARIABLE, "")
    if given:
        if not given.isascii() or not given.isdigit() or int(given) < 1:
            raise ConfigError(f"{THREADS_VARIABLE} is {given!r}; expected a number from 1; set another or unset it")
        return int(given)
    if not cores:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        together = os.environ.get("LOCAL_WORLD_SIZE", "")
        cores = usable // int(together) if together.isdigit() and int(together) else usable
    return min(_MOST_THREADS, max(1, cores))


def check_bytes(size: int, name: str, limits: ImageLimits) -> None:
    """Refuse a file that is too large; the message calls it `name`.

    Raises:
        ImageError: It is.
    """
    if size > limits.max_bytes:
        raise ImageError(
            f"{name} has {size:,} bytes; expected at most {limits.max_bytes:,}; "
            f"compress it or raise {spelled('max_bytes', flag='max_image_bytes')}",
            code="image_too_large",
        )


def check_shape(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    """Refuse a picture that is too large, too thin or empty; the message calls it `name`.

    Raises:
        ImageError: It is.
    """
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} pixels; expected at least 1x1; leave it out")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{name} is {width}x{height}, {width * height:,} pixels; expected at most {limits.max_pixels:,}; "
            f"scale it down or raise {spelled('max_pixels', flag='max_image_pixels')}",
            code="image_too_large",
        )
    if max(size) > limits.max_aspect_ratio * min(size):
        raise ImageError(
            f"{name} is {width}x{height} pixels; expected a longer side of at most {limits.max_aspect_ratio:g} "
            "times the shorter; crop it",
            code="image_too_large",
        )
