"""The demo's task: classes differ in colour alone, the tables are read as a user's own, and a folder can be."""

from __future__ import annotations

import csv
from collections import Counter

import pytest

from qwen_vl_classifier import load_examples
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.scenes.colour_match import CLASSES, QUESTION, colour_scenes, write_task


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("data"), train=20, test=10, new=4)


def test_labels_are_true_of_the_scenes():
    scenes = [*colour_scenes(0, 200)]
    for scene, label in scenes:
        assert (len({thing.colour for thing in scene.things}) == 1) == label
        assert len(scene.things) >= 3
    assert sum(label for _, label in scenes) == 100
    counts = [Counter(len(scene.things) for scene, label in scenes if label == which) for which in (0, 1)]
    means = [sum(size * count for size, count in counted.items()) / 100 for counted in counts]
    assert abs(means[0] - means[1]) < 0.8  # the number of shapes does not give the class away


def test_scenes_of_other_seeds_are_others():
    assert [scene for scene, _ in colour_scenes(0, 6)] == [scene for scene, _ in colour_scenes(0, 6)]
    assert not {scene for scene, _ in colour_scenes(0, 20)} & {scene for scene, _ in colour_scenes(1, 20)}


def test_tables_are_read_like_any_other(task):
    for path, count in ((task.train, 20), (task.test, 10)):
        rows = load_examples(path, positive=CLASSES[1], require_labels=True)
        assert [row.label for row in rows] == [1, 0] * (count // 2)
        assert {row.text for row in rows} == {QUESTION}
        assert all(row.fields["shapes"] in map(str, range(3, 9)) for row in rows)
        assert {str(row.image).split("/")[-2] == CLASSES[row.label] for row in rows} == {True}
    assert [row.label for row in load_examples(task.new)] == [None] * 4
    with task.new.open() as file:
        assert next(csv.reader(file)) == ["image", "text"]


def test_each_class_has_a_folder(task):
    rows = load_examples(task.train.with_suffix(""), positive="matching", text=QUESTION, require_labels=True)
    assert Counter(row.label for row in rows) == {0: 10, 1: 10}
    assert len(load_examples(task.new.with_suffix(""), text=QUESTION)) == 4


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "train").write_text("")
    with pytest.raises(ConfigError, match="expected a folder"):
        write_task(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written here"):
        write_task(tmp_path / "train" / "inside")
