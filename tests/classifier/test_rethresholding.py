"""Another threshold: the same probabilities, and nothing in the record that held for the threshold before only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen_vl_classifier import Classifier
from qwen_vl_classifier.classifier.artifact import read_manifest
from qwen_vl_classifier.classifier.rethresholding import copy_at_threshold, threshold_was_set
from qwen_vl_classifier.errors import ArtifactError, ConfigError, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")

MEASURED = {"mean": 0.8, "low": 0.7, "high": 0.9}
UNKNOWN = {"mean": None, "low": None, "high": None}
RECORD = {
    "method": "probe",
    "estimate": {"accuracy": MEASURED, "auroc": MEASURED},
    "estimate_new_texts": {"accuracy": MEASURED, "auroc": MEASURED},
    "threshold": {"objective": "accuracy", "threshold": 0.5},
    "abstention": {"band": [0.4, 0.6]},
}


@pytest.fixture(scope="module")
def classifier(tiny_backbone) -> Classifier:
    made = Classifier.zero_shot(tiny_backbone)
    made.abstention, made.training = (0.4, 0.6), dict(RECORD)
    return made


@pytest.fixture(scope="module")
def saved(classifier, tmp_path_factory) -> Path:
    return classifier.save(tmp_path_factory.mktemp("saved") / "classifier")


def test_probabilities_stay_and_labels_follow_the_new_threshold(classifier, scene_rows):
    rows = scene_rows[:12]
    probability = classifier.predict_proba(rows)[:, 1]
    threshold = float(np.median(probability))
    made = classifier.with_threshold(threshold)
    np.testing.assert_array_equal(made.predict_proba(rows)[:, 1], probability)
    np.testing.assert_array_equal(made.predict(rows), probability >= threshold)
    assert (classifier.threshold, classifier.abstention) == (0.5, (0.4, 0.6))


def test_the_record_keeps_only_what_holds_at_any_threshold(classifier):
    made = classifier.with_threshold(0.9)
    assert made.abstention is None
    assert "abstention" not in made.training
    assert made.training["threshold"] == {"objective": "set by hand", "threshold": 0.9}
    for name in ("estimate", "estimate_new_texts"):
        assert made.training[name] == {"accuracy": UNKNOWN, "auroc": MEASURED}
    assert threshold_was_set(made.training)
    assert classifier.training == RECORD
    assert not threshold_was_set(RECORD)


def test_an_objective_is_reached_on_the_rows_that_it_was_given(classifier, scene_rows):
    labels = np.array([example.label for example in scene_rows])
    made = classifier.with_objective("recall >= 0.9", scene_rows)
    assert made.predict(scene_rows)[labels == 1].mean() >= 0.9
    assert made.training["threshold"] == {"objective": "recall>=0.9", "threshold": made.threshold}
    assert made.threshold > classifier.with_objective("recall>=1", scene_rows).threshold


@pytest.mark.parametrize("threshold", [90, -0.1, float("nan"), "0.9", True])
def test_a_threshold_that_is_no_probability_is_refused(classifier, saved, tmp_path, threshold):
    with pytest.raises(ConfigError, match="expected a number from 0 to 1"):
        classifier.with_threshold(threshold)
    with pytest.raises(ConfigError, match="expected a number from 0 to 1"):
        copy_at_threshold(saved, tmp_path / "copy", threshold)
    assert not (tmp_path / "copy").exists()


def test_an_objective_is_refused_before_anything_is_read(classifier, scene_rows):
    with pytest.raises(ConfigError, match="objective"):
        classifier.with_objective("best", [{"image": "no such file.png", "text": "", "label": 1}])
    with pytest.raises(TrainingError, match="none of 4 rows has label 1"):
        classifier.with_objective("f1", [row for row in scene_rows if row.label == 0][:4])


def test_a_copy_of_a_folder_is_what_the_classifier_would_save(classifier, saved, tiny_backbone, tmp_path):
    (saved / "evaluation.json").write_text("{}")  # of the threshold before
    copy = copy_at_threshold(saved, tmp_path / "copy", 0.9)
    expected = classifier.with_threshold(0.9).save(tmp_path / "expected")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }
    assert Classifier.load(copy, backbone=tiny_backbone).threshold == 0.9
    assert read_manifest(saved).threshold == 0.5


def test_a_copy_takes_along_what_fine_tuning_made(saved, tmp_path):
    source = tmp_path / "tuned"
    copy_at_threshold(saved, source, 0.5)
    content = json.loads((source / "classifier.json").read_text())
    content["backbone"] |= {"finetuned": True, "adapter": True}
    (source / "classifier.json").write_text(json.dumps(content))
    for name in ("backbone", "adapter"):
        (source / name).mkdir()
        (source / name / "weights").write_text(name)
    copy = copy_at_threshold(source, tmp_path / "copy", 0.2)
    assert [(copy / name / "weights").read_text() for name in ("backbone", "adapter")] == ["backbone", "adapter"]
    assert copy_at_threshold(copy, copy, 0.3) == copy  # in place, as a user may want it
    assert (copy / "adapter" / "weights").read_text() == "adapter"


def test_a_copy_replaces_nothing_but_a_classifier(saved, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not a saved classifier"):
        copy_at_threshold(saved, tmp_path, 0.9)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
