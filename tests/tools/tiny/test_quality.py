"""Floors under what docs/figures/builtin.md claims of the shipped weights, on small samples.

Not covered here: several seeds, the transfer of frozen features and NLVR; `benchmarks/` measures those.
"""

from __future__ import annotations

import io

import numpy as np
import pytest

from qwen_vl_classifier import Classifier, Example
from qwen_vl_classifier.scenes.drawing import draw, sample_scene
from qwen_vl_classifier.scenes.statements import UNSEEN_PAIRS, scene_rng, statements
from tools.tiny.lessons import about_one

ROWS = 80
FLOORS = {"existence": 0.95, "exactly": 0.93, "at_least": 0.95, "relation": 0.95, "size": 0.95}


def balanced_rows(kind: str, *, seed: int, unseen: bool = False, pictures: int = 1) -> list[Example]:
    """Make as many true as false statements, each about scenes of its own."""
    names = [f"{colour} {shape}" for colour, shape in UNSEEN_PAIRS]
    exclude = frozenset() if unseen else UNSEEN_PAIRS
    rows: dict[int, list[Example]] = {0: [], 1: []}
    index = 0
    while min(map(len, rows.values())) < ROWS // 2:
        rng = scene_rng("test", 1000 + seed, index)
        index += 1
        scenes = [sample_scene(rng, size=(112, 112), exclude=exclude, max_things=5) for _ in range(pictures)]
        which = int(rng.integers(pictures))
        for line in statements(scenes[which], rng, 6, kinds=(kind,), exclude=exclude):
            if not unseen or any(name in line.text for name in names):
                text = line.text if pictures == 1 else about_one(line.text, which)
                rows[line.label].append(Example([draw(scene) for scene in scenes], text, line.label))
                break
    return [*rows[0][: ROWS // 2], *rows[1][: ROWS // 2]]


@pytest.fixture(scope="module")
def zero_shot(tiny_backbone):
    return Classifier.zero_shot(tiny_backbone)


def accuracy(classifier: Classifier, rows: list[Example]) -> float:
    return float(np.mean(classifier.predict(rows) == [row.label for row in rows]))


@pytest.mark.parametrize("kind", FLOORS)
def test_zero_shot_answers_are_right(zero_shot, kind):
    assert accuracy(zero_shot, balanced_rows(kind, seed=0)) >= FLOORS[kind]


@pytest.mark.soak
def test_colours_and_shapes_compose(zero_shot):
    assert accuracy(zero_shot, balanced_rows("existence", seed=1, unseen=True)) >= 0.92


@pytest.mark.soak
def test_the_right_picture_of_two_is_asked_about(zero_shot):
    assert accuracy(zero_shot, balanced_rows("existence", seed=2, pictures=2)) >= 0.92


@pytest.mark.parametrize(("pictures", "floor"), [(2, 0.9), (3, 0.86)])
@pytest.mark.soak
def test_things_are_counted_in_one_of_several_pictures(zero_shot, pictures, floor):
    assert accuracy(zero_shot, balanced_rows("exactly", seed=2 + pictures, pictures=pictures)) >= floor


@pytest.mark.soak
def test_jpeg_does_little_harm(zero_shot):
    rows = balanced_rows("existence", seed=3)
    coded = []
    for row in rows:
        buffer = io.BytesIO()
        row.images[0].save(buffer, "JPEG", quality=40)
        coded.append(Example(buffer.getvalue(), row.text, row.label))
    assert accuracy(zero_shot, coded) >= accuracy(zero_shot, rows) - 0.06
