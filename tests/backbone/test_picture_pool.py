"""Pictures read in several threads: windows, errors and order as one after the other, and nothing left over."""

from __future__ import annotations

import gc
import io
import math
import random
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.backbone import picture_pool, windows
from qwen_vl_classifier.backbone.windows import prepare_outcomes
from qwen_vl_classifier.errors import ConfigError, ImageError, TextError
from qwen_vl_classifier.images.identity import stamp_of
from qwen_vl_classifier.images.limits import THREADS_VARIABLE, decoding_threads
from qwen_vl_classifier.images.time_limit import current_decoding_limit, decoding_limit
from tests.waiting import LIMIT, until


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (56, 28 + 28 * (colour % 4)), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(number) for number in range(6)]
SOURCES = [(), *((picture,) for picture in PICTURES), (PICTURES[0], PICTURES[1]), (b"no picture",), ("gone.png",)]


def examples_of(choices) -> list[Example]:
    return [Example(list(SOURCES[source]) or None, "word " * (1 + 40 * (text == 3))) for source, text in choices]


def one_after_the_other(processor, examples: list[Example]) -> list[list]:
    """Prepare windows as plainly as can be: what threads must not change."""
    found, opened, last = [], {}, None
    for start in range(0, len(examples), windows.WINDOW_EXAMPLES):
        opened = {} if last is None else {last: opened[last]}
        window, held = [], 0
        for example in examples[start : start + windows.WINDOW_EXAMPLES]:
            last = tuple(map(stamp_of, example.images))
            if last not in opened:
                if held >= windows._MOST_BYTES:
                    found.append(window)
                    opened, window, held = {}, [], 0
                try:
                    opened[last] = processor.read_pictures(example)
                    held += opened[last].nbytes
                except ImageError as error:
                    opened[last] = error
            try:
                known = opened[last]
                window.append(known if isinstance(known, ImageError) else processor.encode(example, known))
            except TextError as error:
                window.append(error)
        found.append(window)
    return found


def described(found: list[list]) -> list[list]:
    return [
        [str(item) if isinstance(item, Exception) else (item.key, item.spans) for item in window] for window in found
    ]


class Gate:
    """Lets threads that read pictures go on one by one, in an order that chance chooses."""

    def __init__(self, seed: int) -> None:
        self._draws = random.Random(seed)
        self._waiting: list[threading.Event] = []
        self._changed = threading.Condition()
        self._open = False

    def pass_through(self) -> None:
        mine = threading.Event()
        with self._changed:
            self._waiting.append(mine)
            self._changed.notify()
        assert mine.wait(LIMIT)

    def work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._open, LIMIT)
                if self._open:
                    return
                self._waiting.pop(self._draws.randrange(len(self._waiting))).set()

    @contextmanager
    def attended(self) -> Iterator[None]:
        thread = threading.Thread(target=self.work)
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._open = True
                self._changed.notify()
            thread.join()


def threads_reading() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-picture")]


@settings(max_examples=40, deadline=None)
@given(
    choices=st.lists(st.tuples(st.integers(0, len(SOURCES) - 1), st.integers(0, 3)), max_size=30),
    threads=st.integers(1, 4),
    most_examples=st.integers(1, 9),
    most_pictures=st.integers(0, 4),
    at_hand=st.booleans(),
    ahead=st.sampled_from([0, 50_000, 10**9]),
    seed=st.integers(0, 999),
)
def test_threads_change_neither_windows_nor_order_nor_errors(
    tiny_backbone, choices, threads, most_examples, most_pictures, at_hand, ahead, seed
):
    processor, examples, begun = tiny_backbone.processor, examples_of(choices), []
    gate = Gate(seed)
    read = processor.read_pictures

    def read_in_turn(example, **how):
        if example.images:
            gate.pass_through()
        return read(example, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "WINDOW_EXAMPLES", most_examples)
        patch.setattr(windows, "_MOST_BYTES", most_pictures * read(examples_of([(1, 0)])[0]).nbytes)
        patch.setattr(picture_pool, "_MOST_BYTES", ahead)
        patch.setattr(processor._texts, "most", 30)
        expected = one_after_the_other(processor, examples)
        patch.setattr(processor, "read_pictures", read_in_turn)
        with gate.attended():
            found = list(
                prepare_outcomes(processor, iter(examples), begin=begun.append, at_hand=at_hand, threads=threads)
            )
    assert described(found) == described(expected)
    assert sorted(set(begun)) == list(range(len(examples)))
    assert begun == sorted(begun)
    assert threads_reading() == []


def test_as_many_pictures_are_read_at_a_time_as_there_are_threads(tiny_backbone, monkeypatch):
    together = threading.Barrier(3, timeout=LIMIT)
    read = tiny_backbone.processor.read_pictures
    monkeypatch.setattr(
        tiny_backbone.processor, "read_pictures", lambda example, **how: (together.wait(), read(example, **how))[1]
    )
    rows = [Example(picture, "x") for picture in PICTURES]
    (window,) = prepare_outcomes(tiny_backbone.processor, rows, threads=3)
    assert len(window) == 6


@pytest.mark.parametrize(("limit", "most"), [(0, 2), (10**9, 4)])
def test_pictures_are_read_ahead_within_bounds(tiny_backbone, monkeypatch, limit, most):
    """Two for each thread; and beside the one that is waited for one more, where no bytes are left for others."""
    taken, read, named, ahead = 0, [], [0], []
    read_pictures = tiny_backbone.processor.read_pictures

    def reading(example, **how):
        pictures = read_pictures(example, **how)
        read.append(example)
        return pictures

    def examples():
        nonlocal taken
        for number in range(40):
            taken += 1
            ahead.append(taken - (len(read) if limit else named[-1]))
            yield Example(png(number), "x")

    monkeypatch.setattr(picture_pool, "_MOST_BYTES", limit)
    monkeypatch.setattr(tiny_backbone.processor, "read_pictures", reading)
    (window,) = prepare_outcomes(tiny_backbone.processor, examples(), begin=named.append, threads=2)
    assert len(window) == len(read) == 40
    assert max(ahead) <= most


