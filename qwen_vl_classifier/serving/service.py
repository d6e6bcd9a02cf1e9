"""What all requests share, without HTTP: the classifiers, the batcher between them, and how things stand."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from qwen_vl_classifier.config import ServeConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import (
    ConfigError,
    DeadlineError,
    ImageError,
    OutOfMemoryError,
    QueueFullError,
    QwenVLClassifierError,
)
from qwen_vl_classifier.serving.batcher import Batcher
from qwen_vl_classifier.serving.media import decode_image
from qwen_vl_classifier.serving.schemas import ClassifyItem, ItemError, explain_invalid

if TYPE_CHECKING:
    from qwen_vl_classifier.classifier.panel import Panel

DEFECT = "the server failed; try again later"
"""All that a caller is told of what nobody expected."""

_DECODING_THREADS = 4  # bounds the memory of pictures that are being decoded

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scored:
    """What one pass says of one example.

    Attributes:
        probabilities: For each classifier the probabilities of class 0 and of class 1.
        tokens: How many tokens the model read.
    """

    probabilities: tuple[tuple[float, float], ...]
    tokens: int


class Service:
    """Classifiers that are loaded once and asked by many.

    Args:
        config: What to serve and how.
        on_failure: Called in the event loop when the classifiers cannot be loaded; the default logs it.

    Attributes:
        config: What to serve and how.
        names: The classifiers' names, in the order of `config.classifiers`.
        state: "loading", then "ready", then "draining"; or "failed".
        panel: The classifiers, once they are loaded.
        created: When that was, in seconds since 1970.

    Raises:
        ConfigError: No classifiers, or two of the same name.
    """

    def __init__(self, config: ServeConfig, *, on_failure: Callable[[Exception], None] | None = None) -> None:
        self.config = config
        self.names = _names(config.classifiers)
        self.state: Literal["loading", "ready", "draining", "failed"] = "loading"
        self.panel: Panel | None = None
        self.created = 0
        self._on_failure = on_failure or _log_failure
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._batcher: Batcher[Example, Scored] = Batcher(
            self._score, max_batch=config.max_batch, queue_size=config.queue_size
        )
        self._decoding = ThreadPoolExecutor(_DECODING_THREADS, thread_name_prefix="decode-image")

    async def load(self) -> None:
        """Load the classifiers, or call `on_failure`."""
        try:
            self.panel = await asyncio.to_thread(_load_panel, self.config)
        except Exception as error:
            self.state = "failed"
            self._on_failure(error)
        else:
            self.created = int(time.time())
            if self.state == "loading":
                self.state = "ready"

    async def close(self) -> None:
        """Finish all requests that were accepted; their deadlines bound how long that takes."""
        self.state = "draining"
        try:
            await self._idle.wait()
        finally:
            await self._batcher.close()
            self._decoding.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def accepted(self) -> Iterator[None]:
        """Hold a request's place from before its body is read, so that those in memory are few and none is forgotten.

        Raises:
            QueueFullError: As many requests are here as examples fit into the queue and a pass.
        """
        if self._requests >= self.config.queue_size + self.config.max_batch:
            raise QueueFullError(f"{self._requests} requests are here already; try again later")
        self._requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def classify(self, items: Sequence[Any], deadline: float) -> list[Scored | ItemError]:
        """Check and score the items of one request, each by itself.

        Args:
            items: As they stand in the request.
            deadline: Until when, on the event loop's clock.

        Returns:
            For each item its result or its error.

        Raises:
            DeadlineError: It took too long.
            QueueFullError: Too many examples wait already.
            ClosedError: The batcher was closed.
        """
        decoded: dict[str, asyncio.Future[bytes]] = {}
        try:
            async with asyncio.timeout_at(deadline):
                checked = await asyncio.gather(*(self._example(item, decoded) for item in items))
        except TimeoutError:
            raise DeadlineError("the pictures were not decoded before the deadline; send fewer or smaller") from None
        finally:
            for future in decoded.values():
                future.cancel()
        examples = [example for example in checked if isinstance(example, Example)]
        outcomes = iter(await self._batcher.submit_all(examples, deadline))
        return [example if isinstance(example, ItemError) else _checked(next(outcomes)) for example in checked]

    async def _example(self, item: Any, decoded: dict[str, asyncio.Future[bytes]]) -> Example | ItemError:
        """Turn an item of a request into an example, or say what is wrong with it.

        Args:
            item: As it stands in the request.
            decoded: The request's pictures by their text: one that stands in several items is decoded once.
        """
        try:
            asked = ClassifyItem.model_validate(item)
        except ValidationError as error:
            return ItemError(code="invalid_item", message=explain_invalid(error))
        if len(asked.text) > self.config.max_text_chars:
            return ItemError(
                code="too_large",
                message=f"text has {len(asked.text):,} characters; wanted at most {self.config.max_text_chars:,}",
            )
        loop = asyncio.get_running_loop()
        for text in asked.images:
            if text not in decoded:
                decoded[text] = loop.run_in_executor(self._decoding, decode_image, text)
        pictures = await asyncio.gather(*(decoded[text] for text in asked.images), return_exceptions=True)
        files: list[bytes] = []
        for picture in pictures:
            if not isinstance(picture, bytes):
                return _error_of(picture)
            files.append(picture)
        # The file and not its pixels: a queue full of decoded pictures could need a hundred times the memory.
        return Example(tuple(files) or None, asked.text)

    def _score(self, examples: Sequence[Example]) -> list[Scored]:
        """Run one pass for all classifiers; in the batcher's thread."""
        panel = self.panel
        assert panel is not None
        prepared = panel.backbone.prepare(examples)
        taps = sorted({classifier.tap for classifier in panel.classifiers})
        features = panel.backbone.encode_prepared(prepared, taps)
        columns = [
            classifier.probabilities_of(features[:, taps.index(classifier.tap)]) for classifier in panel.classifiers
        ]
        return [
            Scored(
                probabilities=tuple((float(column[row, 0]), float(column[row, 1])) for column in columns),
                tokens=len(item.ids),
            )
            for row, item in enumerate(prepared)
        ]


