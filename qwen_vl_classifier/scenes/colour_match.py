"""The demo's task: do all shapes in a picture have the same colour?

The built-in backbone was never asked this: no statement of its pre-training is about all shapes, and without training
it guesses. Scenes of both classes are drawn alike, and those of one class then get a single colour: nothing but the
colours tells the classes apart.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.room import check_inner_folders
from qwen_vl_classifier.files.whole import make_folders, new_file
from qwen_vl_classifier.scenes.drawing import COLOURS, Rng, Scene, draw, sample_scene
from qwen_vl_classifier.scenes.statements import scene_rng

QUESTION = "Do all shapes have the same colour?"
CLASSES = ("mixed", "matching")
"""Class 0 and class 1."""

_FEWEST_THINGS = 3  # two of one colour are common by chance


@dataclass(frozen=True, slots=True)
class Task:
    """Where `write_task` wrote.

    Attributes:
        train: The table to train on: columns `image`, `text`, `label` (a word of `CLASSES`) and `shapes` (how many).
        test: The table to test on, of other scenes.
        new: A table of pictures without labels: columns `image` and `text`.
    """

    train: Path
    test: Path
    new: Path


def write_task(folder: str | os.PathLike[str], *, train: int = 400, test: int = 200, new: int = 12) -> Task:
    """Write pictures in a folder for each class, and tables that name them.

    Args:
        folder: Where to write; made if missing. Pictures go to `train/matching/`, `train/mixed/`, `test/matching/`,
            `test/mixed/` and, without labels, `new/`.
        train: How many to train on, half of each class.
        test: How many to test on, half of each class.
        new: How many without labels.

    Raises:
        ConfigError: They cannot be written.
    """
    folder = Path(folder)
    check_inner_folders(folder, "train", "test", "new")
    check_inner_folders(folder, *(f"{name}/{label}" for name in ("train", "test") for label in CLASSES))
    try:
        return Task(
            _write_labelled(folder, "train", seed=0, count=train),
            _write_labelled(folder, "test", seed=1, count=test),
            _write_new(folder, seed=2, count=new),
        )
    except OSError as error:
        raise ConfigError(
            f"{folder}: data cannot be written here ({error.strerror or type(error).__name__}); give a folder that can "
            "be written, on a disk with room"
        ) from error


def colour_scenes(seed: int, count: int) -> Iterator[tuple[Scene, int]]:
    """Yield scenes of class 1, whose shapes share one colour, and of class 0, in turn, each with its class."""
    for index in range(count):
        label = 1 - index % 2
        yield _scene(scene_rng("demo", seed, index), label), label


def _scene(rng: Rng, label: int) -> Scene:
    while True:
        scene = sample_scene(rng)
        if len(scene.things) >= _FEWEST_THINGS and len({thing.colour for thing in scene.things}) > 1:
            break
    if not label:
        return scene
    colour = str(rng.choice(list(COLOURS)))
    return replace(scene, things=tuple(replace(thing, colour=colour) for thing in scene.things))


def _write_labelled(folder: Path, name: str, *, seed: int, count: int) -> Path:
    rows: list[tuple[str, ...]] = [("image", "text", "label", "shapes")]
    for word in CLASSES:
        make_folders(folder / name / word)
    for number, (scene, label) in enumerate(colour_scenes(seed, count), 1):
        image = f"{name}/{CLASSES[label]}/{number:03d}.png"
        _save(draw(scene), folder / image)
        rows.append((image, QUESTION, CLASSES[label], str(len(scene.things))))
    return _write_table(folder / f"{name}.csv", rows)


def _write_new(folder: Path, *, seed: int, count: int) -> Path:
    rows = [("image", "text")]
    make_folders(folder / "new")
    for number, (scene, _) in enumerate(colour_scenes(seed, count), 1):
        image = f"new/{number:02d}.png"
        _save(draw(scene), folder / image)
        rows.append((image, QUESTION))
    return _write_table(folder / "new.csv", rows)


def _save(picture: Image.Image, place: Path) -> None:
    with new_file(place, clear=False) as file:
        picture.save(file, "PNG")


def _write_table(place: Path, rows: Sequence[tuple[str, ...]]) -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with new_file(place) as file:
        file.write(text.getvalue().encode())
    return place
