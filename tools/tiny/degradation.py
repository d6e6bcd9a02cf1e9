"""Pictures of pre-training: scenes in varied colours and light, degraded as real pictures are."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

from qwen_vl_classifier.scenes.drawing import COLOURS, Colour, Rng, Scene, draw, vary


def draw_varied(scene: Scene, rng: Rng) -> Image.Image:
    """Render a scene with hues and a background that vary, and degrade the picture (see `degrade`)."""
    corners = _faded(scene.background, rng) if rng.random() < 0.3 else None
    return degrade(draw(scene, corners=corners, hue=lambda name: vary(COLOURS[name], rng)), rng)


def _faded(colour: Colour, rng: Rng) -> Image.Image:
    """Return 2 x 2 pixels around a colour: the corners of a background that grows lighter or darker."""
    corners = np.clip(np.add(colour, rng.normal(0, 18, (2, 2, 1)) + rng.normal(0, 5, (2, 2, 3))), 0, 255)
    return Image.fromarray(corners.astype(np.uint8))


def degrade(picture: Image.Image, rng: Rng) -> Image.Image:
    """Blur, shrink, add noise, change the light or compress a picture; half of the time, leave it as it is.

    What is seen where stays the same, and so does the size.

    Args:
        picture: An RGB picture.
        rng: Where randomness comes from.
    """
    if rng.random() < 0.5:
        return picture
    if rng.random() < 0.25:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.2))))
    if rng.random() < 0.25:
        factor = rng.uniform(0.55, 0.9)
        small = picture.resize(
            (round(picture.width * factor), round(picture.height * factor)), Image.Resampling.BILINEAR
        )
        picture = small.resize(picture.size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        values = np.asarray(picture) * rng.uniform(0.85, 1.1) + rng.normal(0, 6, 3)
        values += rng.normal(0, rng.uniform(0, 8), values.shape)
        picture = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=int(rng.integers(25, 90)))
        picture = Image.open(buffer).convert("RGB")
    return picture
