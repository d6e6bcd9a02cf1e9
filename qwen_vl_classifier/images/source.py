"""The types in which a picture can be given."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image"
"""Anything that `open_image` accepts: a path, the bytes of an image file, or a PIL image."""
