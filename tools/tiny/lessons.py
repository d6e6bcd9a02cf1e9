"""What pre-training shows and asks: pictures, questions with answers, and what is where."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from qwen_vl_classifier.scenes.drawing import COLOURS, SHAPES, SIZES, Rng, Scene, Thing, sample_scene
from qwen_vl_classifier.scenes.statements import (
    KINDS,
    NUMBERS,
    UNSEEN_PAIRS,
    Kind,
    caption,
    count_of,
    names_any,
    noun,
    place,
    statements,
    unique_name,
)
from tools.tiny.box_statements import BOX_KINDS, box_questions, box_statements
from tools.tiny.boxes import BOXES, SIDE, Item, box_caption, draw_strip, on_picture, sample_strip
from tools.tiny.degradation import draw_varied

CAPTION_PROMPT = "List the shapes."
LARGE_SIZES = ((168, 168), (196, 140), (140, 196), (224, 224), (224, 168))
"""Picture sizes of every few batches, beside the small ones of `SIZES`."""
ORDINALS = ("first", "second", "third")

LESSON_KINDS = ("caption", "open", *KINDS, "several", *BOX_KINDS)
"""What questions are about, as the training log names it."""

PALETTE = (*COLOURS, "black")
SIZE_NAMES = ("small", "medium", "large")

# The kind that learns slowest is asked more often; where pictures are several, that is how many there are.
_KIND_MIX: tuple[Kind, ...] = (*KINDS, "relation", "relation", "relation", "relation", "relation")
_SEVERAL_MIX: tuple[Kind, ...] = (*KINDS, "exactly", "relation")

_ANYTHING = ("shape", "item", "object", "block")  # words for things of any shape

_EARLIER, _LATER = (" left of ", " above "), (" right of ", " below ")

# Which of 20 batches are so.
_BOXES, _LISTED, _SEVERAL, _LARGE = (1, 4, 7, 10, 13, 15, 17, 18), (1, 10), (6, 11, 19), (3, 8, 16)


Seen: TypeAlias = Thing | Item
"""Something in a picture, with its shape, colour, size, place and radius, in pixels."""


MOST_PARTS = BOXES
MOST_COUNTED = 8
"""Parts of a picture in which things are counted apart, and the highest count that is told apart."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words in a text that name something.

    Attributes:
        end: Where they end, in characters from the text's beginning.
        counts: How many things fit, in each box or in the one picture; -1 for parts that there are not.
        place: (x, y) of the only thing that fits, from -1 to 1 across its picture; `None` where there are more or none.
        offset: How far that is from what the phrase before names, where that is one thing too; else `None`.
    """

    end: int
    counts: tuple[int, ...]
    place: tuple[float, float] | None
    offset: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its answer; `kind` says what it is about, `phrases` what it names."""

    text: str
    answer: str
    kind: str
    phrases: tuple[Phrase, ...] = ()


@dataclass(frozen=True, slots=True)
class Lesson:
    """One example of pre-training: pictures, what is in each of them, and the questions about them."""

    pictures: tuple[Image.Image, ...]
    contents: tuple[tuple[Seen, ...], ...]
    questions: tuple[Question, ...]


PATCH_CLASSES = (len(PALETTE) + 1, len(SHAPES) + 1, len(SIZE_NAMES) + 1, 2)
"""How many values each column of `patch_labels` can take."""


def is_small(number: int) -> bool:
    """Tell whether the lessons of a batch show one small picture each."""
    return number % 20 not in (*_BOXES, *_SEVERAL, *_LARGE)


def give_lesson(number: int, rng: Rng, questions: int, *, easy: bool = False) -> Lesson:
    """Make a lesson for the batch of this number; all pictures of one batch have one size.

    Args:
        number: Of the batch.
        rng: Where randomness comes from.
        questions: How many, beside captions; with 0, captions are left out too.
        easy: As in `plain_lesson`.
    """
    lesson = _any_lesson(number, rng, questions, easy=easy)
    return lesson if questions else replace(lesson, questions=())


def _any_lesson(number: int, rng: Rng, questions: int, *, easy: bool) -> Lesson:
    turn, series = number % 20, number // 20
    if turn in _BOXES:
        return box_lesson(rng, questions, listed=turn in _LISTED)
    sizes = LARGE_SIZES if turn in _LARGE else SIZES
    size = sizes[(turn + series) % len(sizes)]  # another one in the next series of 20
    if turn in _SEVERAL:
        return several_lesson(rng, size, questions)
    return plain_lesson(rng, size, questions, easy=easy)


