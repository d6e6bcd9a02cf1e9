"""Items of a request -> what models read: each picture decoded once, cut into patches, tokenised."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.serving.admission import AdmittedRequest
from qwen_vl_classifier.serving.backlog import Backlog
from qwen_vl_classifier.serving.decoder import DecoderPool
from qwen_vl_classifier.serving.items import Item, ItemError, error_of
from qwen_vl_classifier.serving.media import MediaReader
from qwen_vl_classifier.serving.worker import Worker

if TYPE_CHECKING:  # it brings torch
    from qwen_vl_classifier.backbone.processor import EncodedExample, Processor

T = TypeVar("T")

Source: TypeAlias = str | bytes
"""A picture as a request holds it: text, or a file that was uploaded."""

Prepared: TypeAlias = "dict[Processor, EncodedExample]"
"""One example as each of several processors makes it ready."""

_CHANNELS = 3


class DecodeObserver(Protocol):
    """Told what happens."""

    def decoded(self, seconds: float) -> None:
        """A picture was decoded, or could not be."""


class Preparation:
    """Make items ready for models.

    Args:
        reader: Reads the files of pictures.
        decoder: Decodes them.
        observer: Told about them.
        at_once: Most sets of pictures that are decoded and cut at a time, so that few pictures are held as pixels
            however many requests wait.

    Attributes:
        backlog: The sets of pictures that wait or are being made ready. Reading their files does not count, since that
            may be a wait for another host.
        worker: The thread in which pictures are cut and texts are tokenised.
    """

    def __init__(self, reader: MediaReader, decoder: DecoderPool, observer: DecodeObserver, *, at_once: int) -> None:
        self.backlog = Backlog()
        self.worker = Worker("prepare")
        self._reader = reader
        self._decoder = decoder
        self._observer = observer
        self._slots = asyncio.Semaphore(at_once)

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
        request.check_pictures(sum(bool(sources) for sources in by_pictures))
        prepared: dict[int, Prepared | ItemError] = {
            n: item for n, item in enumerate(items) if not isinstance(item, Item)
        }
        async with _Pictures(self._load, self._decode, request, by_pictures) as pictures:

            async def fill(sources: tuple[Source, ...], numbers: list[int]) -> None:
                texts = [item.text for item in (items[number] for number in numbers) if isinstance(item, Item)]
                made = await self._prepare_set(sources, texts, processors, pictures)
                prepared.update(zip(numbers, made, strict=True))

            await all_of([fill(sources, numbers) for sources, numbers in by_pictures.items()])
        return [prepared[number] for number in range(len(items))]

    async def open_pictures(self, item: Item, request: AdmittedRequest) -> list[Image.Image] | ItemError:
        """Decode the pictures of one item.

        Raises:
            QueueFullError: There is no memory for them now, or too many others wait to be decoded.
            ClosedError: The server is closing.
        """
        if not item.images:
            return []
        request.check_pictures(1)
        async with _Pictures(self._load, self._decode, request, [item.images]) as pictures:
            try:
                await pictures.read(item.images)
                async with self._slot():
                    return await pictures.open(item.images)
            except Exception as error:
                return error_of(error)

    async def _prepare_set(
        self,
        sources: tuple[Source, ...],
        texts: Sequence[str],
        processors: Sequence[Processor],
        pictures: _Pictures,
    ) -> Sequence[Prepared | ItemError]:
        """Make items with the same pictures ready."""
        try:
            if not sources:
                return await self.worker.run(_encode, processors, [], texts)
            await pictures.read(sources)
            async with self._slot():
                images = await pictures.open(sources)
                encoded = await self.worker.run(_encode, processors, images, texts)
                del images
                pictures.put_away(sources)
            made: Prepared = next((item for item in encoded if not isinstance(item, ItemError)), {})
            pictures.request.hold_picture(sum(example.pictures.pixel_values.nbytes for example in made.values()))
            return encoded
        except Exception as error:
            return [error_of(error)] * len(texts)

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """Wait until a set of pictures may be made ready, and count it as work until then and while it is."""
        self.backlog.add(1)
        try:
            async with self._slots:
                yield
        except asyncio.CancelledError:
            self.backlog.drop(1)
            raise
        except Exception:
            self.backlog.finish(1)
            raise
        self.backlog.finish(1)

    async def _load(self, source: Source) -> bytes:
        return source if isinstance(source, bytes) else await self._reader.read(source)

    async def _decode(self, data: bytes) -> Image.Image:
        started = time.perf_counter()
        try:
            return await self._decoder.decode(data)
        finally:
            self._observer.decoded(time.perf_counter() - started)


class _Pictures:
    """The pictures of one request, each read and decoded once and held until nothing of the request needs it any more.

    Args:
        load: Reads the file of a picture.
        decode: Decodes it.
        request: Where its memory is counted.
        sets: Sets of pictures that will be opened, each of them once.
    """

    def __init__(
        self,
        load: Callable[[Source], Awaitable[bytes]],
        decode: Callable[[bytes], Awaitable[Image.Image]],
        request: AdmittedRequest,
        sets: Iterable[tuple[Source, ...]],
    ) -> None:
        self.request = request
        self._load = load
        self._decode = decode
        self._needed = Counter(source for sources in sets for source in set(sources))
        self._files: dict[Source, asyncio.Task[bytes]] = {}
        self._images: dict[Source, asyncio.Task[Image.Image]] = {}

    async def __aenter__(self) -> _Pictures:
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._files.values(), *self._images.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def read(self, sources: Sequence[Source]) -> None:
        """Read the files of a set.

        Raises:
            ImageError: One of them cannot, or must not, be read; the first in order is told.
            QueueFullError: There is no memory for them now.
        """
        unread = [source for source in sources if source not in self._images]
        await _results(self._files, self._read, unread)

    async def open(self, sources: Sequence[Source]) -> list[Image.Image]:
        """Decode the pictures of a set whose files were read.

        Raises:
            ImageError: One of them cannot, or must not, be decoded; the first in order is told.
            QueueFullError: There is no memory for them now.
            ClosedError: The server is closing.
        """
        return await _results(self._images, self._open, sources)

    def put_away(self, sources: Sequence[Source]) -> None:
        """Let go of the pictures of a set that no other needs."""
        for source in set(sources):
            self._needed[source] -= 1
            if not self._needed[source]:
                self.request.release_picture(_nbytes(self._images.pop(source).result()))

    async def _read(self, source: Source) -> bytes:
        data = await self._load(source)
        if isinstance(source, str):  # an uploaded file is counted with the body of the request
            self.request.hold_picture(len(data))
        return data

    async def _open(self, source: Source) -> Image.Image:
        data = self._files.pop(source).result()
        image = await self._decode(data)
        if isinstance(source, str):
            self.request.release_picture(len(data))
        self.request.hold_picture(_nbytes(image))
        return image


async def _results(
    tasks: dict[Source, asyncio.Task[T]], work: Callable[[Source], Coroutine[Any, Any, T]], sources: Sequence[Source]
) -> list[T]:
    """Return the results for sources, for each of which work is begun once; the first error in order is raised."""
    for source in sources:
        if source not in tasks:
            tasks[source] = asyncio.create_task(work(source))
    found = [tasks[source] for source in sources]
    if found:
        await asyncio.wait(found)
    return [task.result() for task in found]


def _encode(
    processors: Sequence[Processor], images: Sequence[Image.Image], texts: Sequence[str]
) -> list[Prepared | ItemError]:
    """Cut pictures into patches and tokenise the texts that go with them; in the worker's thread."""
    cut = {processor: processor.cut_pictures(images) for processor in processors}
    made: list[Prepared | ItemError] = []
    for text in texts:
        example = Example(None, text)
        try:
            made.append({processor: processor.encode(example, pictures) for processor, pictures in cut.items()})
        except Exception as error:
            made.append(error_of(error))
    return made


def _nbytes(image: Image.Image) -> int:
    return image.width * image.height * _CHANNELS


async def all_of(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all of it; where one fails, cancel the others and raise its error."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
