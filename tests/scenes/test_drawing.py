"""Drawing: things keep apart, colours are where they should be, the same stream draws the same picture."""

from __future__ import annotations

import itertools

import numpy as np

from qwen_vl_classifier.scenes.drawing import COLOURS, SIZES, draw, sample_scene
from qwen_vl_classifier.scenes.statements import scene_rng

SCENES = [sample_scene(scene_rng("test", 0, index)) for index in range(200)]


def test_things_do_not_overlap_and_lie_inside():
    for scene in SCENES:
        for thing in scene.things:
            assert thing.radius <= thing.x <= scene.width - thing.radius
            assert thing.radius <= thing.y <= scene.height - thing.radius
        for a, b in itertools.combinations(scene.things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_the_colour_of_a_thing_is_at_its_place():
    for scene in SCENES[:50]:
        picture = draw(scene)
        for thing in scene.things:
            seen = picture.getpixel((round(thing.x), round(thing.y)))
            assert np.abs(np.subtract(seen, COLOURS[thing.colour])).max() <= 40


def test_sizes_are_those_of_pretraining_or_as_asked():
    assert {(scene.width, scene.height) for scene in SCENES} == set(SIZES)
    assert draw(sample_scene(scene_rng("test", 0, 0), size=(196, 84))).size == (196, 84)
