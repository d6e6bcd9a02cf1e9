"""Drawings of explanations: colours where they belong, scales, words in any script, pictures of any shape."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.evaluation import explanation_picture
from qwen_vl_classifier.evaluation.explanation import Explanation
from qwen_vl_classifier.evaluation.explanation_picture import draw_explanation


def make_explanation(patches, words) -> Explanation:
    return Explanation(0.5, 0.0, patches, words, 0.0, 0.0, "gradients", False)


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """What is written on pictures, in order."""
    written: list[str] = []
    plain = ImageDraw.ImageDraw.text

    def text(self, position, line, *arguments, **options):
        written.append(line)
        return plain(self, position, line, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return written


def explanation_of(*patches: np.ndarray) -> Explanation:
    return Explanation(0.5, 0.0, list(patches), [], 0.0, 0.0, "tokens", exact=False)


def heat_map(picture, contributions: np.ndarray) -> Image.Image:
    return draw_explanation([picture], explanation_of(contributions))


def test_a_heat_map_colours_squares_where_they_are():
    shaded = np.asarray(heat_map(Image.new("RGB", (64, 32), "white"), np.array([[1.0, 0, 0, 0], [0, 0, 0, -0.5]])))
    assert shaded.shape[1] == 768
    red, _, blue = shaded[96, 96].astype(int)
    assert red > blue + 100, "class 1 is orange"
    red, _, blue = shaded[288, 672].astype(int)
    assert blue > red + 50, "class 0 is blue"
    assert shaded[96, 672].tolist() == shaded[288, 96].tolist() == [255, 255, 255]
    assert len(np.unique(shaded[396:456].reshape(-1, 3), axis=0)) > 50, "the scale is there"


def test_a_heat_map_of_nothing_is_the_grey_picture():
    shaded = np.asarray(heat_map(Image.new("RGB", (30, 30), (200, 30, 30)), np.zeros((2, 3))))
    assert len(np.unique(shaded[:768].reshape(-1, 3), axis=0)) == 1
    assert len(set(shaded[0, 0].tolist())) == 1


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (400, 3), (3000, 2000)])
def test_heat_maps_of_any_shape_keep_room_for_the_scale_and_the_words(size):
    width, height = heat_map(Image.new("RGB", size), np.eye(2)).size
    assert width == 768
    assert 61 < height <= 900


def test_a_broken_picture_is_an_image_error():
    with pytest.raises(ImageError):
        heat_map(b"no picture", np.ones((2, 2)))


def test_pictures_share_a_scale_whose_ends_are_written(texts):
    white = Image.new("RGB", (40, 20), "white")
    strong, weak = np.array([[2.0, 0.0]]), np.array([[0.5, 0.0]])
    sheet = np.asarray(draw_explanation([white, white], make_explanation([strong, weak], [("red", 1.5)]))).astype(int)
    middle = sheet.shape[1] // 2
    first, second = sheet[96, middle - 96], sheet[96 + 192 + 12, middle - 96]
    assert first[2] < 120 < 200 < second[2] < 250, "a quarter of the strength, a quarter of the colour"
    assert {"class 0  -2", "+2  class 1", "log odds"} <= set(texts)


def test_classes_are_called_by_their_names_where_a_font_has_them(texts):
    named = dataclasses.replace(explanation_of(np.eye(2)), label_names=("intact", "damaged in transit"))
    draw_explanation([Image.new("RGB", (40, 40))], named)
    assert {"intact  -1", "+1  damaged in ...", "towards intact", "towards damaged in ..."} <= set(texts)
    texts.clear()
    draw_explanation([], dataclasses.replace(named, label_names=("\u202e", "1"), patches=[]))
    assert {"towards class 0", "towards class 1"} <= set(texts)


def test_a_word_has_its_bar_on_its_side_and_its_number(texts):
    sheet = draw_explanation([], make_explanation([], [("red", 2.0), ("not", -1.0)]))
    pixels = np.asarray(sheet)
    assert sheet.size == (768, 3 * 24 + 12)
    orange = np.flatnonzero((pixels[36] == explanation_picture._TOWARDS_1).all(-1))
    blue = np.flatnonzero((pixels[60] == explanation_picture._TOWARDS_0).all(-1))
    assert blue.max() <= orange.min() + 1
    assert len(orange) == pytest.approx(2 * len(blue), abs=3)
    assert texts[-4:] == ["red", "+2", "not", "-1"]


def test_of_many_words_the_strongest_are_drawn_in_their_order(texts):
    words = [(f"w{number}", float((number * 7) % 100 - 50)) for number in range(100)]
    sheet = draw_explanation([], make_explanation([], words))
    drawn = [text for text in texts if text.startswith("w")]
    assert len(drawn) == 40
    assert drawn == sorted(drawn, key=lambda word: int(word[1:]))
    assert min(abs(dict(words)[word]) for word in drawn) >= 30
    assert texts[-1].startswith("and 60 words that contribute less, together -")
    assert sheet.height == 42 * 24 + 12


def test_what_no_font_can_write_is_its_number(monkeypatch, texts):
    latin_alone = explanation_picture._fonts()[:1]
    monkeypatch.setattr(explanation_picture, "_fonts", lambda: latin_alone)
    words = ["red", "图", "красный", "e\u0301t\u00e9", "\u202ered", "\x1b[31m", "\U0001f600"]
    draw_explanation([], make_explanation([], [(word, 1.0) for word in words]))
    assert texts.pop() == "[n] is word n of the text, which no font here can write"
    assert texts[3::2] == ["red", "[2]", texts[7], texts[9], "[5]", "[6]", "[7]"]
    assert texts[7] in ("красный", "[3]"), "as the font that comes with Pillow has it"


def test_writing_that_needs_a_layout_engine_is_not_drawn_without_one(monkeypatch):
    font = explanation_picture._fonts()[0]
    monkeypatch.setattr(explanation_picture, "_has_glyph", lambda font, character: True)
    monkeypatch.setattr(explanation_picture.features, "check", lambda feature: False)
    assert not explanation_picture._can_write(font, "שלום")
    assert not explanation_picture._can_write(font, "हिन्दी")
    assert explanation_picture._can_write(font, "word")


def test_a_long_word_is_cut_to_its_column(texts):
    draw_explanation([], make_explanation([], [("w" * 5000, 1.0)]))
    cut = next(text for text in texts if text.startswith("ww"))
    assert cut.endswith("w...")
    assert 10 < len(cut) < 40


def test_of_a_long_word_only_its_beginning_is_looked_at(texts):
    """A word of thousands of characters takes no longer than one that fits."""
    draw_explanation([], make_explanation([], [("a" * 200 + "\uffff", 1.0)]))
    assert not any("[1]" in text for text in texts)


def test_nothing_at_all_is_drawn_as_a_sheet(texts):
    assert draw_explanation([], make_explanation([], [])).size == (768, 36)
    assert draw_explanation([], make_explanation([], [("none", 0.0)])).height == 60
