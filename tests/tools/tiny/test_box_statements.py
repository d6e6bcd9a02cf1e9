"""Statements about boxes are as true as their labels say, judged again from words and picture contents alone."""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter

import numpy as np
import pytest

from qwen_vl_classifier.scenes.statements import UNSEEN_PAIRS, scene_rng
from tools.tiny.box_statements import BOX_KINDS, box_questions, box_statements
from tools.tiny.boxes import BOX_COLOURS, BOX_SHAPES, Item, Strip, sample_strip

NAMES = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
ORDINALS = ("first", "second", "third")
NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


@functools.cache
def made(seed: int, count: int, number: int = 6) -> list:
    rows = []
    for index in range(count):
        rng = scene_rng("test", seed, index)
        strip = sample_strip(rng)
        rows += [(strip, line) for line in box_statements(strip, rng, number)]
    return rows


def some_rows() -> list:
    return made(14, 800)


def number_of(word: str) -> int:
    return int(word) if word.isdigit() else 1 if word in ("a", "an") else NUMBERS[word]


def fits(item: Item, words: list[str]) -> bool:
    """Tell whether an item fits words such as "big blue circle"."""
    for word in words:
        singular = word.rstrip("s")
        if word in BOX_COLOURS and item.colour != word:
            return False
        if word in ("small", "medium", "large", "big") and item.size != {"big": "large"}.get(word, word):
            return False
        if singular in BOX_SHAPES and item.shape != singular:
            return False
    return True


def allows(quantity: str, count: int) -> bool:
    """Judge a quantity such as "at least two" against a count."""
    words = quantity.split()
    value = number_of(words[-1])
    if words[0] in ("a", "an"):
        return count >= 1
    how = " ".join(words[:-1])
    return {
        "": count == value,
        "exactly": count == value,
        "only": count == value,
        "at least": count >= value,
        "at most": count <= value,
        "more than": count > value,
        "less than": count < value,
    }[how]


_QUANTITY = r"((?:exactly |only |at least |at most |more than |less than )?(?:a|an|\d|one|two|three|four|five))"
_ITEMS = rf"(?:in the picture )?(?:there (?:is|are)|(?:is|are) there) {_QUANTITY} ([a-z ]+)"


def test_counts_over_the_whole_picture_are_true_as_labelled():
    checked = 0
    for strip, line in some_rows():
        match = re.fullmatch(_ITEMS, line.text.rstrip(".?").lower())
        words = match[2].split() if match else []
        nouns = ("item", "object", "shape", "block", *BOX_SHAPES)
        if line.kind != "items" or not match or words[-1].rstrip("s") not in nouns:
            continue
        count = sum(fits(item, words) for item in strip.items)
        assert allows(match[1], count) == bool(line.label), (line, strip)
        checked += 1
    assert checked > 300


@pytest.mark.parametrize(
    ("pattern", "judge"),
    [
        (
            r"there is a tower (?:with|that has|which has) an? (\w+) (?:block at the base|base|block at the bottom)",
            lambda strip, colour: any(box[0].colour == colour for box in strip.boxes),
        ),
        (
            r"there is a tower (?:with|that has|which has) an? (\w+) (?:block at the top|top|block on top)",
            lambda strip, colour: any(box[-1].colour == colour for box in strip.boxes),
        ),
        (
            r"(?:each|every) tower has an? (\w+) (?:block at the base|base|block at the bottom|block as its base)",
            lambda strip, colour: all(box[0].colour == colour for box in strip.boxes),
        ),
        (
            r"there is a tower (?:with|that has|which has) exactly (\d|one|two|three|four) blocks?",
            lambda strip, number: any(len(box) == number_of(number) for box in strip.boxes),
        ),
        (
            r"none of the (\w+ \w+) is (?:closely touching|touching|attached to|right at) "
            r"(?:the|a) corner(?: of a box)?",
            lambda strip, words: (
                any(fits(i, words.split()) for i in strip.items)
                and not any(i.in_corner for i in strip.items if fits(i, words.split()))
            ),
        ),
        (
            r"all (\w+ \w+) are (?:closely touching|touching|attached to|right at) the (?:bottom|base)",
            lambda strip, words: (
                any(fits(i, words.split()) for i in strip.items)
                and all("bottom" in i.walls for i in strip.items if fits(i, words.split()))
            ),
        ),
        (
            r"there are (?:two|2|at least two) towers of (?:the )?same height",
            lambda strip: max(Counter(len(box) for box in strip.boxes).values()) >= 2,
        ),
        (
            r"there is a tower (?:with|that has|which has) an? (\w+) block (?:on|over|directly above) an? (\w+) block",
            lambda strip, high, low: any(
                (a.colour, b.colour) == (low, high) for box in strip.boxes for a, b in itertools.pairwise(box)
            ),
        ),
    ],
)
@pytest.mark.soak
def test_statements_of_a_pattern_are_true_as_labelled(pattern, judge):
    rows = [*some_rows(), *made(15, 1200)]
    labels = Counter()
    for strip, line in rows:
        if match := re.fullmatch(pattern, line.text.rstrip(".?").lower()):
            assert judge(strip, *match.groups()) == bool(line.label), (line, strip)
            labels[line.label] += 1
    assert min(labels[0], labels[1]) >= 2, labels