def plain_lesson(rng: Rng, size: tuple[int, int], questions: int, *, easy: bool = False) -> Lesson:
    """Show one scene; ask for a caption, open questions and whether statements are true.

    Args:
        rng: Where randomness comes from.
        size: (width, height) of the picture in pixels.
        questions: How many, beside the caption.
        easy: Leave most of the statements out that say "right of" or "below". While all four relations come equally
            often, neither the relation nor the places alone say anything about the answer, and nothing is learned.
            Later, half of those that say "left of" or "above" are left out instead, until all are known equally well.
    """
    scene = sample_scene(rng, size=size, exclude=UNSEEN_PAIRS)
    openly = questions // 2
    asked = [Question(CAPTION_PROMPT, caption(scene), "caption"), *open_questions(scene, rng, openly)]
    rare, kept = (_LATER, 0.15) if easy else (_EARLIER, 0.5)
    asked += [
        each
        for each in _yes_or_no(scene, rng, questions - openly, _KIND_MIX)
        if not any(word in each.text for word in rare) or rng.random() < kept
    ]
    return Lesson((draw_varied(scene, rng),), (scene.things,), tuple(_naming(each, scene) for each in asked))


def _naming(asked: Question, scene: Scene) -> Question:
    """Add what the words of a question about a scene stand for."""
    if asked.kind == "caption":
        return asked
    return replace(asked, phrases=phrases(asked.text, [scene.things], (scene.width, scene.height), sizes=False))


def several_lesson(rng: Rng, size: tuple[int, int], questions: int) -> Lesson:
    """Show two or three scenes in one example; ask for a caption of each, and about one or the other."""
    scenes = [sample_scene(rng, size=size, exclude=UNSEEN_PAIRS, max_things=5) for _ in range(rng.integers(2, 4))]
    asked = []
    for which, scene in enumerate(scenes):
        asked.append(Question(about_one(CAPTION_PROMPT, which), caption(scene), "caption"))
        share = questions // len(scenes)
        openly = share // 3
        about = [replace(each, text=about_one(each.text, which)) for each in open_questions(scene, rng, openly)]
        about += [
            replace(each, text=about_one(each.text, which), kind="several")
            for each in _yes_or_no(scene, rng, share - openly, _SEVERAL_MIX)
        ]
        asked += [_naming(each, scene) for each in about]
    return Lesson(
        tuple(draw_varied(scene, rng) for scene in scenes), tuple(scene.things for scene in scenes), tuple(asked)
    )


def about_one(text: str, which: int) -> str:
    """Put before a text which of several pictures it is about, counted from 0."""
    return f"{ORDINALS[which]} picture: {text}"


def box_lesson(rng: Rng, questions: int, *, listed: bool) -> Lesson:
    """Show three boxes; ask whether statements are true and, if `listed`, for a caption, which is long here."""
    strip = sample_strip(rng, exclude=UNSEEN_PAIRS)
    asked = [Question(CAPTION_PROMPT, box_caption(strip), "caption")] if listed else []
    openly = questions // 2
    about = [Question(*question, "open") for question in box_questions(strip, rng, openly, exclude=UNSEEN_PAIRS)]
    for line in box_statements(strip, rng, questions - openly, exclude=UNSEEN_PAIRS):
        about.append(Question(line.text, "Yes" if line.label else "No", line.kind))
    for each in about:
        asked.append(replace(each, phrases=phrases(each.text, strip.boxes, (SIDE, SIDE), sizes=True)))
    return Lesson((draw_strip(strip, rng=rng),), (on_picture(strip),), tuple(asked))


def _yes_or_no(scene: Scene, rng: Rng, questions: int, kinds: Sequence[Kind]) -> list[Question]:
    made = statements(scene, rng, questions, kinds=kinds, exclude=UNSEEN_PAIRS)
    return [Question(line.text, "Yes" if line.label else "No", line.kind) for line in made]


def open_questions(scene: Scene, rng: Rng, number: int) -> list[Question]:
    """Ask how many, where, which colour, which size and on which side: more is learned from each than from a yes."""
    made: list[Question] = []
    for _ in range(number * 10):
        if len(made) == number:
            break
        question = _MAKERS[rng.integers(len(_MAKERS))](scene, rng)
        if question is not None and not names_any(question[0], UNSEEN_PAIRS):
            made.append(Question(*question, "open"))
    return made


