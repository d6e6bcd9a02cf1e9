"""What was asked -> what models read: pictures read and decoded once for a request, cut and tokenised in one thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ClosedError, ExampleError, OutOfMemoryError, QueueFullError
from qwen_vl_classifier.serving.items import DEFECT, Ask, ItemError
from qwen_vl_classifier.serving.memory import PictureShare
from qwen_vl_classifier.serving.pace import Pace
from qwen_vl_classifier.serving.worker import Worker

if TYPE_CHECKING:  # it brings torch
    from qwen_vl_classifier.backbone.processor import EncodedExample, Processor

T = TypeVar("T")

Source: TypeAlias = str | bytes
"""A picture as it was asked: text of a request, or a file that was uploaded."""

Prepared: TypeAlias = "tuple[EncodedExample, ...]"
"""One example as each of several backbones reads it."""

_CHANNELS = 3

_log = logging.getLogger(__name__)


class Reader(Protocol):
    """Reads what a request holds for a picture."""

    async def read(self, text: str) -> bytes:
        """Return the bytes of an image file, or raise an `ImageError`."""


class Decoder(Protocol):
    """Decodes pictures."""

    async def decode(self, data: bytes) -> Image.Image:
        """Return pixels of mode RGB, or raise an `ImageError`."""


class DecodeObserver(Protocol):
    """Told what happens."""

    def decoded(self, seconds: float) -> None:
        """A picture was decoded, or could not be."""


class Preparation:
    """Make examples ready for models.

    Args:
        reader: Reads pictures.
        decoder: Decodes them.
        observer: Told about them.
        at_once: Most sets of pictures that are decoded and cut at a time, so that few pictures are held as pixels
            however many requests wait.
    """

    def __init__(self, *, reader: Reader, decoder: Decoder, observer: DecodeObserver, at_once: int) -> None:
        self._reader = reader
        self._decoder = decoder
        self._observer = observer
        self._places = asyncio.Semaphore(at_once)
        self._open = 0  # sets of pictures that wait or are made ready
        self._pace = Pace()  # for each of them
        self.worker = Worker("prepare")

    def refusal(self, sets: int, seconds: float) -> QueueFullError | None:
        """Say why examples would not be accepted now, if they would not.

        Args:
            sets: How many sets of pictures they have.
            seconds: Until their deadline.
        """
        # What is alone is tried however long it takes: it would not be faster later.
        if not (sets and self._open and self._pace.too_slow(self._open + sets, seconds)):
            return None
        return QueueFullError(
            f"{sets} sets of pictures came that would hardly be decoded in {seconds:.3g} s, after those that wait; "
            "try again later",
            retry_after=max(1, math.ceil(self._pace.seconds(self._open))),
        )

    async def prepare(
        self,
        asks: Sequence[Ask | ItemError],
        processors: Sequence[Processor],
        share: PictureShare,
        *,
        seconds: float,
    ) -> list[Prepared | ItemError]:
        """Make the examples of one request ready, each by itself.

        Args:
            asks: What is asked; an error stays where it is.
            processors: Of the backbones that will read them.
            share: Where their memory is counted, until the request ends.
            seconds: Until their deadline, which the caller keeps.

        Returns:
            For each example its form for each processor, or its error.

        Raises:
            QueueFullError: There is no memory for the pictures now, or no hope to have them ready in time.
            ClosedError: The server is closing.
        """
        units: dict[tuple[Source, ...], list[int]] = {}
        for number, ask in enumerate(asks):
            if isinstance(ask, Ask):
                units.setdefault(ask.images, []).append(number)
        refusal = self.refusal(sum(bool(images) for images in units), seconds)
        if refusal is not None:
            raise refusal
        outcomes: dict[int, Prepared | ItemError] = {n: ask for n, ask in enumerate(asks) if isinstance(ask, ItemError)}
        async with RequestPictures(self._reader, self._decoder, self._observer, share, units) as pictures:

            async def fill(images: tuple[Source, ...], numbers: list[int]) -> None:
                texts = [ask.text for ask in (asks[number] for number in numbers) if isinstance(ask, Ask)]
                outcomes.update(zip(numbers, await self._unit(images, texts, processors, pictures), strict=True))

            await all_of([fill(images, numbers) for images, numbers in units.items()])
        return [outcomes[number] for number in range(len(asks))]

    async def pictures(self, ask: Ask, share: PictureShare) -> list[Image.Image] | ItemError:
        """Open the pictures of one example.

        Raises:
            QueueFullError: There is no memory for them now.
            ClosedError: The server is closing.
        """
        async with (
            self._places,
            RequestPictures(self._reader, self._decoder, self._observer, share, [ask.images]) as pictures,
        ):
            try:
                return await pictures.open(ask.images)
            except Exception as error:
                return error_of(error)

    async def _unit(
        self,
        sources: tuple[Source, ...],
        texts: Sequence[str],
        processors: Sequence[Processor],
        pictures: RequestPictures,
    ) -> Sequence[Prepared | ItemError]:
        """Make examples of the same pictures ready."""
        try:
            if not sources:
                return await self.worker.run(_encode, processors, [], texts)
            with self._counted():
                async with self._places:
                    images = await pictures.open(sources)
                    encoded = await self.worker.run(_encode, processors, images, texts)
                    del images
                    pictures.put_away(sources)
            made = next((item for item in encoded if not isinstance(item, ItemError)), ())
            pictures.share.take(sum(example.pictures.pixel_values.nbytes for example in made))
            return encoded
        except Exception as error:
            return [error_of(error)] * len(texts)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a set of pictures as open, and learn from how long it is."""
        loop = asyncio.get_running_loop()
        if not self._open:
            self._pace.start(loop.time())
        self._open += 1
        try:
            yield
            self._pace.done(loop.time(), 1)
        finally:
            self._open -= 1


