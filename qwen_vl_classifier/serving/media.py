"""What a request holds for a picture -> the bytes of an image file that opens, or an `ImageError`.

Only what the request itself carries is looked at. A URL or a path is refused like any other text that is no
base64, without repeating it: answers and logs must not tell what a caller tried, nor what lies on this machine.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from qwen_vl_classifier.data.fetching import Fetcher
from qwen_vl_classifier.data.images import DEFAULT_LIMITS, ImageLimits, open_image
from qwen_vl_classifier.errors import ImageError

# RFC 2397 with base64 asked for; the media type is not believed, the content says what the picture is.
_DATA_URI = re.compile(r"data:(?:image/[\w.+-]*)?(?:;[\w.+-]+=[\w.+-]*)*;base64,", re.IGNORECASE | re.ASCII)
_LONGEST_START = 256  # characters of a data URI before its data


def decode_image(text: str, *, limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Decode a picture that a request carries, and make sure that it opens.

    Args:
        text: A data URI (RFC 2397) with base64, or base64 alone (RFC 4648, section 4), of a JPEG, PNG or WebP
            file. White space, which some encoders put at the end of lines, is passed over.
        limits: The largest picture to let in.

    Returns:
        The image file, byte for byte.

    Raises:
        ImageError: It is something else, or a picture that cannot, or must not, be opened. The message holds
            nothing of the text.

    Example:
        >>> decode_image("/etc/passwd")
        Traceback (most recent call last):
        ...
        qwen_vl_classifier.errors.ImageError: the image is neither a data URI with base64 nor base64; wanted a \
JPEG, PNG or WebP file in one of these; URLs and paths are not opened
    """
    start = _DATA_URI.match(text, 0, _LONGEST_START)
    data = "".join(text[start.end() :].split()) if start else "".join(text.split())
    size = len(data) // 4 * 3  # too much by at most the two bytes of padding
    if size - 2 > limits.max_bytes:
        raise ImageError(
            f"the image has {size:,} bytes; wanted at most {limits.max_bytes:,}; compress it or scale it down",
            code="image_too_large",
        )
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters outside of ASCII
        content = b""
    if not content:
        raise ImageError(
            "the image is neither a data URI with base64 nor base64; wanted a JPEG, PNG or WebP file in one of "
            "these; URLs and paths are not opened",
            code="image_refused",
        )
    open_image(content, limits=limits)
    return content


class MediaReader:
    """Reads what a request holds for a picture."""

    def __init__(self, *, limits: ImageLimits, fetcher: Fetcher | None, root: Path | None) -> None:
        raise NotImplementedError

    async def read(self, text: str) -> bytes:
        """Return the bytes of an image file."""
        raise NotImplementedError

    def close(self) -> None:
        """End the threads that read and fetch."""
        raise NotImplementedError
