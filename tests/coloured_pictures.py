"""Plain pictures that a small model learns in a few steps."""

from __future__ import annotations

import numpy as np
from PIL import Image

from qwen_vl_classifier import Example


def pictures(count: int, seed: int) -> list[Example]:
    """Mostly red (1) and mostly blue (0) pictures in turn, each with an id."""
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        shade = [int(value) for value in rng.integers(0, 110, 3)]
        shade[0 if number % 2 else 2] = int(rng.integers(140, 256))
        picture = Image.new("RGB", (56, 56), tuple(shade))
        examples.append(Example(picture, "It is red.", number % 2, id=f"r{number}"))
    return examples
