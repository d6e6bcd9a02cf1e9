"""Boxes: items lie in them and apart, towers stand on the ground, captions and pictures say what is there."""

from __future__ import annotations

import itertools

import numpy as np

from qwen_vl_classifier.scenes.statements import UNSEEN_PAIRS, scene_rng
from tools.tiny.boxes import (
    BLOCK,
    BOX_COLOURS,
    BOXES,
    GAP,
    SIDE,
    Item,
    box_caption,
    draw_strip,
    on_picture,
    sample_strip,
)

STRIPS = [sample_strip(scene_rng("test", 12, index)) for index in range(200)]


def test_items_lie_apart_and_inside():
    for strip in STRIPS:
        assert len(strip.boxes) == BOXES
        for box in strip.boxes:
            assert box
            for item in box:
                assert item.radius <= item.x <= SIDE - item.radius
                assert item.radius <= item.y <= SIDE - item.radius
            for a, b in itertools.combinations(box, 2):
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius


def test_towers_are_built_from_the_ground_up():
    towers = [box for strip in STRIPS if strip.towers for box in strip.boxes]
    assert len(towers) > 100
    for box in towers:
        assert "bottom" in box[0].walls
        assert all(item.shape == "square" for item in box)
        for low, high in itertools.pairwise(box):
            assert (high.x, high.y) == (low.x, low.y - BLOCK - 1)


def test_walls_and_corners_are_told_by_place():
    assert Item("circle", "red", "small", 5, 50).walls == {"left"}
    assert Item("circle", "red", "small", 95, 95).walls == {"right", "bottom"}
    assert Item("circle", "red", "small", 95, 95).in_corner
    assert not Item("circle", "red", "small", 50, 5).in_corner
    assert not Item("circle", "red", "small", 50, 50).walls
    touching = [bool(item.walls) for strip in STRIPS if not strip.towers for item in strip.items]
    assert 0.3 < np.mean(touching) < 0.7


def test_the_picture_shows_the_items():
    for strip in STRIPS[:40]:
        picture = draw_strip(strip)
        assert picture.size == (BOXES * SIDE + (BOXES - 1) * GAP, SIDE)
        for item in on_picture(strip):
            seen = np.array(picture.getpixel((int(item.x), int(item.y))), dtype=float)
            nearest = min(BOX_COLOURS, key=lambda name: np.abs(seen - BOX_COLOURS[name]).sum())
            assert nearest == item.colour, (item, seen)


def test_variation_keeps_the_size():
    for index, strip in enumerate(STRIPS[:20]):
        assert draw_strip(strip, rng=np.random.default_rng(index)).size == draw_strip(strip).size


def test_captions_name_every_item_of_every_box():
    for strip in STRIPS[:60]:
        parts = box_caption(strip).rstrip(".").split("; ")
        for part, box in zip(parts, strip.boxes, strict=True):
            named = part.split(", ")
            if strip.towers:
                assert named == [item.colour for item in box]
            else:
                wanted = sorted(" ".join([i.size, i.colour, i.shape, *sorted(i.walls)]) for i in box)
                assert sorted(named) == wanted


def test_excluded_pairs_are_not_drawn():
    for index in range(200):
        strip = sample_strip(scene_rng("test", 13, index), exclude=UNSEEN_PAIRS)
        assert not {(item.colour, item.shape) for item in strip.items} & UNSEEN_PAIRS
