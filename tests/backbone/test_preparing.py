"""Pieces of bounded size, and reading ahead."""

from __future__ import annotations

import threading

import pytest
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.backbone import planning, preparing
from qwen_vl_classifier.backbone.preparing import prepare_pieces, read_ahead
from qwen_vl_classifier.errors import ImageError


def pictures(count: int):
    return (Example(Image.new("RGB", (56, 56), (number, 0, 0)), "x") for number in range(count))


def test_pieces_are_bounded_by_bytes_and_by_number(tiny_backbone, monkeypatch):
    size = tiny_backbone.prepare(pictures(1))[0].pictures.pixel_values.nbytes
    monkeypatch.setattr(preparing, "_MOST_BYTES", 3 * size)
    assert [len(piece) for piece in prepare_pieces(tiny_backbone.processor, pictures(7))] == [3, 3, 1]
    monkeypatch.setattr(planning, "_WINDOW", 2)
    assert [len(piece) for piece in prepare_pieces(tiny_backbone.processor, pictures(5))] == [2, 2, 1]
    assert list(prepare_pieces(tiny_backbone.processor, [])) == []


def test_texts_of_one_picture_do_not_count_as_bytes(tiny_backbone, monkeypatch):
    monkeypatch.setattr(preparing, "_MOST_BYTES", 1)
    picture = Image.new("RGB", (56, 56))
    pieces = list(prepare_pieces(tiny_backbone.processor, [Example(picture, str(number)) for number in range(5)]))
    assert [len(piece) for piece in pieces] == [5]


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
    assert second.wait(10)
    assert made == [0, 1]
    reading.close()
    assert made == [0, 1]
    assert list(read_ahead(iter(range(100)))) == list(range(100))


def test_an_error_comes_in_its_place(tiny_backbone, monkeypatch):
    monkeypatch.setattr(planning, "_WINDOW", 2)
    rows = [*pictures(3), Example(b"no picture", "x")]
    seen = []
    with pytest.raises(ImageError):
        seen.extend(tiny_backbone.prepare_windows(rows))
    reading = tiny_backbone.prepare_windows(rows)
    assert len(next(reading)) == 2
    with pytest.raises(ImageError):
        next(reading)
