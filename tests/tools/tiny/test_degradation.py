"""Degrading: pictures stay what they show, and half of them stay as they are."""

from __future__ import annotations

import numpy as np

from qwen_vl_classifier.scenes.drawing import draw, sample_scene
from qwen_vl_classifier.scenes.statements import scene_rng
from tools.tiny.degradation import degrade, draw_varied

PICTURES = [draw(sample_scene(scene_rng("test", 11, index))) for index in range(120)]


def degraded() -> list:
    return [degrade(picture, np.random.default_rng(index)) for index, picture in enumerate(PICTURES)]


def test_half_of_the_pictures_stay_as_they_are():
    same = [new is old for new, old in zip(degraded(), PICTURES, strict=True)]
    assert 0.35 < np.mean(same) < 0.65


def test_what_is_seen_stays_where_it_is():
    for new, old in zip(degraded(), PICTURES, strict=True):
        assert (new.mode, new.size) == ("RGB", old.size)
        before, after = (np.asarray(p.resize((8, 8)), dtype=float).ravel() for p in (old, new))
        assert np.abs(before - after).mean() < 30
        if before.std() > 5:
            assert np.corrcoef(before, after)[0, 1] > 0.8


def test_the_same_stream_degrades_in_the_same_way():
    assert [p.tobytes() for p in degraded()] == [p.tobytes() for p in degraded()]


def test_a_varied_drawing_stays_a_picture_of_that_size():
    for index in range(30):
        rng = scene_rng("test", 5, index)
        scene = sample_scene(rng)
        picture = draw_varied(scene, rng)
        assert (picture.mode, picture.size) == ("RGB", (scene.width, scene.height))
