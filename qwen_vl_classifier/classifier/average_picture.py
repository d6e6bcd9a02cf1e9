"""The average picture of the training rows, kept beside the head: what an explanation compares a picture with.

It is small, and averaged over many pictures, so that none of them can be seen in it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from qwen_vl_classifier.errors import ArtifactError, ImageError
from qwen_vl_classifier.images.look_alikes import Looks
from qwen_vl_classifier.images.opening import image_size, open_image

AVERAGE = "average.png"

FEWEST_PICTURES = 20
"""Of fewer pictures, an average would show the pictures themselves."""

_MOST_SIDE = 64  # pixels


def average_of(looks: Looks) -> Image.Image | None:
    """Return the average of some pictures, of mode RGB and 8 x 8 pixels; `None` where they are too few.

    Args:
        looks: Of distinct pictures.
    """
    if len(looks.hashes) < FEWEST_PICTURES:
        return None
    return Image.fromarray(looks.pixels().mean(axis=0).round().astype(np.uint8))


def read_average(folder: Path) -> Image.Image | None:
    """Return the average picture of a saved classifier, of mode RGB; `None` where it has none.

    Raises:
        ArtifactError: The file is no picture, or larger than an average picture may be.
    """
    path = folder / AVERAGE
    if not path.exists():
        return None
    try:
        width, height = image_size(path)  # of a large picture, no pixel is decoded
        if max(width, height) > _MOST_SIDE:
            raise ArtifactError(
                f"{path}: the average training picture has {width} x {height} pixels; expected at most {_MOST_SIDE} x "
                f"{_MOST_SIDE}; save the classifier again, or remove the file"
            )
        return open_image(path)
    except ImageError as error:
        raise ArtifactError(
            f"{path}: the average training picture cannot be read: {error}; save the classifier again, or remove the "
            "file"
        ) from None
