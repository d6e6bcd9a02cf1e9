"""Queues: the rows that a report or a run of scoring names, in their order."""

import json

import numpy as np
import pytest

from qwen_vl_classifier import Example
from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.labelling.queues import queue_from_rows, queue_from_scores
from qwen_vl_classifier.scoring.formats import ScoredRow, write_rows
from qwen_vl_classifier.scoring.run import score
from tests.labelling.pools import make_pool, texts


def rows_file(folder, content):
    path = folder / "rows"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        '{"id": "row-3"}\n{"id": "row-1"}\n{"id": "gone"}\n',
        "\ufeffrow-3\r\n\r\nrow-1\r\ngone",
        '{"row": 3}\n{"row": 1}\n{"row": 100}\n{"row": 3}\n',
    ],
)
def test_rows_are_found_in_their_order(tmp_path, content):
    queue = queue_from_rows(rows_file(tmp_path, content), make_pool(texts(5)))
    assert (queue.rows, queue.only, queue.missing) == ((3, 1), True, 1)


def test_numbers_are_those_of_the_report(tmp_path):
    pool = make_pool([*texts(2), Example(None, "text 0"), Example(None, "no id")])
    pool.indices = np.array([0, 2, 3, 5])  # two rows of the data had no usable pictures
    assert queue_from_rows(rows_file(tmp_path, '{"row": 3}\n{"row": 5}\n'), pool).rows == (0, 2)
    with pytest.raises(DataError, match="none of its 1 rows is in the data of 4 rows"):
        queue_from_rows(rows_file(tmp_path, '{"row": 1}\n'), pool)


def test_pictures_without_ids_are_found_by_their_names(tmp_path):
    pool = make_pool([Example(f"photos/{name}", name) for name in ("a/1.png", "b/1.png", "b/2.png")])
    queue = queue_from_rows(rows_file(tmp_path, "b/1.png\n2.png\n1.png\n"), pool)
    assert (queue.rows, queue.missing) == ((1, 2), 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "none of its 0 rows"),
        ('{"id": 7}', 'line 1: .+; expected {"id": "..."}, {"row": 17} or the id of a row'),
        ('{"row": true}', "line 1"),
        ("row-1\n{broken", "line 2"),
        (b"\xff\xfe\x00", "line 1: not UTF-8"),
        (b"x" * ((1 << 24) + 2), "line 1: 16,777,218 bytes"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        queue_from_rows(rows_file(tmp_path, content), make_pool(texts(5)))
    with pytest.raises(DataError, match="cannot be read"):
        queue_from_rows(tmp_path, make_pool(texts(5)))


def scores_in(folder, rows, form="parquet", names=("judge",)):
    """Write a folder of scores with one row in each shard."""
    (folder / "shards").mkdir()
    (folder / "manifest.json").write_text(json.dumps({"format_version": 3, "options": {"escape_formulas": True}}))
    for number, row in enumerate(rows):
        content = write_rows([row], names, form, escape_formulas=True)
        (folder / "shards" / f"{number:06d}.{form}").write_bytes(content)
    return folder


def scored(name, row, *probabilities, threshold=0.3, decision=None):
    predictions = tuple(
        Prediction(int(one >= threshold), one, decision or ("yes" if one >= threshold else "no"))
        for one in probabilities
    )
    return ScoredRow(name, row, predictions)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_the_nearest_to_the_threshold_come_first(tmp_path, form):
    pool = make_pool(
        [Example(None, f"text {place}", id=name) for place, name in enumerate(("=a", "b", "c", "d", "e", "f"))]
    )
    rows = [
        scored("=a", 9, 0.32),
        scored("b", 8, 0.9),
        scored("c", 7, 0.29),
        scored("d", 6, 0.01),
        scored("e", 5, 0.6, decision="abstain"),
        scored("gone", 4, 0.3),
        ScoredRow("f", 3),
    ]
    queue = queue_from_scores(scores_in(tmp_path, rows, form), pool)
    first, *nearest, fourth, last = (pool.examples[row].id for row in queue.rows)
    assert (first, {*nearest}, fourth, last) == ("e", {"=a", "c"}, "b", "d")
    assert (queue.only, queue.missing) == (False, 1)


def test_the_least_sure_of_several_classifiers_counts(tmp_path):
    both = [(0.9, 0.01), (0.99, 0.45), (0.55, 0.99), (0.1, 0.52)]
    rows = [scored(f"row-{row}", row, *one, threshold=0.5) for row, one in enumerate(both)]
    queue = queue_from_scores(scores_in(tmp_path, rows, names=("judge", "other")), make_pool(texts(4)))
    assert ({*queue.rows[:2]}, queue.rows[2:]) == ({1, 3}, (2, 0))


def test_of_one_of_several_classes_the_first_two_are_compared(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    lines = [
        {"id": f"row-{row}", "row": row, "probability_cat": cat, "probability_dog": dog, "class": "cat"}
        for row, (cat, dog) in enumerate([(0.9, 0.1), (0.4, 0.38), (0.6, 0.3)])
    ]
    (tmp_path / "shards" / "000000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert queue_from_scores(tmp_path, make_pool(texts(3))).rows == (1, 2, 0)


def test_rows_without_ids_are_found_by_their_numbers(tmp_path):
    pool = make_pool([Example(None, f"text {number}") for number in range(3)])
    pool.positions = np.array([0, 2, 3])  # row 1 of the data could not be read
    queue = queue_from_scores(scores_in(tmp_path, [scored("2", 2, 0.4), scored("3", 3, 0.3)]), pool)
    assert queue.rows == (2, 1)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"cannot be read \(No such file or directory\); expected the folder that score"
    ):
        queue_from_scores(tmp_path, make_pool(texts(3)))
    with pytest.raises(DataError, match="none of its scores is of a row of the data, which has 3 rows"):
        queue_from_scores(scores_in(tmp_path, [scored("x", 77, 0.4)]), make_pool(texts(3)))


def test_a_run_of_scoring_is_queued(tmp_path, tiny_classifier):
    rows = texts(8)
    score(tiny_classifier, rows, tmp_path / "scores", progress=False)
    queue = queue_from_scores(tmp_path / "scores", make_pool(rows))
    assert ({*queue.rows}, queue.missing) == ({*range(8)}, 0)
    probabilities = tiny_classifier.predict_proba(rows)[:, 1][[*queue.rows]]
    sure = abs(probabilities - tiny_classifier.threshold)
    for side in (probabilities >= tiny_classifier.threshold, probabilities < tiny_classifier.threshold):
        assert sure[side].tolist() == sorted(sure[side])
