"""Evaluation: what the dictionary holds, in which order, and which examples are refused."""

import json

import numpy as np
import pytest

from qwen_vl_classifier import Classifier, Example, FeatureStore, Tap
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.evaluation.evaluate import evaluate
from qwen_vl_classifier.evaluation.metrics import compute_metrics


@pytest.fixture(scope="module")
def examples(scene_rows):
    return [Example(row.image, row.text, row.label, id=f"row {number}") for number, row in enumerate(scene_rows[:12])]


def test_an_evaluation_holds_metrics_and_predictions_in_order(tiny_classifier, examples):
    evaluation = evaluate(tiny_classifier, examples)
    probabilities = tiny_classifier.predict_proba(examples)[:, 1]
    assert evaluation["schema_version"] == 1
    assert [row["row"] for row in evaluation["predictions"]] == list(range(len(examples)))
    assert [row["id"] for row in evaluation["predictions"]] == [example.id for example in examples]
    assert [row["text"] for row in evaluation["predictions"]] == [example.text for example in examples]
    assert [row["label"] for row in evaluation["predictions"]] == [example.label for example in examples]
    assert [row["probability"] for row in evaluation["predictions"]] == probabilities.tolist()
    labels = np.array([example.label for example in examples])
    assert evaluation["metrics"] == compute_metrics(labels, probabilities)
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation


def test_an_evaluation_says_how_the_classifier_decides(tiny_classifier, examples):
    middle = float(np.median(tiny_classifier.predict_proba(examples)[:, 1]))
    classifier = Classifier(
        tiny_classifier.backbone,
        Tap(-1, "mean"),
        tiny_classifier.head,
        tiny_classifier.spec,
        threshold=middle,
        abstention=(middle - 1e-9, middle + 1e-9),
        label_names=("off", "on"),
    )
    evaluation = evaluate(classifier, examples)
    assert evaluation["classifier"] == {
        "backbone": "builtin:tiny",
        "tap": "mean:-1",
        "head": "mlp",
        "label_names": ["off", "on"],
        "threshold": middle,
        "temperature": 1.0,
    }
    assert evaluation["metrics"]["threshold"] == middle
    decisions = [row["decision"] for row in evaluation["predictions"]]
    assert decisions == [prediction.decision for prediction in classifier.decide(examples)]
    assert {"yes", "no"} <= set(decisions)


def test_a_store_spares_the_second_pass(tiny_classifier, examples, tmp_path, monkeypatch):
    store = FeatureStore(tmp_path)
    first = evaluate(tiny_classifier, examples, store=store)
    monkeypatch.setattr(tiny_classifier.backbone, "encode_prepared", lambda *_, **__: pytest.fail("encoded again"))
    assert evaluate(tiny_classifier, examples, store=store) == first


def test_no_examples_are_refused(tiny_classifier):
    with pytest.raises(DataError, match="at least one"):
        evaluate(tiny_classifier, [])


def test_examples_without_label_are_refused_before_any_pass(tiny_classifier, monkeypatch):
    monkeypatch.setattr(tiny_classifier.backbone, "encode_prepared", lambda *_, **__: pytest.fail("encoded"))
    rows = [Example(None, "a", 1), Example(None, "b"), Example(None, "c", 0), Example(None, "d")]
    with pytest.raises(DataError, match=r"^2 of 4 examples have no label, first at row 1; ") as caught:
        evaluate(tiny_classifier, rows)
    assert "\n" not in str(caught.value)


def test_soft_labels_are_for_training_alone(tiny_classifier):
    with pytest.raises(DataError, match=r"^1 of 2 examples have a label such as 0.7, first at row 1; "):
        evaluate(tiny_classifier, [Example(None, "a", 1), Example(None, "b", 0.7)])