def _checked(outcome: Scored | BaseException) -> Scored | ItemError:
    if isinstance(outcome, BaseException):
        return _error_of(outcome)
    if not all(math.isfinite(p) for pair in outcome.probabilities for p in pair):
        return _error_of(ArithmeticError("a probability is not a number"))
    return outcome


def _error_of(error: BaseException) -> ItemError:
    """Choose what a caller is told of one example's error; the log has the rest."""
    if isinstance(error, ImageError):  # of bytes, so its text names no path
        return ItemError(code="invalid_image", message=str(error))
    if isinstance(error, OutOfMemoryError):
        _log.error("one example is too large: %s", error)
        return ItemError(code="too_large", message="the server ran out of memory; send a smaller picture or text")
    _log.error("an example could not be classified", exc_info=error)
    return ItemError(code="internal_error", message=DEFECT)


def _load_panel(config: ServeConfig) -> Panel:
    from qwen_vl_classifier.classifier.panel import Panel  # brings torch: not before it is needed

    return Panel.load(config.classifiers, device=config.device)


def _log_failure(error: Exception) -> None:
    if isinstance(error, QwenVLClassifierError):
        _log.error("the classifiers could not be loaded: %s", error)
    else:
        _log.error("the classifiers could not be loaded", exc_info=error)


def _names(folders: Sequence[str]) -> list[str]:
    if not folders:
        raise ConfigError("no classifiers to serve: give the folder of at least one")
    names = [Path(folder).resolve().name for folder in folders]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(
                f"{folders[names.index(name)]} and {folders[number]} would both be served as {name!r}; "
                "rename one of the folders"
            )
    return names