def _how_many(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    colour = None if rng.random() < 0.3 else str(rng.choice(sorted({thing.colour for thing in scene.things})))
    shape = None if colour and rng.random() < 0.4 else str(rng.choice(SHAPES))
    return f"How many {noun(colour, shape, plural=True)} are there?", NUMBERS[count_of(scene, colour, shape)]


def _where(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    thing = scene.things[rng.integers(len(scene.things))]
    named = _name(scene, thing, rng)
    return (f"Where is the {named}?", place(scene, thing)) if named else None


def _name(scene: Scene, thing: Thing, rng: Rng) -> str | None:
    """Name a thing so that no other fits: by colour and shape as often as not, which takes both to find it."""
    if rng.random() < 0.5 and count_of(scene, thing.colour, thing.shape) == 1:
        return noun(thing.colour, thing.shape)
    return unique_name(scene, thing, rng)


def _what_colour(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    thing = scene.things[rng.integers(len(scene.things))]
    if count_of(scene, None, thing.shape) != 1:
        return None
    return f"What color is the {thing.shape}?", thing.colour


def _what_size(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    thing = scene.things[rng.integers(len(scene.things))]
    named = _name(scene, thing, rng)
    return (f"Is the {named} large or small?", thing.size) if named else None


def _which_side(scene: Scene, rng: Rng) -> tuple[str, str] | None:
    named = [(thing, text) for thing in scene.things if (text := _name(scene, thing, rng))]
    if len(named) < 2:
        return None
    (first, first_name), (second, second_name) = (named[i] for i in rng.choice(len(named), size=2, replace=False))
    across = rng.random() < 0.5
    margin = first.x - second.x if across else first.y - second.y
    if abs(margin) < 0.1 * min(scene.width, scene.height):
        return None
    words = ("left", "right") if across else ("above", "below")
    join = "left or right of" if across else "above or below"
    return f"Is the {first_name} {join} the {second_name}?", words[int(margin > 0)]


_MAKERS: tuple[Callable[[Scene, Rng], tuple[str, str] | None], ...] = (
    _how_many,
    _how_many,
    _where,
    _where,
    _where,
    _what_colour,
    _what_size,
    _which_side,
    _which_side,
)


_NAMES = re.compile(
    r"\b(?:(small|medium|large|big) )?"
    rf"(?:({'|'.join(PALETTE)}) )?"
    rf"({'|'.join((*SHAPES, *_ANYTHING))})(?:s|es)?\b"
)


def phrases(
    text: str, parts: Sequence[Sequence[Seen]], picture: tuple[float, float], *, sizes: bool
) -> tuple[Phrase, ...]:
    """Find the phrases in a text that name things, and what they stand for.

    Args:
        text: What is asked.
        parts: What there is to be named, in each box or in the one picture.
        picture: (width, height) in the pixels in which places are measured.
        sizes: Whether a size belongs to the name; else it may be what is asked about, and is left aside.
    """
    found: list[Phrase] = []
    for match in _NAMES.finditer(text):
        size, colour, shape = match.groups()
        size = {"big": "large"}.get(size, size) if sizes else None
        fitting = [[thing for thing in part if _fits(thing, size, colour, shape)] for part in parts]
        counts = [min(MOST_COUNTED, len(part)) for part in fitting]
        only = next(iter([thing for part in fitting for thing in part]), None) if sum(counts) == 1 else None
        place = (2 * only.x / picture[0] - 1, 2 * only.y / picture[1] - 1) if only else None
        before = found[-1].place if found else None
        offset = (place[0] - before[0], place[1] - before[1]) if place and before else None
        found.append(Phrase(match.end(), (*counts, *[-1] * (MOST_PARTS - len(parts))), place, offset))
    return tuple(found)


def _fits(thing: Seen, size: str | None, colour: str | None, shape: str) -> bool:
    return size in (None, thing.size) and colour in (None, thing.colour) and shape in (thing.shape, *_ANYTHING)


def patch_labels(
    things: Sequence[Seen], picture: tuple[int, int], grid: tuple[int, int, int], merge_size: int
) -> npt.NDArray[np.int64]:
    """Say for every patch what is there.

    Args:
        things: What is in the picture.
        picture: Its (width, height) in the pixels that `things` are measured in.
        grid: (time, height, width) in patches.
        merge_size: Side of the square of patches that makes one token.

    Returns:
        int64, shape (patches, 4), in the order of `pixel_values`: colour, shape and size of the thing that covers
        the patch or is nearest to its middle (0: none), and whether a thing's centre lies in it.
    """
    _, rows, columns = grid
    height, width = picture[1] / rows, picture[0] / columns  # of a patch, in pixels
    y, x = (np.indices((rows, columns)) + 0.5) * np.array([height, width])[:, None, None]
    labels = np.zeros((rows, columns, 4), dtype=np.int64)
    nearest = np.full((rows, columns), np.inf)
    for thing in things:
        # Half a patch beyond the edge, part of the thing is still in the patch.
        distance = np.maximum(np.abs(x - thing.x), np.abs(y - thing.y)) - thing.radius
        closer = (distance < 0.3 * width) & (distance < nearest)
        nearest = np.where(closer, distance, nearest)
        content = (PALETTE.index(thing.colour), SHAPES.index(thing.shape), SIZE_NAMES.index(thing.size))
        labels[closer, :3] = np.add(content, 1)
        labels[min(rows - 1, int(thing.y / height)), min(columns - 1, int(thing.x / width)), 3] = 1
    blocks = labels.reshape(rows // merge_size, merge_size, columns // merge_size, merge_size, 4)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 4)


def patch_places(grid: tuple[int, int, int], merge_size: int) -> npt.NDArray[np.float32]:
    """Return where each token of a picture lies: (x, y) of its middle from -1 to 1, shape (tokens, 2)."""
    rows, columns = grid[1] // merge_size, grid[2] // merge_size
    y, x = (np.indices((rows, columns)) + 0.5) / np.array([rows, columns])[:, None, None] * 2 - 1
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)
