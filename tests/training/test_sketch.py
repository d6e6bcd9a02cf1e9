"""The sketch knows rows again by their content, wherever they lie and whatever they are labelled."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.training.sketch import SKETCH_BY, SKETCH_ROWS, may_have_seen, overlap, row_hash, sketch

TEXTS = [Example(None, f"text {number}", number % 2) for number in range(300)]


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
    kept = sketch(TEXTS)
    assert len(kept) == SKETCH_ROWS
    assert kept == sketch([*TEXTS[::-1], *TEXTS[:50]])
    assert kept == sorted(row_hash(row) for row in TEXTS)[:SKETCH_ROWS]


def test_overlap_counts_what_was_trained_on():
    assert overlap(sketch(TEXTS), TEXTS) == SKETCH_ROWS
    assert overlap(sketch(TEXTS[:20]), TEXTS) == 20
    assert overlap(sketch(TEXTS), [Example(None, f"new {number}") for number in range(300)]) == 0
    half = overlap(sketch(TEXTS), TEXTS[::2])
    assert 16 < half < 48
    assert overlap([], [Example("not there.png", "x")]) == 0


def test_a_sketch_of_an_older_version_cannot_tell_of_pictures():
    kept, rows = sketch(TEXTS[:20]), [Example(Image.new("RGB", (4, 4)), "x")]
    assert may_have_seen({"rows_sketch": kept}, rows)
    assert not may_have_seen({"rows_sketch": kept, "rows_sketch_by": SKETCH_BY}, rows)
    assert not may_have_seen({"rows_sketch": kept}, [Example(None, "new")])
    assert may_have_seen({"rows_sketch": kept}, TEXTS)
    assert not may_have_seen({"method": "none"}, rows)


@pytest.mark.parametrize("path", ["not there.png", "nul\0.png"])
def test_a_file_that_cannot_be_read_is_named(path):
    with pytest.raises(ImageError, match=r"cannot be opened .* expected an image file"):
        row_hash(Example(path, "x"))
