"""What rows have in common: a figure says for which rows it stands, and a sketch knows rows again by their content."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, Example, TrainConfig, train
from qwen_vl_classifier.errors import DataError, ImageError
from qwen_vl_classifier.training.overlap import (
    SKETCH_ROWS,
    Contents,
    Novelty,
    alike_pairs,
    distinct_pictures,
    looks_of_pictures,
    may_have_seen,
    row_hashes,
    sketch,
)
from qwen_vl_classifier.training.splitting import groups_of
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [Example(None, f"text {number}", number % 2) for number in range(300)]
CONFIG = TrainConfig(taps="text:2", heads="linear")
WORDS = [
    "apple",
    "river",
    "stone",
    "window",
    "garden",
    "engine",
    "paper",
    "silver",
    "forest",
    "candle",
    "bridge",
    "winter",
]


def noise(seed: int, side: int = 28) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def rows_where_texts_decide(texts: int, pictures: int = 8) -> list[Example]:
    """Return rows of every text with every picture; the label is that of the text, and means nothing."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(texts) % 2).tolist()
    words = [" ".join(rng.choice(WORDS, 3)) + f" {number}" for number in range(texts)]
    shown = [noise(number) for number in range(pictures)]
    return [Example(picture, text, label) for picture in shown for text, label in zip(words, labels, strict=True)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Backbone:
    folder = nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")
    return Backbone.load(folder, device="cpu", dtype="float32")


def novelty(texts: str, pictures: list[tuple[bytes, ...]], held: list[int]) -> Novelty:
    rows = [row for row in range(len(texts)) if row not in held]
    return Novelty.of(Contents([*texts], pictures), [(np.array(rows), np.array(held))])


@pytest.mark.parametrize(
    ("texts", "pictures", "expected"),
    [
        ("abab", "1122", "new pictures, the same 2 texts"),
        ("aaaa", "1122", "new pictures, the same text"),
        ("abcd", "1122", "new pictures, new texts"),
        ("abad", "1122", "new pictures, texts that 50% of the rows share with those trained on"),
        ("abcd", "1111", "the same picture, new texts"),
        ("abcd", "    ", "new texts"),
    ],
)
def test_it_is_said_what_is_new(texts, pictures, expected):
    shown = [() if one == " " else (one.encode(),) for one in pictures]
    assert str(novelty(texts, shown, [2, 3])) == expected


def test_one_of_several_pictures_that_is_known_is_enough():
    assert novelty("abc", [(b"1", b"2"), (b"3",), (b"4", b"2")], [2]).known_pictures == 1


def test_texts_that_differ_in_blanks_are_one_and_all_is_counted():
    rows = [Example(noise(1), "a  b"), Example((noise(2), noise(1)), " a b\n"), Example(None, "c")]
    assert Contents.of(rows).counts() == {"texts": 2, "pictures": 2}


def pairs_of(rows: list[Example]) -> dict[str, int]:
    looks, first_rows = looks_of_pictures(distinct_pictures(rows, Contents.of(rows).pictures))
    return alike_pairs(looks, groups_of(rows)[first_rows].tolist())


def test_pictures_that_look_alike_are_counted_unless_they_are_of_one_group():
    def again(picture: Image.Image) -> bytes:
        buffer = io.BytesIO()
        picture.resize((60, 60)).save(buffer, "JPEG", quality=80)
        return buffer.getvalue()

    rows = [Example(noise(number, 56), "x", fields={"group": number}) for number in range(5)]
    rows += [Example(again(row.image), "x", fields={"group": None}) for row in rows[:3]]
    assert pairs_of(rows) == {"pairs": 3, "compared": 8}
    joined = [*rows[:5], *(replace(row, fields={"group": number}) for number, row in enumerate(rows[5:]))]
    assert pairs_of(joined)["pairs"] == 0


def test_where_many_texts_repeat_both_figures_are_printed(backbone):
    rows = rows_where_texts_decide(40)
    found = train(rows, backbone=backbone, config=CONFIG, progress=False)
    record = found.classifier.training
    assert record["data"] == {"texts": 40, "pictures": 8, "alike": {"pairs": 0, "compared": 8}}
    assert found.estimate["stands_for"] == "new pictures, the same 40 texts"
    assert found.estimate["group_by"] == "image"
    assert found.estimate["accuracy"]["mean"] > 0.75
    other = record["estimate_new_texts"]
    assert other["stands_for"] == "new pictures, new texts"
    assert other["accuracy"]["mean"] < 0.7  # chance, of 40 texts
    lines = str(found).splitlines()
    assert "Data: 320 rows: 8 distinct pictures, 40 distinct texts." in lines
    assert "  for new pictures, the same 40 texts; 95 % intervals" in lines
    second = next(number for number, line in enumerate(lines) if line.startswith("With new texts too: accuracy"))
    assert "  for new pictures, new texts; 95 % intervals" in lines[second : second + 5]


def test_pictures_that_look_alike_are_told_of(backbone):
    rows = rows_where_texts_decide(6)
    found = train(rows, backbone=backbone, config=CONFIG, progress=False)
    assert "look alike" not in str(found)
    again = [replace(row, image=picture) for picture in (noise(50, 56), noise(50, 60)) for row in rows[:6]]
    found = train([*rows, *again], backbone=backbone, config=CONFIG, progress=False)
    assert "in different groups that look alike: 1 (compressed again" in " ".join(str(found).split())


def test_one_text_is_counted_in_the_singular(backbone):
    rows = [Example(noise(number), "the same", number % 2) for number in range(12)]
    lines = str(train(rows, backbone=backbone, config=CONFIG, progress=False)).splitlines()
    assert "Data: 12 rows: 12 distinct pictures, 1 distinct text." in lines


def test_of_few_texts_it_is_said_that_they_are_the_same(backbone):
    found = train(rows_where_texts_decide(6), backbone=backbone, config=CONFIG, progress=False)
    assert "estimate_new_texts" not in found.classifier.training
    assert found.estimate["stands_for"] == "new pictures, the same 6 texts"


@pytest.mark.parametrize(
    ("by", "stands_for"), [("text", "the same 8 pictures, new texts"), ("both", "new pictures, new texts")]
)
def test_folds_are_whole_in_texts_where_asked(backbone, by, stands_for):
    config = replace(CONFIG, group_by=by)
    found = train(rows_where_texts_decide(40), backbone=backbone, config=config, progress=False)
    assert found.estimate["stands_for"] == stands_for
    assert found.estimate["group_by"] == by
    assert found.estimate["accuracy"]["mean"] < 0.7
    assert "estimate_new_texts" not in found.classifier.training
    assert found.classifier.training["options"]["group_by"] == by


def test_validation_rows_are_compared_with_training_rows(backbone):
    rows = rows_where_texts_decide(6)
    fresh = [replace(row, image=noise(99)) for row in rows[:6]]
    estimate = train(rows, fresh, backbone=backbone, config=CONFIG, progress=False).estimate
    assert estimate["stands_for"] == "new pictures, the same 6 texts"
    estimate = train(rows, rows[:12], backbone=backbone, config=CONFIG, progress=False).estimate
    assert estimate["stands_for"] == "the same 2 pictures, the same 6 texts"


def test_a_column_that_is_not_there_is_refused_before_any_pass(backbone, monkeypatch):
    monkeypatch.setattr(backbone, "processor", None)
    with pytest.raises(DataError, match="group_by='ward': no row has a value"):
        train(rows_where_texts_decide(6), backbone=backbone, config=replace(CONFIG, group_by="ward"), progress=False)


def row_hash(example: Example) -> str:
    return row_hashes([example])[0]


def test_content_counts_and_nothing_else(tmp_path):
    first, moved, other = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    Image.new("RGB", (4, 4)).save(first)
    shutil.copy(first, moved)
    Image.new("RGB", (4, 4), "red").save(other)
    known = row_hash(Example(first, "x", 1, "id"))
    assert known == row_hash(Example(str(moved), "x", 0)) == row_hash(Example(first.read_bytes(), "x"))
    assert known == row_hash(Example(Image.new("RGB", (4, 4)), "x"))
    differing = [
        Example(other, "x"),
        Example(first, "y"),
        Example((first, other), "x"),
        Example((other, first), "x"),
        Example(None, "x"),
        Example(Image.new("RGB", (2, 8)), "x"),
        Example(None, "\ud800"),
    ]
    hashes = {row_hash(example) for example in differing}
    assert len(hashes) == len(differing)
    assert known not in hashes
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in hashes)


def test_the_smallest_hashes_are_kept_whatever_the_order():
    kept = sketch(row_hashes(TEXTS))
    assert len(kept) == SKETCH_ROWS
    assert kept == sketch(row_hashes([*TEXTS[::-1], *TEXTS[:50]]))
    assert kept == sorted(row_hashes(TEXTS))[:SKETCH_ROWS]


def test_rows_that_were_trained_on_are_known_again():
    record = {"rows_sketch": sketch(row_hashes(TEXTS))}
    assert may_have_seen(record, TEXTS)
    assert not may_have_seen(record, [Example(None, f"new {number}") for number in range(300)])
    found = set(record["rows_sketch"]).intersection(row_hashes(TEXTS[::2]))
    assert 16 < len(found) < 48  # half of the rows are about half of the sketch
    assert not may_have_seen({"method": "none"}, [Example("not there.png", "x")])


@pytest.mark.parametrize("path", ["not there.png", "nul\0.png"])
def test_a_file_that_cannot_be_read_is_named(path):
    with pytest.raises(ImageError, match=r"cannot be opened .* expected an image file"):
        row_hash(Example(path, "x"))
