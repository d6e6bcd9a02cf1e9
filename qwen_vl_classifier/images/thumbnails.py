"""Small copies of pictures for a page."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image


def thumbnail(picture: Image.Image, side: int) -> dict[str, Any]:
    """Make a small JPEG of a picture.

    Args:
        picture: As `open_image` gave it; it is not changed.
        side: Longer side, in pixels, within which the page shows it.

    Returns:
        `content` (base64), `width` and `height` at which to show it, and `enlarged`: a small picture is shown at the
        largest whole multiple of its size that fits.
    """
    picture = picture.copy()
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, subsampling=0)
    scale = side // max(picture.size)
    return {
        "content": base64.b64encode(buffer.getvalue()).decode(),
        "width": picture.width * scale,
        "height": picture.height * scale,
        "enlarged": scale > 1,
    }