def test_how_a_sentence_begins_does_not_give_the_answer_away():
    labels: dict[str, list[int]] = {}
    for _, line in some_rows():
        labels.setdefault(" ".join(line.text.lower().split()[:4]), []).append(line.label)
    right = sum(max(sum(group), len(group) - sum(group)) for group in labels.values() if len(group) >= 20)
    assert right / sum(len(group) for group in labels.values() if len(group) >= 20) < 0.6


def test_labels_are_balanced_and_all_kinds_occur():
    for kind in BOX_KINDS:
        labels = [line.label for _, line in some_rows() if line.kind == kind]
        assert len(labels) > 200
        assert 0.4 <= np.mean(labels) <= 0.6, kind


def test_sentences_read_well():
    for _, line in some_rows():
        assert not re.search(r"\ba [aeiou]", line.text.lower()), line.text
        assert "  " not in line.text
        assert line.text.endswith("?") == bool(re.match(r"(?i)(is|are) there", line.text)), line.text


def test_excluded_pairs_are_not_named():
    for index in range(150):
        rng = scene_rng("test", 16, index)
        strip = sample_strip(rng, exclude=UNSEEN_PAIRS)
        for line in box_statements(strip, rng, 5, exclude=UNSEEN_PAIRS):
            assert not any(f"{colour} {shape}" in line.text for colour, shape in UNSEEN_PAIRS)


def test_a_strip_of_one_kind_still_gets_statements():
    block = Item("square", "black", "medium", 50, 90)
    strip = Strip(((block,), (block,), (block,)), towers=True)
    assert box_statements(strip, np.random.default_rng(0), 5)


def test_open_questions_are_answered_rightly():
    checked = Counter()
    for index in range(400):
        rng = scene_rng("test", 17, index)
        strip = sample_strip(rng)
        for text, answer in box_questions(strip, rng, 4):
            assert text.endswith("?"), text
            plain = text.rstrip("?").lower()
            if match := re.fullmatch(r"what color is the (base|top) of the (first|second|third) tower", plain):
                box = strip.boxes[ORDINALS.index(match[2])]
                assert answer == box[0 if match[1] == "base" else -1].colour
                checked["colour"] += 1
            elif match := re.fullmatch(r"how many ([a-z]+ [a-z]+) are (there|in the (\w+) (?:box|tower))", plain):
                words = match[1].split()
                items = strip.items if match[2] == "there" else strip.boxes[ORDINALS.index(match[3])]
                assert NAMES[min(8, sum(fits(item, words) for item in items))] == answer, (text, strip)
                checked["items"] += 1
            elif match := re.fullmatch(r"how many towers have an? (\w+) (?:top|block on top|block at the top)", plain):
                assert NAMES[sum(box[-1].colour == match[1] for box in strip.boxes)] == answer
                checked["towers"] += 1
    assert min(checked["colour"], checked["items"], checked["towers"]) >= 10, checked


def test_open_questions_do_not_name_excluded_pairs():
    for index in range(100):
        rng = scene_rng("test", 18, index)
        for text, _ in box_questions(sample_strip(rng, exclude=UNSEEN_PAIRS), rng, 4, exclude=UNSEEN_PAIRS):
            assert not any(f"{colour} {shape}" in text for colour, shape in UNSEEN_PAIRS)
