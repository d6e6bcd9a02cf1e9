"""Reading a picture as a request holds it, and how a refusal must look."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.fetching import Fetcher
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.serving.media import MediaReader
from tests.waiting import run


def encoded(format: str, size: tuple[int, int] = (48, 32)) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize(size).save(stream, format)
    return stream.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def read(text: str, *, root: Path | None = None, fetcher: Fetcher | None = None, max_bytes: int = 10_000_000) -> bytes:
    reader = MediaReader(limits=ImageLimits(max_bytes=max_bytes), fetcher=fetcher, root=root)
    try:
        return run(reader.read(text))
    finally:
        reader.close()


def refusal(text: str, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read(text, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    assert caught.value.__cause__ is None
    return caught.value


PNG = encoded("PNG")
