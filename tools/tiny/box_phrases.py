"""Parts that statements about three boxes are put together from; each knows its words and what they say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qwen_vl_classifier.scenes.drawing import Rng
from qwen_vl_classifier.scenes.statements import NUMBERS
from tools.tiny.boxes import BOX_SHAPES, BOXES, ITEM_SIZES, Item, Strip

MOST_FORMS = 60
"""A multiple of the number of forms of each maker."""

BOX_ORDINALS = ("first", "second", "third", "fourth")

Box: TypeAlias = tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Quantity:
    """How many: words, whether a plural follows, and which counts it allows."""

    words: str
    plural: bool
    allows: Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Description:
    """Which items: words for one and for several, without article, and which items fit."""

    one: str
    many: str
    fits: Callable[[Item], bool]

    def count(self, items: Sequence[Item]) -> int:
        """Return how many items fit."""
        return sum(map(self.fits, items))


@dataclass(frozen=True, slots=True)
class Condition:
    """What may be so of one box, put as "with ...", and whether it is."""

    words: str
    holds: Callable[[Box], bool]


def choose(rng: Rng, options: Sequence[str]) -> str:
    """Choose one of several words."""
    return options[int(rng.integers(len(options)))]


def number_word(rng: Rng, value: int) -> str:
    """Write a number as a word, or as a digit now and then."""
    return str(value) if value and rng.random() < 0.25 else NUMBERS[value]


def draw_quantity(rng: Rng, near: int, form: int, *, most: int = 5) -> Quantity:
    """Draw a quantity around a number; `form` says which kind."""
    value = min(most, max(1, near + int(rng.integers(-1, 2))))
    number = number_word(rng, value)
    form %= 10
    if form < 2:
        return Quantity("a", False, lambda count: count >= 1)
    if form < 4:
        return Quantity(choose(rng, ("exactly {}", "only {}")).format(number), value != 1, lambda count: count == value)
    if form < 6:
        return Quantity(f"at least {number}", value != 1, lambda count: count >= value)
    if form == 6:
        return Quantity(f"at most {number}", value != 1, lambda count: count <= value)
    if form == 7:
        below = number_word(rng, value)
        return Quantity(f"more than {below}", value != 1, lambda count: count > value)
    if form == 8:
        return Quantity(f"less than {number}", value != 1, lambda count: count < value)
    return Quantity(number, value != 1, lambda count: count == value)


def draw_description(strip: Strip, rng: Rng, *, walls: bool = True) -> Description:
    """Draw a description, of an item that is there more often than not."""
    pool = strip.items
    model = pool[rng.integers(len(pool))]
    colours = sorted({item.colour for item in pool})
    colour = model.colour if rng.random() < 0.7 else choose(rng, colours)
    shape = model.shape if rng.random() < 0.7 else choose(rng, BOX_SHAPES)
    noun = "block" if strip.towers else choose(rng, ("item", "object", "shape"))
    tests: list[Callable[[Item], bool]] = []
    words: list[str] = []
    if not strip.towers and rng.random() < 0.15:
        size = model.size if rng.random() < 0.5 else choose(rng, tuple(ITEM_SIZES))
        words.append(choose(rng, ("large", "big")) if size == "large" else size)
        tests.append(lambda item: item.size == size)
    if rng.random() < 0.75 or strip.towers:
        words.append(colour)
        tests.append(lambda item: item.colour == colour)
    if not strip.towers and (not tests or rng.random() < 0.55):
        noun = shape
        tests.append(lambda item: item.shape == shape)
    tail = ""
    if walls and not strip.towers and rng.random() < 0.35:
        tail, touches = draw_touching(rng)
        tests.append(touches)
    stem = " ".join([*words, noun])
    return Description(f"{stem}{tail}", f"{stem}s{tail}", lambda item: all(test(item) for test in tests))


def draw_touching(rng: Rng) -> tuple[str, Callable[[Item], bool]]:
    """Draw a wall, a corner or none, and whether an item touches it."""
    verb = choose(rng, (" touching", " closely touching", " attached to", " right at"))
    form = rng.integers(6)
    if form == 0:
        return f"{verb} {choose(rng, ('a corner', 'the corner', 'a corner of a box'))}", lambda item: item.in_corner
    if form == 1:
        return (
            f" not touching {choose(rng, ('a wall', 'any wall', 'the wall', 'any edge', 'the edge'))}",
            lambda item: not item.walls,
        )
    if form == 2:
        place = choose(rng, ("a wall", "the wall", "an edge", "the edge", "the side", "a wall of its box"))
        return f"{verb} {place}", lambda item: bool(item.walls)
    wall = choose(rng, ("left", "right", "top", "bottom"))
    names = {
        "left": ("the left wall", "the left side", "the left edge of a box"),
        "right": ("the right wall", "the right side", "the right wall of a box"),
        "top": ("the top", "the roof of a box", "the top wall", "the top edge"),
        "bottom": ("the bottom", "the base", "the bottom of a box", "the base of a box"),
    }
    return f"{verb} {choose(rng, names[wall])}", lambda item: wall in item.walls


def phrase(quantity: Quantity, what: Description) -> str:
    """Put a quantity and a description together."""
    return f"{quantity.words} {what.many if quantity.plural else what.one}"


def _contents(strip: Strip, rng: Rng) -> Condition:
    """Draw a condition on what a box holds."""
    what = draw_description(strip, rng)
    box = strip.boxes[rng.integers(BOXES)]
    quantity = draw_quantity(rng, what.count(box), int(rng.integers(MOST_FORMS)), most=4)
    return Condition(phrase(quantity, what), lambda box: quantity.allows(what.count(box)))


def draw_box_condition(strip: Strip, rng: Rng) -> Condition:
    """Draw a condition on a box of scattered items."""
    form = rng.integers(8)
    if form < 3:
        return _contents(strip, rng)
    if form < 5:
        first, second = _contents(strip, rng), _contents(strip, rng)
        return Condition(f"{first.words} and {second.words}", lambda box: first.holds(box) and second.holds(box))
    if form == 5:
        return _colourful(strip, rng, choose(rng, ("items", "objects")))
    if form == 6:
        what = draw_description(strip, rng, walls=False)
        return Condition(f"only {what.many}", lambda box: all(map(what.fits, box)))
    value = int(rng.integers(1, 7))
    how = choose(rng, ("exactly", "at least", "only"))
    noun = "item" if value == 1 else "items"
    return Condition(
        f"{how} {number_word(rng, value)} {noun}",
        lambda box: len(box) >= value if how == "at least" else len(box) == value,
    )


def _colourful(_strip: Strip, rng: Rng, noun: str) -> Condition:
    value = int(rng.integers(1, 4))
    if value == 1:
        return Condition(
            choose(rng, (f"all {noun} of the same color", f"{noun} of only one color", f"{noun} of one color")),
            lambda box: len({item.colour for item in box}) == 1,
        )
    words = choose(rng, ("{} of {} different colors", "{} in {} colors", "{} of {} colors"))
    return Condition(
        words.format(noun, number_word(rng, value)), lambda box: len({item.colour for item in box}) == value
    )


def draw_tower_condition(strip: Strip, rng: Rng) -> Condition:
    """Draw a condition on a tower."""
    form = rng.integers(12)
    if form < 4:
        return draw_block_at(strip, rng)
    if form < 6:
        return draw_stacked(strip, rng)
    if form < 8:
        return _contents(strip, rng)
    if form == 8:
        return _colourful(strip, rng, "blocks")
    if form == 9:
        first, second = draw_block_at(strip, rng), _contents(strip, rng)
        return Condition(f"{first.words} and {second.words}", lambda box: first.holds(box) and second.holds(box))
    quantity = draw_quantity(rng, len(strip.boxes[rng.integers(BOXES)]), int(rng.integers(MOST_FORMS)), most=4)
    noun = "blocks" if quantity.plural else "block"
    return Condition(f"{quantity.words} {noun}", lambda box: quantity.allows(len(box)))


def draw_stacked(strip: Strip, rng: Rng) -> Condition:
    """Draw a condition on the colours of two blocks of which one lies on the other."""
    colours = sorted({item.colour for item in strip.items})
    above, below = choose(rng, colours), choose(rng, colours)
    model = strip.boxes[rng.integers(BOXES)]
    if len(model) > 1 and rng.random() < 0.6:
        level = int(rng.integers(len(model) - 1))
        below, above = model[level].colour, model[level + 1].colour
    words = (
        "a {above} block on a {below} block",
        "a {above} block directly above a {below} block",
        "a {above} block over a {below} block",
        "a {below} block under a {above} block",
    )
    return Condition(
        choose(rng, words).format(above=above, below=below),
        lambda box: any(low.colour == below and high.colour == above for low, high in itertools.pairwise(box)),
    )


def draw_block_at(strip: Strip, rng: Rng) -> Condition:
    """Draw a condition on the colour of the lowest, the highest or some other block."""
    colour = choose(rng, [item.colour for item in strip.items])
    form = rng.integers(5)
    if form < 2:
        words = choose(
            rng, ("a {} block at the base", "a {} block at the bottom", "a {} base", "a {} block as its base")
        )
        level = 0
    elif form < 4:
        words = choose(rng, ("a {} block at the top", "a {} top", "a {} block as its top", "a {} block on top"))
        level = -1
    else:
        level = int(rng.integers(1, 3))
        words = "a {} block as the " + BOX_ORDINALS[level] + choose(rng, (" block from the base", " from the bottom"))
    return Condition(
        words.format(colour),
        lambda box: -len(box) <= level < len(box) and box[level].colour == colour,
    )
