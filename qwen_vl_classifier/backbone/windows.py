"""Prepare examples for the model in windows of bounded size, the next window while the model computes.

Pictures are opened and resized by several threads (`picture_pool.py`), texts are tokenised by one.

A window is a few hundred examples that are prepared, planned and encoded together. Every way to features reads its
examples through here: `Backbone.encode`, extraction, training, evaluation and scoring.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from qwen_vl_classifier.backbone.picture_pool import PicturePool, Reading, Stamps
from qwen_vl_classifier.backbone.pixels import Pictures
from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ExampleError, ImageError, TextError
from qwen_vl_classifier.images.identity import stamp_of
from qwen_vl_classifier.images.limits import decoding_threads
from qwen_vl_classifier.progress_bars import tqdm

_log = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW_EXAMPLES = 256
"""Most examples in one window."""

_MOST_BYTES = 256_000_000  # of patches in one window, which holds at least one example


@dataclass(frozen=True, slots=True)
class Window:
    """Examples of a stream that are encoded together.

    Attributes:
        positions: The index of each example in the stream, from 0.
        ids: Their ids.
        prepared: Their model inputs.
    """

    positions: list[int] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    prepared: list[EncodedExample] = field(default_factory=list)


def windows(
    processor: Processor,
    examples: Iterable[Example],
    bad: BadRows,
    *,
    group: bool = False,
    read: Callable[[Example], Pictures] | None = None,
    progress: bool = False,
    title: str = "encode",
) -> Iterator[Window]:
    """Prepare a stream of examples, one window ahead of the caller.

    Args:
        processor: The backbone's processor.
        examples: Read lazily, a few hundred at a time.
        bad: Receives the examples that cannot be used; they are in no window. Examples that are in it already are
            skipped.
        group: Bring examples of the same picture together, so that each picture is opened once. Only a sequence can
            be reordered; windows of any other iterable follow the order of the examples.
        read: Reads the pictures of an example, in several threads at a time; `None` for `Processor.read_pictures`.
        progress: Show a progress bar if it takes more than two seconds.
        title: Of the progress bar.
    """
    total = len(examples) if isinstance(examples, Sequence) else None
    order: Iterable[tuple[int, Example]] = enumerate(examples)
    if group and isinstance(examples, Sequence):
        order = ((row, examples[row]) for row in by_picture(examples))
    found_before = {row.position for row in bad}
    reading: deque[tuple[int, Example]] = deque()  # taken by the thread and not yet in a window

    def taken() -> Iterator[Example]:
        for position, example in order:
            if position not in found_before:
                reading.append((position, example))
                yield example

    ending = threading.Event()
    prepared = prepare_outcomes(processor, taken(), read=read, at_hand=total is not None, ending=ending)
    began, rows = time.perf_counter(), 0
    with tqdm(total=total, desc=title, unit="row", delay=2, disable=not progress) as bar:
        for outcomes in read_ahead(prepared, ending=ending):
            window = Window()
            for outcome in outcomes:
                position, example = reading.popleft()
                if isinstance(outcome, ExampleError):
                    bad.add(position, example, outcome)
                else:
                    window.positions.append(position)
                    window.ids.append(example.id)
                    window.prepared.append(outcome)
            rows += len(outcomes)
            if window.prepared:
                yield window
            bar.update(len(outcomes))
    seconds = time.perf_counter() - began
    _log.debug("read features of %d rows in %.1f s: %.0f rows a second", rows, seconds, rows / max(seconds, 1e-9))


def prepare(
    processor: Processor, examples: Iterable[Example], *, read: Callable[[Example], Pictures] | None = None
) -> list[EncodedExample]:
    """Tokenise examples and open their pictures, each picture once however many texts come with it.

    Args:
        processor: The checkpoint's processor.
        examples: Read lazily.
        read: As in `windows`.

    Raises:
        ImageError: A picture cannot be opened.
        TextError: A text is too long.
    """
    prepared = []
    for outcomes in prepare_outcomes(processor, examples, read=read, at_hand=isinstance(examples, Sequence)):
        for outcome in outcomes:
            if isinstance(outcome, ExampleError):
                raise outcome
            prepared.append(outcome)
    return prepared


def prepare_outcomes(
    processor: Processor,
    examples: Iterable[Example],
    *,
    begin: Callable[[int], object] | None = None,
    at_hand: bool = False,
    read: Callable[[Example], Pictures] | None = None,
    threads: int | None = None,
    ending: threading.Event | None = None,
) -> Iterator[list[EncodedExample | ExampleError]]:
    """Yield windows of prepared examples, with an error in place of each example that cannot be used.

    Pictures are opened and resized in several threads, ahead of the example that is next; windows and their order do
    not depend on that. Within a window each picture is opened once. The last pictures of a window are kept for the next
    one, so where examples of the same pictures come together, each picture is opened once in all.

    Args:
        processor: The checkpoint's processor.
        examples: Read lazily, a few hundred at a time.
        begin: Called with the number of each example, from 0 and in order, when it is this example's turn; again while
            its pictures are waited for, since `examples` may have been read further meanwhile.
        at_hand: Whether `examples` never block, so that those of the next window are begun before a window is complete.
        read: As in `windows`.
        threads: How many open pictures; `None` for `decoding_threads`.
        ending: Set by another thread so that it ends after the picture that is being read, in the middle of a window.
    """
    stream = enumerate(examples)
    upcoming: deque[tuple[int, Example, Reading]] = deque()  # taken from the stream and not yet prepared
    number, taken, edge = 0, 0, WINDOW_EXAMPLES  # `edge` ends the window in the making, however few bytes it has
    with PicturePool(read or processor.read_pictures, threads or decoding_threads()) as pool:

        def look_ahead() -> None:
            nonlocal taken
            most = edge + WINDOW_EXAMPLES if at_hand else edge
            while taken < most and len(upcoming) < WINDOW_EXAMPLES and (pool.has_room or not upcoming):
                following = next(stream, None)
                if following is None:
                    break
                stamps = tuple(stamp_of(source) for source in following[1].images)
                upcoming.append((*following, pool.begin(following[1], stamps)))
                taken += 1

        def meanwhile() -> None:
            look_ahead()
            if begin is not None:
                begin(number)

        opened: dict[Stamps, Reading] = {}
        window: list[EncodedExample | ExampleError] = []
        held = 0
        look_ahead()
        while upcoming:
            number, example, reading = upcoming.popleft()
            if reading.stamps not in opened and held >= _MOST_BYTES:
                yield window
                opened, window, held = {}, [], 0
            if begin is not None:
                begin(number)
            known = pool.take(reading, meanwhile)
            if ending is not None and ending.is_set():
                return
            if reading.stamps not in opened:
                opened[reading.stamps] = reading
                held += reading.nbytes
            try:
                window.append(known if isinstance(known, ImageError) else processor.encode(example, known))
            except TextError as error:
                window.append(error.with_traceback(None))
            if number + 1 == edge:
                yield window
                opened, window, held = {reading.stamps: opened[reading.stamps]}, [], 0
                edge += WINDOW_EXAMPLES
            look_ahead()
        if window:
            yield window


def by_picture(examples: Sequence[Example]) -> list[int]:
    """Order examples so that those of the same pictures follow the first of them.

    Returns:
        The index of each example, in the new order. Texts without a picture stay where they are.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, example in enumerate(examples):
        groups.setdefault(tuple(stamp_of(source) for source in example.images) or (row,), []).append(row)
    return [row for rows in groups.values() for row in rows]


def read_ahead(items: Iterator[T], *, wait: bool = True, ending: threading.Event | None = None) -> Iterator[T]:
    """Yield the items of an iterator while a thread makes the item after the current one.

    At most one item is made in advance, so memory stays bounded. An error of the iterator is raised where its item
    would come.

    Args:
        items: Makes one item after the other.
        wait: When the caller stops early, wait until the thread has made its current item. Pass false if that may
            take for ever; the thread then lasts as long as the process.
        ending: Set when the caller stops early, so that the item may be given up.
    """
    end = object()
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        waiting = executor.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = executor.submit(next, items, end)
            yield item  # type: ignore[misc]  # not the end
    finally:
        if ending is not None:
            ending.set()
        executor.shutdown(wait=wait, cancel_futures=True)
        if wait and isinstance(items, Generator):
            items.close()
