"""The processor time of one picture is bounded where a caller says so, in its own thread."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.images.time_limit import decoding_limit


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((300, 200), 50).convert("RGB").save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"])
def test_a_picture_beyond_its_time_is_refused(kind):
    data = picture(kind)
    with (
        decoding_limit(0.0),
        pytest.raises(ImageError, match=r"^<bytes> of length \d+: takes longer than 0 s of processor time to decode; "),
    ):
        open_image(data)
    assert open_image(data).size == (300, 200)


def test_the_limit_is_of_one_picture_and_of_one_thread(monkeypatch):
    """A picture is not blamed for the time that those before it took, nor for what its neighbours do."""
    used = [0.0]
    monkeypatch.setattr("time.thread_time", lambda: used[0])
    data = picture("PNG")
    with decoding_limit(5.0):
        for _ in range(3):
            open_image(data)
            used[0] += 4
    with decoding_limit(0.0), ThreadPoolExecutor(1) as other:
        assert other.submit(open_image, data).result().size == (300, 200)
