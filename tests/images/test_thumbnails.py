"""Small copies of pictures for a page."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from qwen_vl_classifier.images.thumbnails import thumbnail


@pytest.mark.parametrize(
    ("size", "stored", "displayed"),
    [
        ((400, 200), (100, 50), (100, 50)),
        ((100, 30), (100, 30), (100, 30)),
        ((40, 20), (40, 20), (80, 40)),
        ((3, 2), (3, 2), (99, 66)),
    ],
)
def test_a_small_picture_is_shown_at_a_whole_multiple_of_its_size(size, stored, displayed):
    picture = Image.new("RGB", size, "red")
    made = thumbnail(picture, 100)
    decoded = Image.open(io.BytesIO(base64.b64decode(made["content"])))
    assert (decoded.format, decoded.size) == ("JPEG", stored)
    assert (made["width"], made["height"], made["enlarged"]) == (*displayed, displayed != stored)
    assert picture.size == size
