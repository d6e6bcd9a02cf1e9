"""Examples -> what the model reads, a bounded piece at a time, the next one while the model is at work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from qwen_vl_classifier.backbone.planning import windows_of
from qwen_vl_classifier.backbone.processor import EncodedExample, Observer, Pictures, Processor
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ExampleError, ImageError, TextError
from qwen_vl_classifier.images.identity import stamp_of

T = TypeVar("T")

_MOST_BYTES = 256_000_000  # of patches in one piece; a piece holds at least one example


def prepare_pieces(processor: Processor, examples: Iterable[Example]) -> Iterator[list[EncodedExample]]:
    """Tokenise examples and open their pictures, in pieces that are planned and encoded together.

    Within a piece, each picture is opened once however many texts come with it.

    Args:
        processor: Of the checkpoint.
        examples: Read lazily, a few hundred at a time.

    Raises:
        ImageError: A picture cannot be opened.
        TextError: A text is too long.
    """
    for outcomes in prepare_outcomes(processor, examples):
        piece = []
        for outcome in outcomes:
            if isinstance(outcome, ExampleError):
                raise outcome
            piece.append(outcome)
        yield piece


def prepare_outcomes(
    processor: Processor, examples: Iterable[Example], *, observe: Observer | None = None
) -> Iterator[list[EncodedExample | ExampleError]]:
    """Do what `prepare_pieces` does, but give the error in place of an example that cannot be used.

    The last pictures of a piece are not opened again for the next: where examples of the same pictures come together,
    each is opened once.

    Args:
        processor: Of the checkpoint.
        examples: Read lazily, a few hundred at a time.
        observe: Shown every picture that was opened; in the thread that does it.
    """
    read = processor.read_pictures if observe is None else partial(processor.read_pictures, observe=observe)
    last: tuple[tuple[bytes, ...], Example] | None = None  # alive too
    opened: dict[tuple[bytes, ...], Pictures | ImageError] = {}
    for window in windows_of(examples):  # all alive at once: of pictures that are gone, others may take the `id`
        if last is not None:
            opened = {last[0]: opened[last[0]]}
        piece: list[EncodedExample | ExampleError] = []
        held = 0
        for example in window:
            key = tuple(stamp_of(source) for source in example.images)
            if key not in opened:
                if held >= _MOST_BYTES:
                    yield piece
                    opened, piece, held = {}, [], 0
                try:
                    opened[key] = pictures = read(example)
                    held += pictures.pixel_values.nbytes
                except ImageError as error:
                    opened[key] = error.with_traceback(None)  # which would keep alive what was being decoded
            known, last = opened[key], (key, example)
            try:
                piece.append(known if isinstance(known, ImageError) else processor.encode(example, known))
            except TextError as error:
                piece.append(error.with_traceback(None))
        yield piece


def by_picture(examples: Sequence[Example]) -> list[int]:
    """Order examples so that those of the same pictures come together, where the first of them stands.

    Returns:
        The index of each example, in the new order. Texts without a picture stay where they are.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, example in enumerate(examples):
        groups.setdefault(tuple(stamp_of(source) for source in example.images) or (row,), []).append(row)
    return [row for rows in groups.values() for row in rows]


def read_ahead(items: Iterator[T], *, wait: bool = True) -> Iterator[T]:
    """Yield what an iterator yields, while the item after it is being made in a thread.

    One item waits at most, so memory stays bounded; an error of the iterator is raised where its item would come.

    Args:
        items: Makes one item after the other.
        wait: When nobody wants any more, wait until the item that is being made is there. Where that may be never, do
            not: the thread then lasts as long as the process.
    """
    end = object()
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        waiting = executor.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = executor.submit(next, items, end)
            yield item  # type: ignore[misc]  # not the end
    finally:
        executor.shutdown(wait=wait, cancel_futures=True)
