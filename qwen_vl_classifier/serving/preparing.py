"""Prepare the items of a request for models: each picture decoded and resized once, texts tokenised."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.serving.admission import AdmittedRequest
from qwen_vl_classifier.serving.decoder import DecoderPool
from qwen_vl_classifier.serving.decoding_process import TooSlowError
from qwen_vl_classifier.serving.fair_queue import Share, Turns, Typical
from qwen_vl_classifier.serving.items import Item, ItemError, error_of
from qwen_vl_classifier.serving.media import MediaReader
from qwen_vl_classifier.serving.worker import Worker

if TYPE_CHECKING:  # it brings torch
    from qwen_vl_classifier.backbone.pixels import Pictures
    from qwen_vl_classifier.backbone.processor import EncodedExample, Processor

T = TypeVar("T")

Source: TypeAlias = str | bytes
"""A picture as a request holds it: text, or a file that was uploaded."""

Prepared: TypeAlias = "dict[Processor, EncodedExample]"
"""One example as each of several processors makes it ready."""

Resized: TypeAlias = "dict[Processor, Pictures]"
"""Pictures as each of several processors resizes them."""

_CHANNELS = 3
_QUICK_SECONDS = 1.0  # of processor time, in which most pictures are decoded, the largest included
_CHARACTERS_AT_ONCE = 8_000
_SECONDS_PER_CHARACTER = 1e-6  # that tokenising takes, about


class DecodeObserver(Protocol):
    """Observe decoding."""

    def decoded(self, seconds: float) -> None:
        """A picture was decoded, or could not be."""


class Preparation:
    """Make items ready for models.

    A picture is read, decoded and resized before the next one has its turn, so that few are held as pixels
    however many wait. Turns are in fair shares for all requests: one with a few small pictures does not wait for all of
    one with many. A picture that is not decoded after a second of processor time is put aside, to be decoded later from
    its beginning; of these, so few are decoded at a time that a process is left for others. Texts have turns of their
    own and never wait for pictures.

    Args:
        reader: Reads the files of pictures.
        decoder: Decodes them.
        observer: Told about them.
        at_once: How many pictures are decoded at a time.

    Attributes:
        pictures: Turns at decoding. To wait for another host, which sends a picture, is not part of one.
        worker: The thread in which pictures are resized.
    """

    def __init__(self, reader: MediaReader, decoder: DecoderPool, observer: DecodeObserver, *, at_once: int) -> None:
        self.pictures = Turns(at_once)
        self.worker = Worker("resize-pictures")
        self._reader = reader
        self._decoder = decoder
        self._observer = observer
        self._whole = asyncio.Semaphore(at_once + 1)  # pictures of full size: those that are decoded, and one more
        self._slow = Turns(max(1, at_once - 1))
        self._seconds = Typical()  # that a picture takes to decode
        self._texts = Turns(1)
        self._tokeniser = Worker("tokenise")

    def stop(self) -> None:
        """End the threads after the calls that they have."""
        self.worker.stop()
        self._tokeniser.stop()

    async def prepare(
        self, items: Sequence[Item | ItemError], processors: Sequence[Processor], request: AdmittedRequest
    ) -> list[Prepared | ItemError]:
        """Make the items of one request ready, each by itself.

        Args:
            items: The items; an error stays where it is.
            processors: Of the backbones that will read them.
            request: Whose they are. Memory of pictures is counted there until the request is over.

        Returns:
            For each item its form for each processor, or its error.

        Raises:
            QueueFullError: There is no memory for the pictures now, or too many others wait to be decoded.
            ClosedError: The server is closing.
        """
        by_pictures: dict[tuple[Source, ...], list[int]] = {}
        for number, item in enumerate(items):
            if isinstance(item, Item):
                by_pictures.setdefault(item.images, []).append(number)
        distinct = {source for sources in by_pictures for source in sources}
        shares = self._shares(request, len(distinct))

        async def resize(source: Source) -> Resized:
            async with self._opened(source, request, shares) as image:
                # Before there are any: a small picture may be enlarged.
                request.hold_picture(sum(processor.picture_bytes(*image.size) for processor in processors))
                return await self.worker.run(_resize, processors, image)

        texts = Share()
        prepared: dict[int, Prepared | ItemError] = {
            n: item for n, item in enumerate(items) if not isinstance(item, Item)
        }

        async def fill(sources: tuple[Source, ...], numbers: list[int]) -> None:
            some = [item for item in (items[number] for number in numbers) if isinstance(item, Item)]
            made: Sequence[Prepared | ItemError]
            try:
                pictures = await _joined(processors, [resized[source] for source in sources])
                made = await self._tokenise(some, pictures, texts)
            except Exception as error:
                made = [error_of(error)] * len(some)
            prepared.update(zip(numbers, made, strict=True))

        resized = {source: asyncio.create_task(resize(source)) for source in distinct}
        try:
            await all_of([fill(sources, numbers) for sources, numbers in by_pictures.items()])
        finally:
            await _end(resized.values())
        return [prepared[number] for number in range(len(items))]

    async def open_pictures(self, item: Item, request: AdmittedRequest) -> list[Image.Image] | ItemError:
        """Decode the pictures of one item.

        Raises:
            QueueFullError: There is no memory for them now, or too many others wait to be decoded.
            ClosedError: The server is closing.
        """
        shares = self._shares(request, len(set(item.images)))

        async def open_one(source: Source) -> Image.Image:
            async with self._opened(source, request, shares) as image:
                request.hold_picture(_nbytes(image))
                return image

        tasks = {source: asyncio.create_task(open_one(source)) for source in dict.fromkeys(item.images)}
        try:
            return [await tasks[source] for source in item.images]
        except Exception as error:
            return error_of(error)
        finally:
            await _end(tasks.values())

    def _shares(self, request: AdmittedRequest, count: int) -> tuple[Share, Share]:
        """Return the shares of a request with `count` pictures, after checking that there is time for them."""
        share = Share()
        if count:
            request.check_pictures(share, count, count * self._seconds.value)
        return share, Share()

    @contextlib.asynccontextmanager
    async def _opened(
        self, source: Source, request: AdmittedRequest, shares: tuple[Share, Share]
    ) -> AsyncIterator[Image.Image]:
        """Read and decode a picture when it is its turn, and count its memory until the end of the context."""
        share, slow_share = shares
        held = 0
        file = source if isinstance(source, bytes) else None
        try:
            if isinstance(source, str) and self._reader.may_wait(source):
                file = await self._reader.read(source)
                held = _hold(request, len(file))
            async with contextlib.AsyncExitStack() as pixels:
                image = None
                try:
                    async with self.pictures.turn(share, self._seconds.value):
                        await pixels.enter_async_context(self._whole)
                        if file is None:
                            assert isinstance(source, str)
                            file = await self._reader.read(source)
                            held = _hold(request, len(file))
                        image = await self._decode(file, _QUICK_SECONDS)
                except TooSlowError:
                    await pixels.aclose()
                if image is None:
                    assert file is not None
                    async with self._slow.turn(slow_share, _QUICK_SECONDS), self.pictures.turn(share, _QUICK_SECONDS):
                        await pixels.enter_async_context(self._whole)
                        image = await self._decode(file)
                del file
                request.release_picture(held)
                held = 0
                held = _hold(request, _nbytes(image))
                yield image
                del image
        finally:
            request.release_picture(held)

    async def _decode(self, data: bytes, seconds: float = 0) -> Image.Image:
        started = time.perf_counter()
        try:
            return await self._decoder.decode(data, seconds)
        finally:
            passed = time.perf_counter() - started
            self._seconds.learn(passed)
            self._observer.decoded(passed)

    async def _tokenise(self, items: Sequence[Item], pictures: Resized, share: Share) -> list[Prepared | ItemError]:
        made: list[Prepared | ItemError] = []
        for some in _chunks(items):
            async with self._texts.turn(share, _SECONDS_PER_CHARACTER * _length(some)):
                made += await self._tokeniser.run(_encode, pictures, some)
        return made


def _hold(request: AdmittedRequest, nbytes: int) -> int:
    request.hold_picture(nbytes)
    return nbytes


async def _joined(processors: Sequence[Processor], tasks: Sequence[asyncio.Task[Resized]]) -> Resized:
    """Put the pictures of a set together; of errors the first in order is raised."""
    if tasks:
        await asyncio.wait(tasks)
    resized = [task.result() for task in tasks]
    return {processor: processor.join_pictures([one[processor] for one in resized]) for processor in processors}


def _resize(processors: Sequence[Processor], image: Image.Image) -> Resized:
    """Resize a picture, in the worker's thread."""
    return {processor: processor.resize_pictures([image]) for processor in processors}


def _encode(pictures: Resized, items: Sequence[Item]) -> list[Prepared | ItemError]:
    """Tokenise items that have the same pictures, in the worker's thread."""
    made: list[Prepared | ItemError] = []
    for item in items:
        try:
            made.append({processor: _encoded(processor, item, cut) for processor, cut in pictures.items()})
        except Exception as error:
            made.append(error_of(error))
    return made


def _encoded(processor: Processor, item: Item, pictures: Pictures) -> EncodedExample:
    if item.places is None:
        return processor.encode(Example(None, item.text), pictures)
    return processor.encode_interleaved(item.pieces, pictures)


def _chunks(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Part items so that a turn is short: many of short texts, or one that is long."""
    some: list[Item] = []
    for item in items:
        if some and _length(some) + len(item.text) > _CHARACTERS_AT_ONCE:
            yield some
            some = []
        some.append(item)
    if some:
        yield some


def _length(items: Sequence[Item]) -> int:
    return sum(len(item.text) for item in items)


def _nbytes(image: Image.Image) -> int:
    return image.width * image.height * _CHANNELS


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel what is not done, and wait until it is."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def all_of(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all of it; where one fails, cancel the others and raise its error."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)
