"""Several labels of the same rows: each as `train` learns it alone; one of several classes sums to 1."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Example, FeatureStore, Panel, TrainConfig, train, train_panel
from qwen_vl_classifier.classifier.calibration import fit_one_of_temperature
from qwen_vl_classifier.classifier.probabilities import log_loss_of_classes, one_of_probabilities
from qwen_vl_classifier.errors import ConfigError, DataError
from qwen_vl_classifier.training.probe.one_of_fit import ClassRows, cross_fitted, one_of_estimate
from qwen_vl_classifier.training.probe.read_rows import RowReader

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(taps="mean:2,last:-1", heads="linear,calibrated")
LINEAR = TrainConfig(taps="last:-1", heads="linear")
NAMES = ["match", "sparse", "noise"]


@pytest.fixture(scope="module")
def rows(scene_rows) -> list[Example]:
    """Rows with three labels, one of them on every other row and on none of the last ten."""
    return [
        replace(
            row,
            label=None,
            fields={
                "match": row.label,
                "sparse": row.label if number % 2 and number < 70 else None,
                "noise": ("no", "yes")[number * 7 % 3 == 0],
                "kind": row.fields["kind"],
            },
        )
        for number, row in enumerate(scene_rows)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    """Keeps features, so that runs on some of the rows see the same numbers."""
    return FeatureStore(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def result(rows, tiny_backbone, store):
    return train_panel(rows, labels=NAMES, backbone=tiny_backbone, config=CONFIG, store=store, progress=False)


@pytest.fixture(scope="module")
def classes(rows, tiny_backbone, store):
    """One of five classes, which are words in a column."""
    return train_panel(
        rows, one_of=True, label_column="kind", backbone=tiny_backbone, config=LINEAR, store=store, progress=False
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_label_is_what_train_makes_of_its_rows_alone(result, rows, tiny_backbone, store, name):
    words = {"no": 0, "yes": 1}
    own = [(row, words.get(row.fields[name], row.fields[name])) for row in rows if row.fields[name] is not None]
    alone = train(
        [replace(row, label=label) for row, label in own],
        backbone=tiny_backbone,
        config=CONFIG,
        store=store,
        label_names=(f"not {name}", name),
        progress=False,
    )
    found = result.results[name]
    assert found.table == alone.table
    assert found.classifier.training == alone.classifier.training
    assert len(own) == found.classifier.training["training_rows"] == (35 if name == "sparse" else 80)
    torch.testing.assert_close(
        dict(found.classifier.head.state_dict()), dict(alone.classifier.head.state_dict()), rtol=0, atol=0
    )
    for attribute in ("tap", "spec", "threshold", "temperature", "isotonic", "label_names", "average"):
        assert getattr(found.classifier, attribute) == getattr(alone.classifier, attribute)


def test_rows_are_read_in_one_pass(rows, tiny_backbone, store, monkeypatch):
    calls = []
    read = RowReader.read

    def counting(reader, examples, bad):
        calls.append(len(examples))
        return read(reader, examples, bad)

    monkeypatch.setattr(RowReader, "read", counting)
    unlabelled = [replace(row, fields={}) for row in rows[:5]]
    some = [*unlabelled, *rows[:30]]
    found = train_panel(
        some, labels=["match", "noise"], backbone=tiny_backbone, config=LINEAR, store=store, progress=False
    )
    assert calls == [30]  # a row without any label is not encoded
    assert found.panel.training["notes"] == ["5 of 35 training rows have no label and are not used"]


def test_the_panel_is_saved_and_answers_as_before(result, rows, tiny_backbone, store, tmp_path):
    panel = result.panel
    assert panel.names == tuple(NAMES)
    loaded = Panel.load(panel.save(tmp_path / "panel"), device="cpu")
    assert loaded.training == panel.training
    np.testing.assert_array_equal(loaded.predict_proba(rows[:6]), panel.predict_proba(rows[:6]))
    assert panel.predict(rows[:6]).shape == (6, 3)
    assert np.mean(panel.predict(rows)[:, 0] == [row.fields["match"] for row in rows]) > 0.9


def test_the_result_is_told_in_80_columns(result):
    text = str(result)
    assert max(map(len, text.splitlines())) <= 80
    assert "labels: right more often than guessing" in text
    assert [line.split()[0] for line in text.splitlines()[-3:]] == NAMES
    assert repr(result) == "<PanelTrainResult: 3 labels>"
    assert "noise" in result._repr_html_()
    assert result.estimate is None


def test_a_hundred_labels_stay_readable(result):
    many = {f"label number {number} of a very long name": result.results["match"] for number in range(99)}
    text = str(replace(result, results={**many, "noise": result.results["noise"]}))
    assert max(map(len, text.splitlines())) <= 80
    assert "and 90 more with a higher AUROC" in text
    assert len(text.splitlines()) < 30
    assert text.splitlines()[-11].startswith("noise")


def test_one_of_several_classes_sums_to_one(classes, rows):
    panel = classes.panel
    assert panel.one_of
    assert panel.names == ("at_least", "exactly", "existence", "relation", "size")
    assert panel.classifiers[0].label_names == ("not at_least", "at_least")
    np.testing.assert_allclose(panel.predict_proba(rows).sum(axis=1), 1, rtol=0, atol=1e-12)
    right = [panel.names[number] == row.fields["kind"] for number, row in zip(panel.predict(rows), rows, strict=True)]
    assert np.mean(right) > 0.8
    record = panel.training["one_of"]
    assert panel.temperature == record["temperature"]
    estimate = classes.estimate
    for name in ("accuracy", "macro_f1", "log_loss"):
        assert estimate[name]["low"] <= estimate[name]["mean"] <= estimate[name]["high"]
    assert (estimate["rows"], estimate["groups"], estimate["few"]) == (80, 40, False)
    assert estimate["accuracy"]["low"] > estimate["majority_accuracy"]
    text = str(classes)
    assert text.startswith("Learned something: accuracy ")
    assert max(map(len, text.splitlines())) <= 80
    assert repr(classes).startswith("<PanelTrainResult: one of 5 classes, accuracy ")


def test_validation_rows_give_the_estimate_of_classes(rows, tiny_backbone, store):
    found = train_panel(
        rows[:50],
        rows[50:],
        one_of=True,
        label_column="kind",
        backbone=tiny_backbone,
        config=replace(LINEAR, objective="f1"),
        store=store,
        progress=False,
    )
    assert (found.estimate["method"], found.estimate["rows"]) == ("held-out rows", 30)
    right = [found.panel.names[number] for number in found.panel.predict(rows[50:])]
    expected = np.mean([name == row.fields["kind"] for name, row in zip(right, rows[50:], strict=True)])
    assert found.estimate["accuracy"]["mean"] == pytest.approx(expected)
    assert any("objective='f1' sets the threshold" in note for note in found.panel.training["notes"])
    assert {result.validation_rows for result in found.results.values()} == {30}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "no labels"),
        ({"labels": "match"}, ConfigError, "expected a list of names"),
        ({"labels": []}, ConfigError, "no labels; expected at least one"),
        ({"labels": ["match", "match"]}, ConfigError, "two labels are called 'match'"),
        ({"labels": ["match"], "one_of": True}, ConfigError, "at least two to choose from"),
        ({"labels": ["noise", "matsh"]}, DataError, "did you mean 'match'"),
        ({"labels": ["match", "never"]}, DataError, r"too few rows to learn 'never' \(0 yes, 80 no\); .* labels="),
        ({"labels": ["never", "twice"]}, DataError, r"'never' \(0 yes, 80 no\), 'twice' \(1 yes, 79 no\)"),
        ({"labels": ["kind"]}, DataError, "80 of 80 training rows cannot be used"),
        ({"labels": ["empty"]}, DataError, "none of the 80 training rows has a label"),
        ({"one_of": True, "config": TrainConfig(target_error_rate=0.1)}, ConfigError, "never abstains"),
        (
            {"labels": ["match"], "config": replace(LINEAR, group_by="one")},
            DataError,
            "label 'match': 80 training examples in 1 groups",
        ),
    ],
)
def test_what_cannot_be_trained_is_named(rows, tiny_backbone, store, options, error, message):
    more = [
        replace(row, fields={**row.fields, "never": 0, "twice": int(not number), "empty": "", "one": 1})
        for number, row in enumerate(rows)
    ]
    with pytest.raises(error, match=message):
        train_panel(more, **{"config": CONFIG, **options}, backbone=tiny_backbone, store=store, progress=False)


def test_rows_that_cannot_be_used_are_left_out(rows, tiny_backbone, store):
    some = [*rows[:40], replace(rows[40], fields={"match": "perhaps"}), replace(rows[41], image="gone.png")]
    config = replace(LINEAR, max_errors=2)
    found = train_panel(some, labels=["match"], backbone=tiny_backbone, config=config, store=store, progress=False)
    (left_out,) = found.panel.training["left_out"]
    assert left_out["total"] == 2
    assert "perhaps" in left_out["lines"][0]
    assert found.panel.training["training_rows"] == 40
    assert "Note: 2 of 42 training rows cannot be used" in str(found)


def noisy_classes(count: int = 300) -> ClassRows:
    """Return one-against-rest answers that are too sure."""
    rng = np.random.default_rng(5)
    true = rng.normal(size=(count, 4)) * 1.5
    chances = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
    classes = np.array([rng.choice(4, p=one) for one in chances])
    sure = chances**3 / (chances**3 + (1 - chances) ** 3)
    return ClassRows(sure, classes, np.ones(count), np.arange(count))


def test_the_temperature_lowers_the_log_loss():
    rows = noisy_classes()
    temperature = fit_one_of_temperature(rows.shares, rows.classes)
    assert temperature > 1.5
    losses = {t: log_loss_of_classes(one_of_probabilities(rows.shares, t), rows.classes) for t in (1.0, temperature)}
    assert cross_fitted(rows, 0).log_loss < losses[1.0]
    assert losses[temperature] < losses[1.0]
    few = fit_one_of_temperature(rows.shares[:2], rows.classes[:2])
    assert abs(np.log(few)) < abs(np.log(temperature))


def test_figures_of_classes_are_their_definitions():
    from sklearn.metrics import f1_score

    rows = cross_fitted(noisy_classes(), 0)
    found = one_of_estimate(rows, list("abcd"), held_out=True, seed=0)
    chosen = rows.shares.argmax(axis=1)
    assert found["macro_f1"]["mean"] == pytest.approx(f1_score(rows.classes, chosen, average="macro"))
    assert found["accuracy"]["mean"] == pytest.approx(np.mean(chosen == rows.classes))
    assert found["log_loss"]["mean"] == pytest.approx(rows.log_loss)
    wider = one_of_estimate(rows, list("abcd"), held_out=False, seed=0)
    for name in ("accuracy", "macro_f1", "log_loss"):
        assert wider[name]["low"] < found[name]["low"] < found[name]["mean"] < found[name]["high"]


def test_a_few_right_answers_are_no_proof():
    right = ClassRows(np.eye(3)[[0, 1, 2] * 3], np.array([0, 1, 2] * 3), np.ones(9), np.arange(9))
    found = one_of_estimate(right, list("abc"), held_out=True, seed=0)
    assert found["macro_f1"]["mean"] == 1
    assert found["macro_f1"]["low"] < 0.8
    assert found["few"]


def test_rows_that_were_drawn_at_random_are_measured_and_the_result_says_so(rows, tiny_backbone, store):
    drawn = [
        replace(row, fields={**row.fields, "sampled": ("random", "uncertain")[number % 2]})
        for number, row in enumerate(rows)
    ]
    config = replace(LINEAR, sampled_column="sampled")
    found = train_panel(drawn, labels=["match"], backbone=tiny_backbone, config=config, store=store, progress=False)
    assert found.results["match"].estimate["rows"] == len(rows) // 2
    assert found.results["match"].classifier.training["training_rows"] == len(rows)
    assert "The table has shares and figures of the rows that were drawn at random." in str(found).replace("\n  ", " ")
