"""Pictures as a page shows them: upright JPEG of a bounded size, without metadata, a few of them kept.

Pictures come from strangers, so they are decoded as `serve` decodes them: in processes apart with limits on memory and
time. A picture that brings down its decoder is an error in the page, and labelling goes on.
"""

from __future__ import annotations

import asyncio
import io
import os
from collections import OrderedDict
from collections.abc import Sequence

from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.files.bounded import read_file
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.images.source import ImageSource
from qwen_vl_classifier.serving.decoder import DecoderPool

SIDE = 1600
"""The longer side of a picture on the page, in pixels, at most."""

_QUALITY = 88
_KEPT_BYTES = 64_000_000
_WORKERS = 2
_DECODE_SECONDS = 20.0
_DECODER_BYTES = 1_000_000_000  # memory of one process, for pictures of up to 25 megapixels
_BYTES_PER_PIXEL = 40  # of larger ones: as much as the former get


class ScreenPictures:
    """The pictures of rows, made when they are asked for.

    Args:
        examples: The rows.
        limits: The largest picture to decode.
        kept_bytes: How many bytes of pictures are kept in memory.
    """

    def __init__(self, examples: Sequence[Example], limits: ImageLimits, *, kept_bytes: int = _KEPT_BYTES) -> None:
        self._examples, self._limits, self._most = examples, limits, kept_bytes
        self._decoder: DecoderPool | None = None
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._bytes = 0
        self._making: dict[tuple[int, int], asyncio.Task[bytes]] = {}

    async def start(self) -> None:
        """Start the processes that decode.

        Raises:
            ConfigError: They do not start.
        """
        self._decoder = DecoderPool(
            workers=_WORKERS,
            timeout=_DECODE_SECONDS,
            memory_bytes=max(_DECODER_BYTES, _BYTES_PER_PIXEL * self._limits.max_pixels),
            limits=self._limits,
        )
        await self._decoder.start()

    async def close(self) -> None:
        """End the processes."""
        if self._decoder is not None:
            await self._decoder.close()

    async def jpeg(self, row: int, number: int) -> bytes | None:
        """Return one picture of a row as JPEG, or `None` if the row has no such picture.

        Raises:
            ImageError: It cannot be opened.
            ClosedError: The end has begun.
        """
        if number >= len(self._examples[row].images):
            return None
        place = (row, number)
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        if place not in self._making:
            task = asyncio.create_task(self._make(self._examples[row].images[number]))
            self._making[place] = task
            task.add_done_callback(lambda done: self._keep(place, done))
        return await asyncio.shield(self._making[place])  # who goes away must not stop it for others

    async def _make(self, source: ImageSource) -> bytes:
        if isinstance(source, Image.Image):
            return await asyncio.to_thread(lambda: _jpeg(open_image(source, limits=self._limits)))
        data = source if isinstance(source, bytes) else await asyncio.to_thread(self._read, source)
        assert self._decoder is not None
        picture = await self._decoder.decode(data)
        return await asyncio.to_thread(_jpeg, picture)

    def _read(self, path: str | os.PathLike[str]) -> bytes:
        try:
            return read_file(path, most=self._limits.max_bytes)
        except OSError as error:
            raise ImageError(
                f"the picture cannot be read ({error.strerror}); expected an image file; skip this row, or put the "
                "file back and load the page again",
                code="image_missing" if isinstance(error, FileNotFoundError) else "image_refused",
            ) from None

    def _keep(self, place: tuple[int, int], done: asyncio.Task[bytes]) -> None:
        del self._making[place]
        if done.cancelled() or done.exception() is not None:
            return
        self._kept[place] = done.result()
        self._bytes += len(done.result())
        while self._bytes > self._most:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= len(oldest)


def _jpeg(picture: Image.Image) -> bytes:
    picture.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=_QUALITY)
    return content.getvalue()
