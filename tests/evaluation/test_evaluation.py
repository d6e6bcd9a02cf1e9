"""Evaluation: what the dictionary holds, in which order, how soft it is, and which examples are refused."""

import json
import math
from datetime import UTC, datetime

import numpy as np
import pytest

from qwen_vl_classifier import Classifier, Example, FeatureStore, Tap
from qwen_vl_classifier.config.evaluate import EvaluateConfig
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.evaluation.checks import CHECKS
from qwen_vl_classifier.evaluation.evaluation import evaluate, telling_rows
from qwen_vl_classifier.evaluation.metrics import compute_metrics
from qwen_vl_classifier.evaluation.terminal import evaluation_table
from qwen_vl_classifier.evaluation.verdict import notes_of
from qwen_vl_classifier.training.overlap import row_hashes, sketch

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = EvaluateConfig(resamples=100, slice_rows=3)
KEYS = [
    "schema_version",
    "sentence",
    "notes",
    "measured",
    "rows",
    "metrics",
    "baselines",
    "confusion",
    "classifier",
    "curves",
    "thresholds",
    "slices",
    "checks",
    "data",
    "examples",
    "predictions",
]


@pytest.fixture(scope="module")
def examples(scene_rows):
    return [
        Example(row.image, row.text, row.label, id=f"row {number}", fields=row.fields)
        for number, row in enumerate(scene_rows[:24])
    ]


@pytest.fixture(scope="module")
def evaluation(tiny_classifier, examples):
    return evaluate(tiny_classifier, examples, config=EvaluateConfig(resamples=100, slice_rows=3, slice_by="kind"))


def test_an_evaluation_holds_everything_in_order(evaluation, tiny_classifier, examples):
    probabilities = tiny_classifier.predict_proba(examples)[:, 1]
    labels = np.array([example.label for example in examples])
    assert list(evaluation) == KEYS
    assert evaluation["schema_version"] == 2
    assert evaluation["measured"]["data"] is None
    assert datetime.fromisoformat(evaluation["measured"]["date"]).tzinfo is UTC
    predictions = evaluation["predictions"]
    assert [row["row"] for row in predictions] == list(range(len(examples)))
    for name in ("id", "text", "label"):
        assert [row[name] for row in predictions] == [getattr(example, name) for example in examples]
    assert [row["probability"] for row in predictions] == probabilities.tolist()
    assert [row["group"] for row in predictions] == [number // 2 for number in range(24)]
    assert {row["image"] for row in predictions} == {None}  # these pictures are no files
    values = {name: entry["value"] for name, entry in evaluation["metrics"].items()}
    assert values == compute_metrics(labels, probabilities)
    assert evaluation["rows"] == {
        "total": 24,
        "positives": int(labels.sum()),
        "negatives": 24 - int(labels.sum()),
        "groups": 12,
        "with_picture": 24,
        "abstained": 0,
    }
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation


def test_slices_checks_and_notes_are_there(evaluation):
    assert {entry["name"] for entry in evaluation["slices"]} >= {"kind", "text length"}
    assert [evaluation["checks"][name]["rows"] for name in CHECKS] == [24] * 3
    assert any("12 groups" in note for note in evaluation["notes"])
    assert "on" in evaluation["sentence"]


def test_of_an_untrained_head_it_is_said_that_it_does_not_use_the_pictures(evaluation):
    assert evaluation["checks"]["images_permuted"]["free"]
    assert "It is not shown to use the pictures: " in evaluation["sentence"]


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
        training={
            "method": "probe",
            "rows_sketch": sketch(row_hashes(examples[:5])),
            "training_rows": 5,
            "score_distribution": {"edges": [middle], "counts": [25, 75]},
        },
    )
    evaluation = evaluate(classifier, examples, config=QUICK)
    assert evaluation["classifier"] == {
        "backbone": "builtin:tiny",
        "family": "qwen2_5_vl",
        "layers": "6: full attention",
        "fingerprint": tiny_classifier.backbone.fingerprint,
        "tap": "mean:-1",
        "head": "mlp",
        "label_names": ["off", "on"],
        "threshold": middle,
        "temperature": 1.0,
        "isotonic": False,
        "abstention": [middle - 1e-9, middle + 1e-9],
        "training": {"method": "probe", "training_rows": "5"},
    }
    assert middle in [line["threshold"] for line in evaluation["thresholds"]]
    decisions = [row["decision"] for row in evaluation["predictions"]]
    assert decisions == [prediction.decision for prediction in classifier.decide(examples)]
    assert {"yes", "no"} <= set(decisions)
    assert evaluation["data"]["trained_on"]["shown"] == [0, 1, 2, 3, 4]
    assert any("at least 5 of 24 rows were in the training data" in note for note in evaluation["notes"])
    drift = evaluation["score_drift"]
    assert drift["psi"] == pytest.approx(0.25 * math.log(2) - 0.25 * math.log(0.5 / 0.75))  # half of the rows each
    assert drift["psi"] < drift["chance"], "24 rows may differ so much by chance"
    assert drift["training_rows"] == 100
    assert not any("differ from those in training" in note for note in evaluation["notes"])