class RequestPictures:
    """The pictures of one request, each decoded once and held until nothing of the request needs it any more.

    Args:
        reader: Reads them.
        decoder: Decodes them.
        observer: Told about them.
        share: Where their memory is counted.
        units: Sets of pictures that will be opened, each of them once.
    """

    def __init__(
        self,
        reader: Reader,
        decoder: Decoder,
        observer: DecodeObserver,
        share: PictureShare,
        units: Iterable[tuple[Source, ...]],
    ) -> None:
        self.share = share
        self._reader = reader
        self._decoder = decoder
        self._observer = observer
        self._needed = Counter(source for unit in units for source in set(unit))
        self._opened: dict[Source, asyncio.Task[Image.Image]] = {}

    async def __aenter__(self) -> RequestPictures:
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = list(self._opened.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def open(self, sources: Sequence[Source]) -> list[Image.Image]:
        """Open a set of pictures.

        Raises:
            ImageError: One of them cannot, or must not, be opened; the first in order is told.
            QueueFullError: There is no memory for them now.
            ClosedError: The server is closing.
        """
        for source in sources:
            if source not in self._opened:
                self._opened[source] = asyncio.create_task(self._open(source))
        tasks = [self._opened[source] for source in sources]
        if tasks:
            await asyncio.wait(tasks)
        return [task.result() for task in tasks]

    def put_away(self, sources: Sequence[Source]) -> None:
        """Let go of the pictures of a set that no other needs."""
        for source in set(sources):
            self._needed[source] -= 1
            if not self._needed[source]:
                self.share.release(_nbytes(self._opened.pop(source).result()))

    async def _open(self, source: Source) -> Image.Image:
        data = source if isinstance(source, bytes) else await self._reader.read(source)
        started = time.perf_counter()
        try:
            image = await self._decoder.decode(data)
        finally:
            self._observer.decoded(time.perf_counter() - started)
        self.share.take(_nbytes(image))
        return image


def error_of(error: BaseException) -> ItemError:
    """Choose what a caller is told of one example's error; the log has the rest.

    Raises:
        QueueFullError: It is one, and the whole request's.
        ClosedError: The same.
    """
    if isinstance(error, (QueueFullError, ClosedError)):
        raise error
    if isinstance(error, ExampleError):  # of what a request holds, so its text names no path
        return ItemError(error.code, str(error))
    if isinstance(error, OutOfMemoryError):
        _log.error("one example is too large: %s", error)
        return ItemError("out_of_memory", "the server ran out of memory; send a smaller picture or text")
    _log.error("an example could not be classified", exc_info=error)
    return ItemError("internal_error", DEFECT)


def _encode(
    processors: Sequence[Processor], images: Sequence[Image.Image], texts: Sequence[str]
) -> list[Prepared | ItemError]:
    """Cut pictures and tokenise the texts that go with them; in the preparing thread."""
    pictures = [processor.cut_pictures(images) for processor in processors]
    made: list[Prepared | ItemError] = []
    for text in texts:
        example = Example(None, text)
        try:
            encoded = [processor.encode(example, cut) for processor, cut in zip(processors, pictures, strict=True)]
        except Exception as error:
            made.append(error_of(error))
        else:
            made.append(tuple(encoded))
    return made


def _nbytes(image: Image.Image) -> int:
    return image.width * image.height * _CHANNELS


async def all_of(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Wait for all of it; where one fails, cancel the others and raise its error."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
