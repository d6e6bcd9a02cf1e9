"""Looks: copies that were resized or compressed are found, other pictures are not."""

import io

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier.errors import ImageError
from qwen_vl_classifier.images import look_alikes as module
from qwen_vl_classifier.images.identity import looks_of
from qwen_vl_classifier.images.look_alikes import Looks, near_pairs
from qwen_vl_classifier.scenes.statements import scene_examples


@pytest.fixture(scope="module")
def scenes():
    return [picture for picture, _, _ in scene_examples("test", scenes=30)]


def copied(picture, *, scale=0.75, quality=60):
    buffer = io.BytesIO()
    size = (round(picture.width * scale), round(picture.height * scale))
    picture.resize(size).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_the_hash_says_where_it_gets_brighter():
    rising = Image.fromarray(np.tile(np.arange(0, 252, 28, dtype=np.uint8), (8, 1)))
    assert looks_of([rising, rising.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]).hashes.tolist() == [2**64 - 1, 0]


def test_resized_and_compressed_copies_are_found(scenes):
    copies = looks_of([copied(picture) for picture in scenes])
    found = {(one, other) for one, other, _ in near_pairs(looks_of(scenes), copies)}
    assert {(row, row) for row in range(len(scenes))} <= found


def test_other_scenes_are_not(scenes):
    assert [*near_pairs(looks_of(scenes))] == []


def test_plain_pictures_of_other_colours_are_told_apart():
    found = looks_of([Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "#fe0000")])
    assert len(set(found.hashes.tolist())) == 1
    assert [*near_pairs(found)] == [(2, 0, 0)]


def test_blocks_change_nothing_and_bits_are_counted(monkeypatch):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 5, dtype=np.uint64)
    flips = np.array([0b1, 0b11111, 0b1010], dtype=np.uint64)
    hashes = np.concatenate([base, base[:3] ^ flips])
    found = Looks(hashes, np.zeros((8, 192), dtype=np.uint8))
    expected = [(5, 0, 1), (7, 2, 2)]
    assert [*near_pairs(found)] == expected
    monkeypatch.setattr(module, "_BLOCK", 3)
    monkeypatch.setattr(module, "_PAIRS", 1)
    assert [*near_pairs(found)] == expected


def test_a_damaged_picture_is_named():
    with pytest.raises(ImageError, match="bytes"):
        looks_of([b"no picture"])
