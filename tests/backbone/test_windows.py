"""Windows of bounded size, and reading ahead."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.backbone import windows
from qwen_vl_classifier.backbone.windows import prepare, prepare_outcomes, read_ahead
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.errors import ImageError
from tests.waiting import LIMIT


def pictures(count: int):
    return (Example(Image.new("RGB", (56, 56), (number, 0, 0)), "x") for number in range(count))


def test_windows_are_bounded_by_bytes_and_by_number(tiny_backbone, monkeypatch):
    size = tiny_backbone.prepare(pictures(1))[0].pictures.nbytes
    monkeypatch.setattr(windows, "_MOST_BYTES", 3 * size)
    assert [len(window) for window in prepare_outcomes(tiny_backbone.processor, pictures(7))] == [3, 3, 1]
    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 2)
    assert [len(window) for window in prepare_outcomes(tiny_backbone.processor, pictures(5))] == [2, 2, 1]
    assert list(prepare_outcomes(tiny_backbone.processor, [])) == []


def test_texts_of_one_picture_do_not_count_as_bytes(tiny_backbone, monkeypatch):
    monkeypatch.setattr(windows, "_MOST_BYTES", 1)
    picture = Image.new("RGB", (56, 56))
    rows = [Example(picture, str(number)) for number in range(5)]
    assert [len(window) for window in prepare_outcomes(tiny_backbone.processor, rows)] == [5]


def test_one_item_is_made_ahead_and_no_more():
    made: list[int] = []
    second = threading.Event()

    def items():
        for number in range(5):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    reading = read_ahead(items())
    assert next(reading) == 0
    assert second.wait(LIMIT)
    assert made == [0, 1]
    reading.close()
    assert made == [0, 1]
    assert list(read_ahead(iter(range(100)))) == list(range(100))


def test_an_end_waits_for_the_item_in_the_making(monkeypatch):
    begun, ending = threading.Event(), threading.Event()
    made: list[int] = []

    class Executor(ThreadPoolExecutor):
        def shutdown(self, *arguments, **options):
            ending.set()
            super().shutdown(*arguments, **options)

    def items():
        yield 0
        begun.set()
        ending.wait(LIMIT)
        made.append(1)
        yield 1

    monkeypatch.setattr(windows, "ThreadPoolExecutor", Executor)
    reading = read_ahead(items())
    assert next(reading) == 0
    assert begun.wait(LIMIT)  # an item that nobody has begun is given up
    reading.close()
    assert made == [1]


def test_an_end_does_not_wait_where_that_is_asked_for():
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def items():
        yield 0
        begun.set()
        go_on.wait(LIMIT)
        ended.set()
        yield 1

    reading = read_ahead(items(), wait=False)
    assert next(reading) == 0
    assert begun.wait(LIMIT)
    reading.close()
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(LIMIT)


def test_an_error_of_the_iterator_comes_in_its_place():
    def items():
        yield from range(2)
        raise OSError("the disk is gone")

    reading = read_ahead(items())
    assert [next(reading), next(reading)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(reading)


def test_the_first_bad_picture_is_an_error_where_all_are_prepared(tiny_backbone):
    with pytest.raises(ImageError):
        prepare(tiny_backbone.processor, [*pictures(3), Example(b"no picture", "x")])


def test_windows_hold_everything_in_order(tiny_backbone):
    for count in (1, 256, 257, 600):
        examples = (Example(None, str(number)) for number in range(count))
        found = list(windows.windows(tiny_backbone.processor, examples, BadRows()))
        assert [position for window in found for position in window.positions] == list(range(count))
        assert all(len(window.prepared) == 256 for window in found[:-1])


def test_a_bad_picture_costs_its_own_examples_alone(tiny_backbone, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 4)
    opened = []
    read = tiny_backbone.processor.read_pictures
    monkeypatch.setattr(
        tiny_backbone.processor,
        "read_pictures",
        lambda example, **how: opened.append(example.image) or read(example, **how),
    )
    good, other = pictures(2)
    bad, missing = Example(b"no picture", "x"), Example("gone.png", "x")
    rows = [bad, good, Example(bad.image, "another text"), other, missing, good]
    first, second = prepare_outcomes(tiny_backbone.processor, rows)
    assert [getattr(item, "code", None) for item in (*first, *second)] == [
        *("image_format", None, "image_format", None),
        *("image_missing", None),
    ]
    assert first[0] is first[2]
    assert len(opened) == 5  # each once in its window
    expected = tiny_backbone.prepare([good, other, good])
    assert [item.key for item in (first[1], first[3], second[1])] == [item.key for item in expected]


def test_one_source_is_opened_once_however_it_is_spelled(tiny_backbone, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    next(iter(pictures(1))).image.save(path)
    (tmp_path / "link.png").symlink_to(path)
    opened = []
    read = tiny_backbone.processor.read_pictures
    monkeypatch.setattr(
        tiny_backbone.processor,
        "read_pictures",
        lambda example, **how: opened.append(example.image) or read(example, **how),
    )
    names = [path, str(path), f"{tmp_path}/./a.png", tmp_path / "link.png"]
    (window,) = prepare_outcomes(tiny_backbone.processor, [Example(name, "x") for name in names])
    assert len(opened) == 1
    assert len({item.pictures.key for item in window}) == 1