def test_an_early_end_leaves_no_thread_and_no_picture(tiny_backbone, monkeypatch):
    read = tiny_backbone.processor.read_pictures
    made = []

    def reading(example, **how):
        pictures = read(example, **how)
        array = pictures.pixels[0].copy()
        made.append(weakref.ref(array))
        return replace(pictures, pixels=(array,))

    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 2)
    monkeypatch.setattr(tiny_backbone.processor, "read_pictures", reading)
    rows = [Example(picture, "x") for picture in PICTURES]
    outcomes = windows.windows(tiny_backbone.processor, rows, windows.BadRows())
    assert len(next(outcomes).prepared) == 2
    outcomes.close()
    assert threads_reading() == []
    gc.collect()
    assert made
    assert [array() for array in made if array() is not None] == []


def test_an_early_end_does_not_wait_for_the_rest_of_a_window(tiny_backbone, monkeypatch):
    """Ctrl+C while 256 large pictures are being read should not take a minute."""
    ending, begun = threading.Event(), []
    read = tiny_backbone.processor.read_pictures

    class Executor(windows.ThreadPoolExecutor):
        def shutdown(self, *arguments, **options):
            ending.set()
            super().shutdown(*arguments, **options)

    def reading(example, **how):
        begun.append(example)
        if len(begun) > 45:
            assert ending.wait(LIMIT)
        return read(example, **how)

    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 40)
    monkeypatch.setattr(picture_pool, "_MOST_BYTES", 0)  # so that no more is begun than is waited for
    monkeypatch.setattr(windows, "ThreadPoolExecutor", Executor)
    monkeypatch.setattr(tiny_backbone.processor, "read_pictures", reading)
    rows = [Example(png(number), "x") for number in range(80)]
    outcomes = windows.windows(tiny_backbone.processor, rows, windows.BadRows())
    assert len(next(outcomes).prepared) == 40
    until(lambda: len(begun) > 45, "the middle of the second window")
    outcomes.close()
    assert len(begun) < 50
    assert threads_reading() == []


def test_an_unexpected_error_comes_in_its_place_and_ends_the_threads(tiny_backbone, monkeypatch):
    read = tiny_backbone.processor.read_pictures

    def reading(example, **how):
        if example.images == (PICTURES[3],):
            raise MemoryError("too little memory")
        return read(example, **how)

    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 2)
    monkeypatch.setattr(tiny_backbone.processor, "read_pictures", reading)
    outcomes = prepare_outcomes(
        tiny_backbone.processor, [Example(picture, "x") for picture in PICTURES], at_hand=True, threads=4
    )
    assert len(next(outcomes)) == 2
    with pytest.raises(MemoryError, match="too little memory"):
        next(outcomes)
    assert threads_reading() == []


def test_a_window_does_not_wait_for_an_example_of_the_next_one(tiny_backbone, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 2)

    def examples():
        for picture in PICTURES[:2]:
            yield Example(picture, "x")
        raise AssertionError("asked for an example that may take for ever")

    outcomes = prepare_outcomes(tiny_backbone.processor, examples())
    assert len(next(outcomes)) == 2
    outcomes.close()


def test_the_limit_on_decoding_holds_in_threads(tiny_backbone, monkeypatch):
    seen = []
    read = tiny_backbone.processor.read_pictures
    monkeypatch.setattr(
        tiny_backbone.processor,
        "read_pictures",
        lambda example, **how: (
            seen.append((threading.current_thread(), current_decoding_limit())) or read(example, **how)
        ),
    )
    with decoding_limit(7.5):
        list(prepare_outcomes(tiny_backbone.processor, [Example(picture, "x") for picture in PICTURES]))
    assert {limit for _, limit in seen} == {7.5}
    assert threading.current_thread() not in {thread for thread, _ in seen}
    assert current_decoding_limit() == math.inf


def test_the_first_picture_that_is_not_there_yet_is_named(tiny_backbone, monkeypatch):
    """Where all stands still, it is the one that hangs."""
    hangs, named = threading.Event(), []
    read = tiny_backbone.processor.read_pictures

    def reading(example, **how):
        if example.images == (PICTURES[3],):
            assert hangs.wait(LIMIT)
        return read(example, **how)

    monkeypatch.setattr(tiny_backbone.processor, "read_pictures", reading)
    rows = [Example(picture, "x") for picture in PICTURES]
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(prepare_outcomes(tiny_backbone.processor, rows, begin=named.append, threads=4))
    )
    thread.start()
    until(lambda: named and named[-1] == 3, "the fourth picture")
    hangs.set()
    thread.join()
    assert named[-1] == 5
    assert len(found[0]) == 6


def test_threads_are_as_many_as_cores_or_as_the_user_says(monkeypatch):
    for name in (THREADS_VARIABLE, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert decoding_threads() == 8
    assert decoding_threads(3) == 3
    assert decoding_threads(100) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert decoding_threads() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert decoding_threads() == 1
    monkeypatch.setenv(THREADS_VARIABLE, "24")
    assert decoding_threads() == decoding_threads(3) == 24


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_another_number_of_threads_is_refused(monkeypatch, value):
    monkeypatch.setenv(THREADS_VARIABLE, value)
    with pytest.raises(ConfigError, match=THREADS_VARIABLE):
        decoding_threads()
