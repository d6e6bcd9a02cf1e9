"""Pictures that several tests of explanations share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def wide_picture() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (84, 140, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def average() -> Image.Image:
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(100, 200, (8, 8, 3), dtype=np.uint8))
