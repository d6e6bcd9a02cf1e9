"""Statements about scenes of coloured shapes, true or false, and the data sets they make.

They are the demo data set, the test data and the pre-training data of the built-in backbone. Everything is drawn
from seeds; each purpose (see `SPLITS`) has streams of its own, so that no scene of one is ever a scene of another.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.room import check_inner_folders
from qwen_vl_classifier.files.whole import make_folders, new_file
from qwen_vl_classifier.scenes.drawing import COLOURS, SHAPES, Rng, Scene, Thing, draw, sample_scene

Kind: TypeAlias = Literal["existence", "exactly", "at_least", "relation", "size"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SPLITS = {"pretraining": 0, "demo": 1, "test": 2, "evaluation": 3}
"""Purposes that draw from disjoint random streams."""

UNSEEN_PAIRS = frozenset(
    {("red", "star"), ("green", "triangle"), ("yellow", "cross"), ("orange", "square"), ("purple", "circle")}
)
"""Colour-shape pairs that pre-training never draws, to measure whether colour and shape compose."""

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "center", "right")
_MAX_NAMED_COUNT = 4


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence or question about a scene, and whether it is true."""

    text: str
    label: int
    kind: Kind


def scene_rng(split: str, seed: int, index: int) -> Rng:
    """Return the random stream of one scene; streams of different splits never meet.

    Raises:
        ConfigError: An unknown split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    return np.random.default_rng([SPLITS[split], seed, index])


def caption(scene: Scene) -> str:
    """Name size, colour, shape and place of every thing in reading order."""
    ordered = sorted(scene.things, key=lambda thing: (*scene.cell(thing), thing.x))
    words = []
    for thing in ordered:
        words.append(f"{thing.size} {thing.colour} {thing.shape} {place(scene, thing)}")
    return ", ".join(words) + "."


def place(scene: Scene, thing: Thing) -> str:
    """Say in which part of the picture a thing lies, such as "top left"."""
    row, column = scene.cell(thing)
    return f"{_ROWS[row]} {_COLUMNS[column]}"


def statements(
    scene: Scene,
    rng: Rng,
    count: int,
    *,
    kinds: Sequence[Kind] = KINDS,
    exclude: frozenset[tuple[str, str]] = frozenset(),
) -> list[Statement]:
    """Make statements about a scene, half of them true and half false as far as the scene allows.

    Args:
        scene: What they are about.
        rng: Where randomness comes from.
        count: How many.
        kinds: Which kinds to choose from.
        exclude: Colour-shape pairs that must not be named: where a pair is never drawn, naming it in false
            statements would teach that it is false.
    """
    made: list[Statement] = []
    for _ in range(count * 20):
        if len(made) == count:
            break
        kind = kinds[int(rng.integers(len(kinds)))]
        statement = _MAKERS[kind](scene, rng, bool(rng.random() < 0.5))
        if statement is not None and not names_any(statement.text, exclude):
            made.append(statement)
    return made


def names_any(text: str, pairs: frozenset[tuple[str, str]]) -> bool:
    """Tell whether a text names one of some colour-shape pairs."""
    return any(f"{colour} {shape}" in text for colour, shape in pairs)


def scene_examples(
    split: str,
    *,
    seed: int = 0,
    scenes: int,
    per_scene: int = 1,
    kinds: Sequence[Kind] = KINDS,
    size: tuple[int, int] | None = None,
    exclude: frozenset[tuple[str, str]] = frozenset(),
) -> Iterator[tuple[Image.Image, Scene, list[Statement]]]:
    """Yield pictures with their scene and statements, drawn from the streams of one split."""
    for index in range(scenes):
        rng = scene_rng(split, seed, index)
        scene = sample_scene(rng, size=size, exclude=exclude)
        yield draw(scene), scene, statements(scene, rng, per_scene, kinds=kinds, exclude=exclude)


def write_dataset(
    folder: str | os.PathLike[str],
    *,
    split: str = "demo",
    seed: int = 0,
    scenes: int = 200,
    per_scene: int = 2,
    kinds: Sequence[Kind] = KINDS,
    name: str = "data",
) -> Path:
    """Write scenes as PNG files and one JSONL file that `load_examples` reads.

    Args:
        folder: Where to write; made if missing. Pictures go to its `images/`.
        split: Whose random streams to draw from.
        seed: Which of them.
        scenes: Number of pictures.
        per_scene: Statements about each.
        kinds: Which kinds of statement.
        name: Name of the JSONL file, without suffix, and of the pictures.

    Returns:
        The JSONL file: one object a line with `image`, `text`, `label`, `id`, `kind` and `group` (its picture).

    Raises:
        ConfigError: They cannot be written.
    """
    check_inner_folders(Path(folder), "images")
    try:
        return _write_dataset(Path(folder), split, seed, scenes, per_scene, kinds, name)
    except OSError as error:
        raise ConfigError(
            f"{folder}: data cannot be written here ({error.strerror or type(error).__name__}); give a folder that can "
            "be written, on a disk with room"
        ) from error


def _write_dataset(
    folder: Path, split: str, seed: int, scenes: int, per_scene: int, kinds: Sequence[Kind], name: str
) -> Path:
    make_folders(folder / "images")
    path = folder / f"{name}.jsonl"
    with new_file(path) as file:
        made = scene_examples(split, seed=seed, scenes=scenes, per_scene=per_scene, kinds=kinds)
        for index, (picture, _, lines) in enumerate(made):
            image = f"images/{name}-{index:05d}.png"
            with new_file(folder / image, clear=False) as picture_file:
                picture.save(picture_file, "PNG")
            for number, line in enumerate(lines):
                row = {
                    "image": image,
                    "text": line.text,
                    "label": line.label,
                    "id": f"{name}-{index:05d}-{number}",
                    "kind": line.kind,
                    "group": f"{name}-{index:05d}",
                }
                file.write(json.dumps(row).encode() + b"\n")
    return path


def vocabulary() -> list[str]:
    """Return every word that captions and statements are made of."""
    words = {*COLOURS, *SHAPES, *(f"{shape}{_plural_ending(shape)}" for shape in SHAPES), *NUMBERS}
    words |= {*_ROWS, *_COLUMNS, "small", "large", "shape", "shapes"}
    for template in itertools.chain(_EXISTENCE, _EXACTLY, _AT_LEAST, _RELATION, _SIZE, _RELATIONS):
        words.update(re.findall(r"\w+", re.sub(r"\{\w+\}", "", template)))
    return sorted(words | {"An", "an"})


_EXISTENCE = ("There is a {thing}.", "Is there a {thing}?", "The picture shows a {thing}.")
_EXACTLY = (
    "There is exactly {number} {things}.|There are exactly {number} {things}.",
    "Is there exactly {number} {things}?|Are there exactly {number} {things}?",
)
_AT_LEAST = (
    "There is at least {number} {things}.|There are at least {number} {things}.",
    "Is there at least {number} {things}?|Are there at least {number} {things}?",
)
_RELATION = (
    "The {first} is {relation} the {second}.",
    "Is the {first} {relation} the {second}?",
    "A {first} is {relation} a {second}.",
)
_SIZE = ("The {thing} is {size}.", "Is the {thing} {size}?", "There is a {size} {thing}.")
_RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def _plural_ending(shape: str) -> str:
    return "es" if shape.endswith("s") else "s"


def noun(colour: str | None, shape: str | None, *, plural: bool = False) -> str:
    """Name things by colour and shape; `None` leaves one of them open."""
    words = shape or "shape"
    if plural:
        words += _plural_ending(words)
    return f"{colour} {words}" if colour else words


def _phrase(templates: Sequence[str], rng: Rng, *, plural: bool = False, **words: str) -> str:
    forms = templates[int(rng.integers(len(templates)))].split("|")
    text = forms[-1 if plural else 0].format(**words)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _descriptions(scene: Scene, rng: Rng) -> Iterator[tuple[str | None, str | None]]:
    """Yield colour and shape to count by, those of things in the scene more often than others."""
    while True:
        if scene.things and rng.random() < 0.7:
            thing = scene.things[rng.integers(len(scene.things))]
            colour, shape = thing.colour, thing.shape
        else:
            colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        form = rng.integers(4)
        yield (colour, shape) if form < 2 else (None, shape) if form == 2 else (colour, None)


def count_of(scene: Scene, colour: str | None, shape: str | None) -> int:
    """Count the things of a colour and a shape; `None` takes any."""
    return sum(colour in (None, t.colour) and shape in (None, t.shape) for t in scene.things)


def unique_name(scene: Scene, thing: Thing, rng: Rng) -> str | None:
    """Name a thing so that no other in the scene fits, with as few words as chance has it."""
    forms = [(thing.colour, thing.shape), (None, thing.shape), (thing.colour, None)]
    fitting = [form for form in forms if count_of(scene, *form) == 1]
    return noun(*fitting[rng.integers(len(fitting))]) if fitting else None


def _existence(scene: Scene, rng: Rng, truth: bool) -> Statement | None:
    present = {(t.colour, t.shape) for t in scene.things}
    if not present:
        return None
    colours = {c for c, _ in present}
    shapes = {s for _, s in present}
    if truth:
        pool = sorted(present)
    else:
        everything = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
        # Half of the false ones take both colour and shape from the scene: neither alone gives them away.
        near = [(c, s) for c, s in everything if c in colours and s in shapes]
        half = [(c, s) for c, s in everything if (c in colours) != (s in shapes)]
        draw_from = rng.random()
        pool = near if near and draw_from < 0.5 else half if half and draw_from < 0.9 else everything
    colour, shape = pool[rng.integers(len(pool))]
    return Statement(_phrase(_EXISTENCE, rng, thing=noun(colour, shape)), int(truth), "existence")


def _counting(kind: Literal["exactly", "at_least"], templates: Sequence[str]) -> Callable[..., Statement | None]:
    def make(scene: Scene, rng: Rng, truth: bool) -> Statement | None:
        descriptions = _descriptions(scene, rng)
        # The number is a count of something else in the scene, whether the statement is to be true or false:
        # numbers are then as frequent in true statements as in false ones and give nothing away.
        counts = (count_of(scene, *next(descriptions)) for _ in range(10))
        number = next((count for count in counts if 1 <= count <= _MAX_NAMED_COUNT), 1)
        for colour, shape in itertools.islice(descriptions, 25):
            count = count_of(scene, colour, shape)
            holds = count == number if kind == "exactly" else count >= number
            if holds == truth:
                plural = number != 1
                name = noun(colour, shape, plural=plural)
                text = _phrase(templates, rng, plural=plural, number=NUMBERS[number], things=name)
                return Statement(text, int(truth), kind)
        return None

    return make


def _relation(scene: Scene, rng: Rng, truth: bool) -> Statement | None:
    named = [(thing, name) for thing in scene.things if (name := unique_name(scene, thing, rng))]
    if len(named) < 2:
        return None
    (first, first_name), (second, second_name) = (named[i] for i in rng.choice(len(named), size=2, replace=False))
    relation = list(_RELATIONS)[rng.integers(len(_RELATIONS))]
    dx, dy = _RELATIONS[relation]
    margin = (first.x - second.x) * dx + (first.y - second.y) * dy
    if abs(margin) < 0.1 * min(scene.width, scene.height):
        return None  # too close to call
    if (margin > 0) != truth:
        first_name, second_name = second_name, first_name
    text = _phrase(_RELATION, rng, relation=relation, first=first_name, second=second_name)
    return Statement(text, int(truth), "relation")


def _size(scene: Scene, rng: Rng, truth: bool) -> Statement | None:
    unique = [thing for thing in scene.things if count_of(scene, thing.colour, thing.shape) == 1]
    if not unique:
        return None
    thing = unique[rng.integers(len(unique))]
    size = thing.size if truth else ("small" if thing.large else "large")
    text = _phrase(_SIZE, rng, thing=noun(thing.colour, thing.shape), size=size)
    return Statement(text, int(truth), "size")


_MAKERS: dict[Kind, Callable[[Scene, Rng, bool], Statement | None]] = {
    "existence": _existence,
    "exactly": _counting("exactly", _EXACTLY),
    "at_least": _counting("at_least", _AT_LEAST),
    "relation": _relation,
    "size": _size,
}
