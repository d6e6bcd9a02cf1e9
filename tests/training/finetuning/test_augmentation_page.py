"""The page of augmented pictures: complete in itself, escaped, and showing what training sees."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.training.finetuning.augmentation import Augmentation, augment_example
from qwen_vl_classifier.training.finetuning.augmentation_page import write_augmentation_page

HOSTILE = '</p><script>alert(1)</script><img src="http://example.org/x.png" onerror=alert(2)> & {{ 7 * 7 }}'


class Page(HTMLParser):
    """The tags of a page with their attributes, and its words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data

    @property
    def images(self) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def decoded(attributes: dict) -> Image.Image:
    start, content = attributes["src"].split(",")
    assert start == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def plain(shade: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, (shade, shade, shade))


@pytest.fixture
def hostile(tmp_path) -> Page:
    examples = [
        Example(plain(10, (700, 350)), HOSTILE, label=1, id="<i>seven</i>"),
        Example(None, "text alone"),
        Example([plain(80), plain(160)], "two pictures \ud800"),
    ]
    return Page(write_augmentation_page(examples, Augmentation("strong"), tmp_path / "new" / "page.html", variants=3))


def test_it_says_what_is_done(hostile):
    words = " ".join(hostile.words.split())
    assert "Level “strong”, flips off: " in words
    assert all(phrase in words for phrase in Augmentation("strong").operations)


def test_each_picture_has_its_strip(hostile):
    wanted = ["Original of {}", *(f"Variant {number} of {{}}" for number in (1, 2, 3))]
    names = ["row 0", "row 2, picture 1", "row 2, picture 2"]
    assert [image["alt"] for image in hostile.images] == [alt.format(name) for name in names for alt in wanted]


def test_large_pictures_are_scaled_down_and_small_ones_enlarged(hostile):
    large, small = hostile.images[0], hostile.images[-1]
    assert decoded(large).size == (int(large["width"]), int(large["height"])) == (200, 100)
    assert decoded(small).size == (40, 30)
    assert (small["width"], small["height"], small["class"]) == ("200", "150", "enlarged")


def test_texts_are_escaped_and_nothing_is_loaded(hostile):
    assert HOSTILE in hostile.words
    assert "id <i>seven</i>" in hostile.words
    assert "label 1" in hostile.words
    assert "label unknown" in hostile.words
    assert "text alone" not in hostile.words
    assert not {tag for tag, _ in hostile.tags} & {"script", "link", "iframe", "i", "object", "base"}
    assert all(image["src"].startswith("data:") for image in hostile.images)
    (policy,) = [attributes["content"] for tag, attributes in hostile.tags if "http-equiv" in attributes]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_variants_are_those_of_the_first_epochs(tmp_path):
    rng = np.random.default_rng(3)
    tiles = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((80, 60)) for _ in range(4)]
    examples = [Example(tile, f"example {index}") for index, tile in enumerate(tiles)]
    augmentation = Augmentation("strong", flips=True)
    page = Page(write_augmentation_page(examples, augmentation, tmp_path / "a.html", rows=2, variants=2, seed=9))
    assert "flips on" in page.words
    wanted = []
    for index in (0, 2):  # two of four, evenly spread
        epochs = [augment_example(examples[index], augmentation, (9, epoch, index)) for epoch in (0, 1)]
        wanted += [version.image for version in (examples[index], *epochs)]
    assert len(page.images) == len(wanted)
    for seen, expected in zip(page.images, wanted, strict=True):
        apart = np.abs(np.asarray(decoded(seen), dtype=float) - np.asarray(expected)).mean()
        assert apart < 6  # JPEG


def test_none_and_no_pictures_are_said(tmp_path):
    none = Page(write_augmentation_page([Example(plain(1), "t")], Augmentation("none"), tmp_path / "none.html"))
    assert "pictures are left as they are" in none.words
    empty = Page(write_augmentation_page([Example(None, "t")], Augmentation("light"), tmp_path / "empty.html"))
    assert "No example holds a picture." in empty.words
    assert not empty.images


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"page\.html: the page .* cannot be written \("):
        write_augmentation_page([], Augmentation("none"), tmp_path / "file" / "page.html")
