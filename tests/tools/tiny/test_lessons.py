"""Lessons: what is asked is answered rightly, and what is said of patches is so."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qwen_vl_classifier.scenes.drawing import SHAPES, SIZES, Scene, Thing, draw, sample_scene
from qwen_vl_classifier.scenes.statements import NUMBERS, UNSEEN_PAIRS, scene_rng
from tools.tiny.boxes import Item
from tools.tiny.lessons import (
    CAPTION_PROMPT,
    LARGE_SIZES,
    LESSON_KINDS,
    ORDINALS,
    PALETTE,
    PATCH_CLASSES,
    SIZE_NAMES,
    Question,
    give_lesson,
    is_small,
    open_questions,
    patch_labels,
    patch_places,
    phrases,
    plain_lesson,
)

SCENE = Scene(
    112,
    112,
    (240, 240, 240),
    (
        Thing("star", "blue", True, 20.0, 20.0, 15.0, 0.0),
        Thing("circle", "red", False, 90.0, 60.0, 8.0, 0.0),
        Thing("circle", "green", False, 60.0, 95.0, 8.0, 0.0),
    ),
)


def lesson(number: int):
    return give_lesson(number, scene_rng("test", 20, number), 8)


@pytest.mark.parametrize("number", range(20))
def test_a_lesson_fits_its_turn(number):
    given = lesson(number)
    assert len(given.pictures) == len(given.contents) >= 1
    assert len({picture.size for picture in given.pictures}) == 1
    assert {asked.kind for asked in given.questions} <= set(LESSON_KINDS)
    assert 4 <= len(given.questions) <= 12
    if is_small(number):
        assert len(given.pictures) == 1
        assert given.pictures[0].width * given.pictures[0].height <= 140 * 112


def test_every_size_of_picture_is_shown():
    shown = {lesson(number).pictures[0].size for number in range(100)}
    assert {*SIZES, *LARGE_SIZES} <= shown


@pytest.mark.parametrize(("easy", "rare", "often"), [(True, "right of", "left of"), (False, "left of", "right of")])
def test_relations_are_learned_in_turn(easy, rare, often):
    asked = Counter()
    for index in range(60):
        given = plain_lesson(scene_rng("test", 22, index), (112, 112), 8, easy=easy)
        asked.update(word for word in (rare, often) for each in given.questions if f" {word} " in each.text)
    assert 0 < asked[rare] < 0.8 * asked[often]


def test_every_kind_is_taught():
    kinds = {asked.kind for number in range(40) for asked in lesson(number).questions}
    assert kinds == set(LESSON_KINDS)


def test_without_questions_only_pictures_are_shown():
    given = give_lesson(0, scene_rng("test", 20, 0), 0)
    assert given.questions == ()
    assert given.pictures[0].tobytes() == lesson(0).pictures[0].tobytes() or given.contents


def test_questions_about_several_pictures_say_which():
    given = lesson(6)
    assert len(given.pictures) in (2, 3)
    for asked in given.questions:
        assert asked.text.split()[:2] in [[ordinal, "picture:"] for ordinal in ORDINALS]
    captions = [asked for asked in given.questions if asked.kind == "caption"]
    assert len(captions) == len(given.pictures)
    assert all(asked.text.endswith(CAPTION_PROMPT) for asked in captions)


def test_open_questions_are_answered_rightly():
    answers = {}
    for seed in range(200):
        for asked in open_questions(SCENE, np.random.default_rng(seed), 8):
            assert answers.setdefault(asked.text, asked) == asked
            assert not asked.phrases
    wanted = {
        "How many circles are there?": "two",
        "How many green circles are there?": "one",
        "How many red shapes are there?": "one",
        "How many crosses are there?": NUMBERS[0],
        "What color is the star?": "blue",
        "Where is the star?": "top left",
        "Where is the green circle?": "bottom center",
        "Is the star large or small?": "large",
        "Is the red circle left or right of the star?": "right",
        "Is the star above or below the green circle?": "above",
    }
    for text, answer in wanted.items():
        assert answers[text] == Question(text, answer, "open")


def test_unseen_pairs_are_nowhere():
    pairs = [f"{colour} {shape}" for colour, shape in UNSEEN_PAIRS]
    for number in range(60):
        given = lesson(number)
        assert not {(t.colour, t.shape) for content in given.contents for t in content} & UNSEEN_PAIRS
        for asked in given.questions:
            assert not any(pair in f"{asked.text} {asked.answer}" for pair in pairs), asked


@pytest.mark.parametrize(
    ("text", "ends", "counts", "places"),
    [
        ("Is there a star?", ["star"], [1], [(20, 20)]),
        ("There are two circles.", ["circles"], [2], [None]),
        ("The green circle is right of the blue star.", ["green circle", "star"], [1, 1], [(60, 95), (20, 20)]),
        ("How many crosses are there?", ["crosses"], [0], [None]),
        ("How many red shapes are there?", ["red shapes"], [1], [(90, 60)]),
        ("There is a large red circle.", ["circle"], [1], [(90, 60)]),
        ("All towers are alike.", [], [], []),
    ],
)
def test_phrases_stand_for_what_they_name(text, ends, counts, places):
    found = phrases(text, [SCENE.things], (SCENE.width, SCENE.height), sizes=False)
    assert [text[: phrase.end].endswith(end) for phrase, end in zip(found, ends, strict=True)] == [True] * len(ends)
    assert [phrase.counts for phrase in found] == [(count, -1, -1) for count in counts]
    for phrase, place in zip(found, places, strict=True):
        assert phrase.place == (place and pytest.approx((2 * place[0] / 112 - 1, 2 * place[1] / 112 - 1)))


def test_offsets_go_from_the_first_to_the_second():
    star, circle = phrases("The star is above the red circle.", [SCENE.things], (112, 112), sizes=False)
    assert star.offset is None
    assert circle.offset == pytest.approx(((90 - 20) / 56, (60 - 20) / 56))
    _, circles = phrases("The star is above the circles.", [SCENE.things], (112, 112), sizes=False)
    assert circles.offset is None


def test_phrases_about_boxes_count_in_each_box():
    boxes = [
        [Item("square", "blue", "large", 20, 20), Item("circle", "blue", "small", 60, 60)],
        [Item("circle", "blue", "large", 30, 70)],
        [],
    ]
    text = "There is a box with two blue items and one big circle."
    items, circle = phrases(text, boxes, (100, 100), sizes=True)
    assert items.counts == (2, 1, 0)
    assert circle.counts == (0, 1, 0)
    assert circle.place == pytest.approx((-0.4, 0.4))


def test_patches_are_labelled_with_what_covers_them():
    labels = patch_labels(SCENE.things, (112, 112), (1, 8, 8), merge_size=2)
    assert labels.shape == (64, 4)
    assert (labels.max(axis=0) < np.array(PATCH_CLASSES)).all()
    # Back from the order of merged patches to rows and columns.
    grid = labels.reshape(4, 4, 2, 2, 4).transpose(0, 2, 1, 3, 4).reshape(8, 8, 4)
    blue_star = [PALETTE.index("blue") + 1, SHAPES.index("star") + 1, SIZE_NAMES.index("large") + 1]
    assert grid[1, 1].tolist() == [*blue_star, 1]  # pixels 14 to 28: the centre at 20
    assert grid[0, 1].tolist() == [*blue_star, 0]
    assert grid[4, 6, 1] == SHAPES.index("circle") + 1
    assert grid[7, 0].tolist() == [0, 0, 0, 0]
    assert grid[..., 3].sum() == len(SCENE.things)


def test_labels_follow_the_picture():
    """The mean colour of patches that are called red is red."""
    for index in range(30):
        scene = sample_scene(scene_rng("test", 21, index), size=(112, 112))
        labels = patch_labels(scene.things, (112, 112), (1, 8, 8), merge_size=2)
        grid = labels.reshape(4, 4, 2, 2, 4).transpose(0, 2, 1, 3, 4).reshape(8, 8, 4)
        pixels = np.asarray(draw(scene), dtype=float).reshape(8, 14, 8, 14, 3).mean(axis=(1, 3))
        empty = np.abs(pixels[grid[..., 0] == 0] - scene.background).max(axis=-1, initial=0)
        assert np.mean(empty < 12) > 0.9 or not len(empty)


def test_places_run_from_corner_to_corner():
    places = patch_places((1, 4, 8), merge_size=2)
    assert places.shape == (8, 2)
    assert places[0].tolist() == [-0.75, -0.5]
    assert places[-1].tolist() == [0.75, 0.5]
