"""Statements about pictures of three boxes: counts, colours, walls, towers, and how many boxes are so.

A statement is put together from parts that each know their words and what they say: a quantity ("at least two"), a
description of items ("small blue circles touching a wall"), a condition on one box ("with only black items") and a
quantity of boxes of which it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from qwen_vl_classifier.scenes.drawing import Rng
from qwen_vl_classifier.scenes.statements import NUMBERS, names_any
from tools.tiny.box_phrases import (
    BOX_ORDINALS,
    MOST_FORMS,
    choose,
    draw_block_at,
    draw_box_condition,
    draw_description,
    draw_quantity,
    draw_stacked,
    draw_touching,
    draw_tower_condition,
    phrase,
)
from tools.tiny.boxes import BOXES, Strip

BoxKind: TypeAlias = Literal["items", "boxes", "towers"]
BOX_KINDS: tuple[BoxKind, ...] = get_args(BoxKind)


@dataclass(frozen=True, slots=True)
class BoxStatement:
    """A sentence or question about three boxes, and whether it is true."""

    text: str
    label: int
    kind: BoxKind


def box_statements(
    strip: Strip, rng: Rng, number: int, *, exclude: frozenset[tuple[str, str]] = frozenset()
) -> list[BoxStatement]:
    """Make statements about three boxes, half of them true and half false as far as the boxes allow.

    Args:
        strip: What they are about.
        rng: Where randomness comes from.
        number: How many.
        exclude: Colour-shape pairs that must not be named.
    """
    made: list[BoxStatement] = []
    for _ in range(number * 10):
        if len(made) == number:
            break
        kind, make = _FORMS[strip.towers][rng.integers(len(_FORMS[strip.towers]))]
        truth = bool(rng.random() < 0.5)
        form = int(rng.integers(MOST_FORMS))
        # The form is chosen first, and only what it speaks of is drawn again until it is as true as it should be:
        # else a form that is seldom true ("every box has ...") would give the answer away.
        for _ in range(60):
            text, holds = make(strip, rng, form)
            if holds == truth:
                if not names_any(text, exclude):
                    made.append(BoxStatement(_finish(text, rng), int(truth), kind))
                break
    return made


def box_questions(
    strip: Strip, rng: Rng, number: int, *, exclude: frozenset[tuple[str, str]] = frozenset()
) -> list[tuple[str, str]]:
    """Ask how many items, how many boxes and which colours; return questions with their answers.

    Args:
        strip: What they are about.
        rng: Where randomness comes from.
        number: How many.
        exclude: Colour-shape pairs that must not be named.
    """
    made: list[tuple[str, str]] = []
    while len(made) < number:
        text, answer = _open_question(strip, rng)
        if not names_any(text, exclude):
            made.append((_finish(text, rng).rstrip(".") + "?", answer))
    return made


def _open_question(strip: Strip, rng: Rng) -> tuple[str, str]:
    form = rng.integers(6)
    place = int(rng.integers(BOXES))
    box = strip.boxes[place]
    if form < 3:
        noun, condition = (
            ("towers", draw_tower_condition(strip, rng)) if strip.towers else ("boxes", draw_box_condition(strip, rng))
        )
        return f"how many {noun} have {condition.words}", NUMBERS[sum(map(condition.holds, strip.boxes))]
    if form == 3 and strip.towers:
        at_base = bool(rng.random() < 0.5)
        level = "base" if at_base else "top"
        return f"what color is the {level} of the {BOX_ORDINALS[place]} tower", box[0 if at_base else -1].colour
    what = draw_description(strip, rng)
    if form == 4:
        inside = "in the {} tower" if strip.towers else "in the {} box"
        count = what.count(box)
        return f"how many {what.many} are {inside.format(BOX_ORDINALS[place])}", NUMBERS[min(count, 8)]
    return f"how many {what.many} are there", NUMBERS[min(what.count(strip.items), 8)]


def _finish(text: str, rng: Rng) -> str:
    """Make a sentence of it: with an article that fits, a capital letter as a rule, and a full stop as a rule."""
    words = text.split()
    for place, word in enumerate(words[:-1]):
        if word == "a" and words[place + 1][0] in "aeiou":
            words[place] = "an"
    text = " ".join(words)
    if rng.random() < 0.85:
        text = text[0].upper() + text[1:]
    if text.lower().startswith(("is there", "are there")):
        return f"{text}?"
    return text if rng.random() < 0.25 else f"{text}."


def _items(strip: Strip, rng: Rng, form: int) -> tuple[str, bool]:
    """Count items over the whole picture."""
    what = draw_description(strip, rng)
    total = what.count(strip.items)
    quantity = draw_quantity(rng, total, form)
    opening = choose(rng, ("there {} ", "there {} ", "in the picture there {} ", "{} there "))
    text = opening.format("are" if quantity.plural else "is") + phrase(quantity, what)
    return text, quantity.allows(total)


def _every_item(strip: Strip, rng: Rng, form: int) -> tuple[str, bool]:
    """Say of all items of a description, or of none, that they touch something or have a colour."""
    what = draw_description(strip, rng, walls=False)
    tail, touches = draw_touching(rng)
    chosen = [item for item in strip.items if what.fits(item)]
    if form % 2:
        return f"all {what.many} are{tail}", bool(chosen) and all(map(touches, chosen))
    return f"none of the {what.many} is{tail}", bool(chosen) and not any(map(touches, chosen))


def _how_many_boxes(strip: Strip, rng: Rng, form: int) -> tuple[str, bool]:
    """Say of how many boxes, or towers, a condition holds."""
    noun, plural = ("tower", "towers") if strip.towers else (choose(rng, ("box", "box", "grey box")), "boxes")
    condition = draw_tower_condition(strip, rng) if strip.towers else draw_box_condition(strip, rng)
    holding = sum(map(condition.holds, strip.boxes))
    joint = choose(rng, ("with", "with", "that has", "which has"))
    joints = {"with": "with", "that has": "that have", "which has": "which have"}[joint]
    form %= 12
    if form < 4:
        return f"there is a {noun} {joint} {condition.words}", holding >= 1
    if form == 4:
        return f"there is {choose(rng, ('at least one', 'at least 1'))} {noun} {joint} {condition.words}", holding >= 1
    if form == 5:
        one = choose(rng, ("exactly one", "only one", "only 1", "exactly 1"))
        return f"there is {one} {noun} {joint} {condition.words}", holding == 1
    if form == 6:
        two = choose(rng, ("exactly two", "only two", "two", "2", "exactly 2"))
        return f"there are {two} {plural} {joints} {condition.words}", holding == 2
    if form == 7:
        return f"there are at least two {plural} {joints} {condition.words}", holding >= 2
    if form == 8:
        return f"{choose(rng, ('each', 'every'))} {noun} has {condition.words}", holding == BOXES
    if form == 9:
        return f"there is no {noun} {joint} {condition.words}", holding == 0
    if form == 10:
        return f"one of the {plural} has {condition.words}", holding >= 1
    place = int(rng.integers(BOXES))
    return f"the {BOX_ORDINALS[place]} {noun} has {condition.words}", condition.holds(strip.boxes[place])


def _blocks(strip: Strip, rng: Rng, form: int) -> tuple[str, bool]:
    """Say that a block has a place, without naming its tower."""
    condition = draw_stacked(strip, rng) if form % 2 else draw_block_at(strip, rng)
    return f"there is {condition.words}", any(map(condition.holds, strip.boxes))


def _alike(strip: Strip, rng: Rng, form: int) -> tuple[str, bool]:
    """Compare towers with each other."""
    part = form % 3
    if part == 0:
        keys: list[int | str] = [len(box) for box in strip.boxes]
        words = choose(rng, ("of the same height", "with the same number of blocks", "of same height"))
    elif part == 1:
        keys = [box[0].colour for box in strip.boxes]
        words = choose(rng, ("with the same color at the base", "with a block of the same color at the bottom"))
    else:
        keys = [box[-1].colour for box in strip.boxes]
        words = choose(rng, ("with the same color at the top", "with a block of the same color at the top"))
    most = max(keys.count(key) for key in keys)
    if form % 5 < 3:
        return f"there are {choose(rng, ('two', 'at least two', '2'))} towers {words}", most >= 2
    return f"{choose(rng, ('all towers are', 'there are three towers'))} {words}", most == BOXES


_Form: TypeAlias = tuple[BoxKind, Callable[[Strip, Rng, int], tuple[str, bool]]]

_FORMS: dict[bool, tuple[_Form, ...]] = {
    False: (
        ("items", _items),
        ("items", _items),
        ("items", _items),
        ("items", _every_item),
        ("boxes", _how_many_boxes),
        ("boxes", _how_many_boxes),
        ("boxes", _how_many_boxes),
    ),
    True: (
        ("towers", _how_many_boxes),
        ("towers", _how_many_boxes),
        ("towers", _how_many_boxes),
        ("towers", _how_many_boxes),
        ("items", _items),
        ("towers", _blocks),
        ("towers", _alike),
    ),
}
