"""Pools of decoding processes for tests, and pictures for them."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
from PIL import Image

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.serving.decoder import DecoderPool
from tests.waiting import LIMIT, run

T = TypeVar("T")
LIMITS = ImageLimits(max_bytes=10_000_000)
MEMORY = 1_000_000_000


def encoded(format: str, size: tuple[int, int] = (48, 32), mode: str = "RGB", colour: int = 0) -> bytes:
    image = Image.linear_gradient("L").resize(size).point(lambda value: (value + colour) % 256).convert(mode)
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


GOOD = encoded("PNG")


@asynccontextmanager
async def started(workers: int = 1, *, timeout: float = LIMIT, memory: int = MEMORY) -> AsyncIterator[DecoderPool]:
    pool = DecoderPool(workers=workers, timeout=timeout, memory_bytes=memory, limits=LIMITS)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def using(work: Callable[[DecoderPool], Awaitable[T]], workers: int = 1, **options: float) -> T:
    """Run a piece of work with a pool."""

    async def main() -> T:
        async with started(workers, **options) as pool:
            return await work(pool)

    return run(main())


async def refusal(pool: DecoderPool, data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        await pool.decode(data)
    assert "\n" not in str(caught.value)
    return caught.value


async def check_good(pool: DecoderPool) -> None:
    assert (await pool.decode(GOOD)).tobytes() == open_image(GOOD).tobytes()
