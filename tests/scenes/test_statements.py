"""Scenes: statements are true as their label says, splits never meet, nothing gives the answer away."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

from qwen_vl_classifier import load_examples
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.scenes.drawing import COLOURS, SHAPES, Scene, draw, sample_scene
from qwen_vl_classifier.scenes.statements import (
    KINDS,
    NUMBERS,
    SPLITS,
    UNSEEN_PAIRS,
    Statement,
    caption,
    scene_examples,
    scene_rng,
    statements,
    vocabulary,
    write_dataset,
)

ROWS = list(scene_examples("test", scenes=400, per_scene=4))


def matching(scene: Scene, name: str) -> list:
    """Return the things that a name fits, by reading the words and nothing else."""
    words = name.split()
    colour = next((word for word in words if word in COLOURS), None)
    shape = next((s for s in SHAPES if words[-1] in (s, f"{s}s", f"{s}es")), None)
    return [t for t in scene.things if colour in (None, t.colour) and shape in (None, t.shape)]


def truth(scene: Scene, statement: Statement) -> bool:
    """Decide a statement from its text alone, independently of how it was made."""
    text = statement.text.rstrip(".?").lower()
    text = re.sub(r"\b(the|an?|is|are|there|picture|shows)\b", " ", text)
    text = " ".join(text.split())
    if statement.kind == "existence":
        return bool(matching(scene, text))
    if statement.kind in ("exactly", "at_least"):
        number, name = re.fullmatch(r"(?:exactly|at least) (\w+) (.*)", text).groups()
        count = len(matching(scene, name))
        wanted = NUMBERS.index(number)
        return count == wanted if statement.kind == "exactly" else count >= wanted
    if statement.kind == "relation":
        first, relation, second = re.fullmatch(r"(.*) (left of|right of|above|below) (.*)", text).groups()
        (a,), (b,) = matching(scene, first), matching(scene, second)
        return {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[relation]
    size = re.search(r"\b(small|large)\b", text)[0]
    (thing,) = matching(scene, text.replace(size, "").strip())
    return thing.size == size


def test_labels_are_true():
    checked = Counter()
    for _, scene, lines in ROWS:
        for line in lines:
            assert truth(scene, line) == bool(line.label), (line, scene)
            checked[line.kind] += 1
    assert set(checked) == set(KINDS)
    assert min(checked.values()) >= 50


def test_labels_are_balanced_in_every_kind():
    rows = [line for _, _, lines in scene_examples("test", seed=1, scenes=600, per_scene=6) for line in lines]
    for kind in KINDS:
        labels = [line.label for line in rows if line.kind == kind]
        assert 0.42 <= np.mean(labels) <= 0.58, kind


@pytest.mark.parametrize("kind", ["exactly", "at_least"])
def test_numbers_do_not_give_the_answer_away(kind):
    made = scene_examples("test", seed=2, scenes=1500, per_scene=2, kinds=(kind,))
    rows = [line for _, _, lines in made for line in lines]
    best = 0
    for number in NUMBERS[1:5]:
        labels = [line.label for line in rows if f" {number} " in line.text]
        best += max(sum(labels), len(labels) - sum(labels))
    # Half for "exactly". "At least" cannot be even: a larger number is true less often, whatever the scenes.
    assert best / len(rows) <= (0.56 if kind == "exactly" else 0.72)


def test_captions_name_everything():
    for _, scene, _ in ROWS[:50]:
        named = caption(scene).rstrip(".").split(", ")
        assert sorted(tuple(name.split()[:3]) for name in named) == sorted(
            (t.size, t.colour, t.shape) for t in scene.things
        )


def test_the_same_seed_gives_the_same_scene():
    assert sample_scene(scene_rng("test", 3, 7)) == sample_scene(scene_rng("test", 3, 7))
    assert sample_scene(scene_rng("test", 3, 7)) != sample_scene(scene_rng("test", 3, 8))


def test_splits_never_meet():
    assert len(set(SPLITS.values())) == len(SPLITS)
    seen: dict[str, str] = {}
    for split in SPLITS:
        for seed, index in itertools.product(range(3), range(60)):
            picture = draw(sample_scene(scene_rng(split, seed, index)))
            digest = hashlib.sha256(picture.tobytes() + bytes(picture.size)).hexdigest()
            assert seen.setdefault(digest, split) == split
    assert len(seen) == len(SPLITS) * 3 * 60
    with pytest.raises(ConfigError, match="split 'training'"):
        scene_rng("training", 0, 0)


def test_unseen_pairs_are_neither_drawn_nor_named():
    for index in range(200):
        rng = scene_rng("test", 4, index)
        scene = sample_scene(rng, exclude=UNSEEN_PAIRS)
        assert not {(t.colour, t.shape) for t in scene.things} & UNSEEN_PAIRS
        for line in statements(scene, rng, 5, exclude=UNSEEN_PAIRS):
            assert not any(f"{colour} {shape}" in line.text for colour, shape in UNSEEN_PAIRS)


def test_vocabulary_holds_every_word():
    words = set(vocabulary())
    for _, scene, lines in ROWS:
        for text in (caption(scene), *(line.text for line in lines)):
            assert set(re.findall(r"\w+", text)) <= words, text


def test_a_data_set_is_written_and_read(tmp_path):
    path = write_dataset(tmp_path / "deep" / "folder", scenes=5, per_scene=3, kinds=("existence",), name="few")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    examples = load_examples(path, require_labels=True)
    assert path.name == "few.jsonl"
    assert [example.text for example in examples] == [row["text"] for row in rows]
    assert {row["kind"] for row in rows} == {"existence"}
    assert len({row["group"] for row in rows}) == len(list((path.parent / "images").iterdir())) == 5


def test_a_data_set_is_written_over_links_and_not_through_them(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "data"
    victim.write_text("precious")
    (folder / "images").mkdir(parents=True)
    for name in ("data.jsonl", "images/data-00000.png"):
        (folder / name).symlink_to(victim)
    load_examples(write_dataset(folder, scenes=1))
    assert victim.read_text() == "precious"


def test_a_link_in_place_of_the_folder_of_pictures_is_refused(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="images: is a link or a file, expected a folder; remove it"):
        write_dataset(tmp_path, scenes=1)
    assert list((tmp_path / "victim").iterdir()) == []


def test_a_data_set_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"file: data cannot be written here \(File exists\); give"):
        write_dataset(tmp_path / "file", scenes=1)