@pytest.mark.parametrize(("psi", "chance", "size"), [(0.3, 0.2, "large"), (0.2, 0.1, "moderate"), (0.05, 0.01, None)])
def test_a_change_of_scores_that_chance_does_not_explain_is_noted(evaluation, psi, chance, size):
    assert "score_drift" not in evaluation
    drift = {"psi": psi, "chance": chance, "training_rows": 1000.0}
    notes = [note for note in notes_of(evaluation | {"score_drift": drift}) if "differ from those in training" in note]
    assert len(notes) == (size is not None)
    assert all(f"a {size} change: population stability index {psi:.2f}" in note for note in notes)


def test_a_store_spares_the_second_pass(tiny_classifier, examples, tmp_path, monkeypatch):
    store = FeatureStore(tmp_path)
    first = evaluate(tiny_classifier, examples, config=QUICK, store=store)
    monkeypatch.setattr(tiny_classifier.backbone, "encode_prepared", lambda *_, **__: pytest.fail("encoded again"))
    again = evaluate(tiny_classifier, examples, config=QUICK, store=store)
    assert again == first | {"measured": again["measured"]}  # at another time


def test_checks_can_be_left_out(tiny_classifier, examples, monkeypatch):
    passes = []
    encode = tiny_classifier.backbone.encode_prepared
    monkeypatch.setattr(
        tiny_classifier.backbone, "encode_prepared", lambda *a, **k: passes.append(len(a[0])) or encode(*a, **k)
    )
    evaluation = evaluate(tiny_classifier, examples, config=EvaluateConfig(resamples=10, checks=False))
    assert sum(passes) == 24
    assert {check["reason"] for check in evaluation["checks"].values()} == {"switched off"}
    assert evaluation["sentence"].startswith("Right on ")


def test_training_data_is_looked_for(tiny_classifier, examples):
    evaluation = evaluate(tiny_classifier, examples, config=QUICK, training=examples[:3])
    assert evaluation["data"]["exact_duplicates"]["training"]["total"] == 3
    assert evaluation["data"]["pictures_in_training"]["total"] == 4
    assert any("pictures of 4 rows are in the training data" in note for note in evaluation["notes"])


@pytest.mark.parametrize(
    "rows",
    [
        [Example(None, "alone", 1)],
        [Example(None, f"text {number}", number % 2) for number in range(10)],
        [Example(None, f"text {number}", 0) for number in range(4)],
        [Example(None, "same", 1)] * 3,
    ],
    ids=["one row", "no pictures", "one class", "one text"],
)
def test_little_data_is_evaluated_softly(tiny_classifier, rows):
    evaluation = evaluate(tiny_classifier, rows, config=QUICK)
    assert evaluation["checks"]["images_permuted"]["reason"] == "no row has a picture"
    assert (evaluation["metrics"]["auroc"]["value"] is None) == (len({row.label for row in rows}) == 1)
    if evaluation["metrics"]["auroc"]["value"] is None:
        assert "this says nothing about the other class" in evaluation["sentence"]
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation
    assert max(map(len, evaluation_table(evaluation).splitlines())) <= 80


def test_the_telling_rows_come_in_order():
    found = telling_rows(np.array([1, 0, 1, 0]), np.array([0.1, 0.8, 0.4, 0.45]), 0.5)
    assert found == {"wrong": [0, 1, 2], "uncertain": [3, 2]}, "0.1 and 0.8 are not close to the threshold"
    many = telling_rows(np.zeros(200, dtype=np.int64), np.linspace(0.6, 0.9, 200), 0.5)
    assert (len(many["wrong"]), many["wrong"][0]) == (48, 199)


def test_no_examples_are_refused(tiny_classifier):
    with pytest.raises(DataError, match="give at least one"):
        evaluate(tiny_classifier, [])


def test_examples_without_label_are_refused_before_any_pass(tiny_classifier, monkeypatch):
    monkeypatch.setattr(tiny_classifier.backbone, "encode_prepared", lambda *_, **__: pytest.fail("encoded"))
    rows = [Example(None, "a", 1), Example(None, "b"), Example(None, "c", 0), Example(None, "d")]
    with pytest.raises(DataError, match=r"^2 of 4 evaluation examples have no label, the first is row 1; ") as caught:
        evaluate(tiny_classifier, rows)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_nowhere_is_refused_before_any_pass(tiny_classifier, examples, monkeypatch):
    monkeypatch.setattr(tiny_classifier.backbone, "encode_prepared", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(DataError, match="no row has a column 'sort'"):
        evaluate(tiny_classifier, examples, config=EvaluateConfig(slice_by="sort"))


def test_soft_labels_are_for_training_alone(tiny_classifier):
    with pytest.raises(DataError, match=r"^label 0.7 among the evaluation examples, in row 1; .* training only"):
        evaluate(tiny_classifier, [Example(None, "a", 1), Example(None, "b", 0.7)])
