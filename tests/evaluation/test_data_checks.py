"""Data checks: duplicates, contradictions, rows seen in training, and labels that someone flipped."""

import io

import numpy as np
import pytest

from qwen_vl_classifier import Example
from qwen_vl_classifier.evaluation.data_checks import check_data, label_issues, trained_on
from qwen_vl_classifier.scenes.statements import scene_examples
from qwen_vl_classifier.training import overlap
from qwen_vl_classifier.training.overlap import row_hashes, sketch


@pytest.fixture(scope="module")
def scenes():
    return [picture for picture, _, _ in scene_examples("test", scenes=6)]


def check(examples, training=None, record=None):
    labels = np.array([example.label for example in examples])
    return check_data(examples, labels, labels * 0.8 + 0.1, training=training, record=record or {})


def smaller(picture):
    buffer = io.BytesIO()
    picture.resize((picture.width // 2, picture.height // 2)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def test_clean_data_is_clean(scenes):
    found = check([Example(picture, "x", row % 2) for row, picture in enumerate(scenes)])
    nothing = {"total": 0, "shown": []}
    assert found["exact_duplicates"] == {"within": nothing, "training": None}
    assert found["near_duplicates"] == {"within": nothing, "training": None, "pictures": 6, "compared": 6}
    assert found["label_conflicts"] == {"within": nothing, "training": None}
    assert found["pictures_in_training"] is None
    assert not found["trained_on"]["known"]


def test_repeated_rows_and_contradictions_within(scenes, tmp_path):
    path = tmp_path / "a.png"
    scenes[0].save(path)
    rows = [Example(path, "x", 1), Example(path.read_bytes(), "x", 1), Example(path, "y", 0), Example(path, "x", 0)]
    found = check(rows)
    assert found["exact_duplicates"]["within"]["shown"] == [{"row": 1, "other": 0}, {"row": 3, "other": 0}]
    assert found["label_conflicts"]["within"]["shown"] == [
        {"row": 0, "other": 3, "label": 1, "other_label": 0},
        {"row": 1, "other": 3, "label": 1, "other_label": 0},
        {"row": 3, "other": 0, "label": 0, "other_label": 1},
    ]


def test_training_data_is_looked_through(scenes):
    rows = [Example(scenes[0], "x", 1), Example(scenes[1], "x", 0), Example(scenes[2], "x", 0), Example(None, "x", 1)]
    training = [
        Example(scenes[3], "x", 0.7),
        Example(scenes[0], "x", 0),
        Example(scenes[1], "other", 1),
        Example(smaller(scenes[2]), "x", 1),
    ]
    found = check(rows, training)
    assert found["exact_duplicates"]["training"]["shown"] == [{"row": 0, "other": 1}]
    assert found["pictures_in_training"]["shown"] == [{"row": 0, "other": 1}, {"row": 1, "other": 2}]
    assert [(pair["row"], pair["other"]) for pair in found["near_duplicates"]["training"]["shown"]] == [(2, 3)]
    assert found["label_conflicts"]["training"]["shown"] == [{"row": 0, "other": 1, "label": 1, "other_label": 0}]


def test_one_of_several_pictures_that_was_trained_on_is_found(scenes):
    found = check([Example((scenes[0], scenes[1]), "x", 1)], [Example(scenes[3], "y", 0), Example(scenes[1], "y", 0)])
    assert found["pictures_in_training"]["shown"] == [{"row": 0, "other": 1}]


def test_pictures_that_look_alike_within(scenes):
    rows = [Example(scenes[0], "x", 1), Example(scenes[1], "x", 0), Example((scenes[2], smaller(scenes[0])), "y", 0)]
    (pair,) = check(rows)["near_duplicates"]["within"]["shown"]
    assert (pair["row"], pair["other"]) == (2, 0)
    assert 0 <= pair["distance"] <= 4


def test_no_more_than_a_hundred_are_shown_and_all_counted():
    found = check([Example(None, "same", row % 2) for row in range(300)])
    assert found["exact_duplicates"]["within"]["total"] == 299
    assert len(found["exact_duplicates"]["within"]["shown"]) == 100
    assert found["label_conflicts"]["within"]["total"] == 300


def test_the_search_for_near_duplicates_is_bounded_and_says_so(monkeypatch, scenes):
    monkeypatch.setattr(overlap, "MOST_PICTURES", 3)
    found = check([Example(picture, "x", 1) for picture in scenes])
    assert (found["near_duplicates"]["pictures"], found["near_duplicates"]["compared"]) == (6, 3)


def rows_of_text(first, last):
    return [Example(None, f"text {number}", number % 2) for number in range(first, last)]


def test_a_small_training_set_is_known_whole():
    record = {"rows_sketch": sketch(row_hashes(rows_of_text(0, 40))), "training_rows": 40}
    found = trained_on([*row_hashes(rows_of_text(30, 50))], record)
    assert (found["known"], found["total"], found["shown"]) == (True, 10, [*range(10)])
    assert found["estimated_share"] == 0.5
    assert found["note"] == "at least 10 of 20 rows were in the training data, an estimated 50%"


def test_of_a_large_one_the_sketch_tells_a_share():
    record = {"rows_sketch": sketch(row_hashes(rows_of_text(0, 4_000))), "training_rows": 3_200, "held_out_rows": 800}
    found = trained_on([*row_hashes(rows_of_text(3_000, 5_000))], record)
    assert 4 <= found["total"] <= 30
    assert found["estimated_share"] == pytest.approx(0.5, abs=0.25)
    assert trained_on([*row_hashes(rows_of_text(5_000, 6_000))], record)["estimated_share"] == 0.0


def test_what_the_start_of_a_finetuned_classifier_saw_counts():
    start = {"rows_sketch": sketch(row_hashes(rows_of_text(0, 10))), "training_rows": 10}
    record = {"rows_sketch": sketch(row_hashes(rows_of_text(10, 20))), "training_rows": 10, "start": start}
    assert trained_on([*row_hashes(rows_of_text(0, 20))], record)["total"] == 20


@pytest.mark.parametrize("record", [{}, {"rows_sketch": []}, {"rows_sketch": "abc", "start": "x"}])
def test_a_record_without_sketch_says_nothing(record):
    found = trained_on(["0" * 16], record)
    assert (found["known"], found["estimated_share"]) == (False, None)


def test_flipped_labels_are_found():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)
    probabilities = np.clip(rng.normal(0.15 + 0.7 * truth, 0.08), 0.01, 0.99)
    flipped = np.array([3, 77, 200, 311])
    labels = truth.copy()
    labels[flipped] = 1 - labels[flipped]
    found = label_issues(labels, probabilities)
    # A flipped row that is less sure than its class is on average stays unnoticed: the method is cautious.
    assert {entry["row"] for entry in found["shown"]} == {3, 200, 311}
    confidence = [abs(1 - entry["label"] - entry["probability"]) for entry in found["shown"]]
    assert confidence == sorted(confidence)


def test_label_issues_equal_the_definition_row_by_row():
    rng = np.random.default_rng(1)
    labels, probabilities = rng.integers(0, 2, 200), rng.random(200)
    thresholds = [(1 - probabilities)[labels == 0].mean(), probabilities[labels == 1].mean()]
    expected = set()
    for row, (label, p) in enumerate(zip(labels, probabilities, strict=True)):
        reached = [k for k in (0, 1) if (1 - p, p)[k] >= thresholds[k]]
        if reached and max(reached, key=lambda k: (1 - p, p)[k]) != label:
            expected.add(row)
    found = label_issues(labels, probabilities)
    assert {entry["row"] for entry in found["shown"]} == expected
    assert found["total"] == len(expected) > 10


def test_too_few_rows_of_a_class_say_why():
    found = label_issues(np.array([0, 0, 0, 0, 0, 1]), np.linspace(0, 1, 6))
    assert (found["reason"], found["total"]) == ("fewer than 5 rows of a class", 0)
    assert label_issues(np.zeros(9, dtype=np.int64), np.linspace(0, 1, 9))["reason"]


def test_a_classifier_at_chance_has_no_say_about_labels():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 2, 300), rng.uniform(0.45, 0.55, 300)
    assert label_issues(labels, probabilities)["total"] > 100
    found = label_issues(labels, probabilities, beats_guessing=False)
    assert (found["total"], found["shown"]) == (0, [])
    assert "not shown to be better than guessing" in found["reason"]
