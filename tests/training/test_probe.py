"""train: learns what is there, does not learn what is not, and changes nothing around it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import log_loss

from qwen_vl_classifier import Backbone, Classifier, Example, FeatureStore, Tap, TrainConfig, train
from qwen_vl_classifier.errors import ConfigError, DataError, TrainingError
from qwen_vl_classifier.training import probe
from qwen_vl_classifier.training.probe import candidate_taps
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(taps="mean:2,last:-1", units=32, epochs=60, learning_rate=3e-3)


def pictures(count: int, seed: int, *, random_labels: bool = False) -> list[Example]:
    """Plain pictures, mostly red (1) or mostly blue (0), in many shades; or with labels that mean nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        label = number % 2
        shade = rng.integers(0, 110, 3)
        shade[0 if label else 2] = rng.integers(140, 256)
        colour = tuple(int(value) for value in shade)
        if random_labels:
            label = int(rng.integers(2))
        rows.append(Example(Image.new("RGB", (56, 56), colour), f"text {rng.integers(5)}", label))
    return rows


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Backbone:
    folder = nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")
    return Backbone.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    return pictures(60, seed=1)


@pytest.fixture(scope="module")
def result(backbone, rows):
    return train(rows, backbone=backbone, config=CONFIG, label_names=("blue", "red"), progress=False)


def accuracy(classifier: Classifier, rows: list[Example]) -> float:
    return float(np.mean(classifier.predict(rows) == [row.label for row in rows]))


def test_a_signal_is_learned(result):
    assert accuracy(result.classifier, pictures(100, seed=2)) >= 0.95


def test_where_there_is_no_signal_none_is_found(backbone):
    found = train(pictures(60, seed=1, random_labels=True), backbone=backbone, config=CONFIG, progress=False).classifier
    # Of 300 fair coins, fewer than 1 in 10,000 lots lie outside of this.
    assert 0.38 < accuracy(found, pictures(300, seed=2, random_labels=True)) < 0.62


def test_the_table_is_sorted_and_its_best_is_the_classifier(backbone, rows, result):
    assert len(result.table) == 2
    losses = [row["log_loss"] for row in result.table]
    assert losses == sorted(losses)
    assert str(result.classifier.tap) == result.table[0]["tap"]
    other_order = TrainConfig(taps="last:-1,mean:2", units=32, epochs=60, learning_rate=3e-3)
    assert train(rows, backbone=backbone, config=other_order, progress=False).table == result.table
    for row in result.table:
        assert row.keys() == {"tap", "log_loss", "accuracy", "auroc", "epochs"}
        assert 1 <= row["epochs"] <= 60
    assert str(result).splitlines()[0].split() == ["tap", "log", "loss", "accuracy", "AUROC", "epochs"]
    assert [line.split()[0] for line in str(result).splitlines()[1:]] == [row["tap"] for row in result.table]


def test_the_classifier_is_calibrated_on_the_rows_that_the_table_speaks_of(backbone, rows):
    validation = pictures(30, seed=3)
    result = train(rows, validation, backbone=backbone, config=CONFIG, progress=False)
    assert result.validation_rows == 30
    probability = result.classifier.predict_proba(validation)
    labels = [row.label for row in validation]
    # From raw features: standardisation is folded into the head.
    assert log_loss(labels, probability) == pytest.approx(result.table[0]["log_loss"], rel=1e-3)
    assert accuracy(result.classifier, validation) == result.table[0]["accuracy"]
    assert result.classifier.temperature != 1.0


def test_the_record_says_how_it_came_about(result, rows, tmp_path):
    classifier = result.classifier
    record = classifier.training
    assert record["method"] == "probe"
    assert record["training_rows"] + record["validation_rows"] == len(rows)
    assert record["validation_rows"] == result.validation_rows == 12
    assert record["options"]["units"] == 32
    assert record["table"] == result.table
    assert classifier.label_names == ("blue", "red")
    loaded = Classifier.load(classifier.save(tmp_path / "saved"), device="cpu")
    assert loaded.training == record
    np.testing.assert_array_equal(loaded.predict_proba(rows[:5]), classifier.predict_proba(rows[:5]))


def test_ties_go_to_the_earlier_layer(backbone, rows, monkeypatch):
    monkeypatch.setattr(probe, "_scores", lambda *_: {"log_loss": 0.5, "accuracy": 0.5, "auroc": 0.5})
    config = TrainConfig(taps="mean:-1,mean:4,mean:1,mean:3", units=4, epochs=1)
    table = train(rows, backbone=backbone, config=config, progress=False).table
    assert [row["tap"] for row in table] == ["mean:1", "mean:3", "mean:4", "mean:-1"]


def test_the_same_seed_gives_the_same_classifier(backbone, rows, result):
    again = train(rows, backbone=backbone, config=CONFIG, label_names=("blue", "red"), progress=False)
    assert again.table == result.table
    for one, other in zip(again.classifier.head.parameters(), result.classifier.head.parameters(), strict=True):
        assert torch.equal(one, other)
    other_seed = TrainConfig(taps="mean:2,last:-1", units=32, epochs=60, learning_rate=3e-3, seed=1)
    assert train(rows, backbone=backbone, config=other_seed, progress=False).table != result.table


def test_random_numbers_of_the_caller_are_left_alone(backbone, rows):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    train(rows, backbone=backbone, config=TrainConfig(taps="mean:1", units=4, epochs=2), progress=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(one, other) for one, other in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]


def test_the_backbone_is_left_alone(backbone, rows, result):
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.model.training
    assert not result.classifier.finetuned
    assert result.classifier.backbone is backbone


def test_all_taps_come_from_one_pass_and_stay_in_the_store(backbone, rows, tmp_path, monkeypatch):
    calls = []
    encode = backbone.encode_prepared

    def counting(prepared, taps):
        calls.append((len(prepared), len(taps)))
        return encode(prepared, taps)

    monkeypatch.setattr(backbone, "encode_prepared", counting)
    store = FeatureStore(tmp_path)
    small = TrainConfig(taps="mean:2,last:-1", units=4, epochs=2)
    first = train(rows, backbone=backbone, config=small, store=store, progress=False)
    assert calls == [(60, 2)]
    second = train(rows[:40], rows[40:], backbone=backbone, config=small, store=store, progress=False)
    assert calls == [(60, 2)]
    assert second.validation_rows == 20
    assert first.table != second.table


@pytest.mark.parametrize("part", ["training", "validation"])
@pytest.mark.parametrize("fault", ["one class", "no label", "label 2", "none"])
def test_both_classes_are_required(backbone, rows, part, fault):
    bad = {
        "one class": [row for row in rows if row.label],
        "no label": [*rows, Example(None, "x")],
        "label 2": [*rows, Example(None, "x", 2)],
        "none": [],
    }[fault]
    arguments = (bad, rows) if part == "training" else (rows, bad)
    with pytest.raises(DataError, match=f"{part} examples"):
        train(*arguments, backbone=backbone, config=CONFIG, progress=False)


def test_too_few_rows_say_what_to_do(backbone, rows):
    with pytest.raises(DataError, match="a validation file"):
        train(rows[:3], backbone=backbone, config=CONFIG, progress=False)


def test_a_learning_rate_beyond_reason_is_named(backbone, rows):
    config = TrainConfig(taps="mean:1", units=4, epochs=2, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"tap mean:1 .* lower learning_rate"):
        train(rows, backbone=backbone, config=config, progress=False)


def features_from(monkeypatch, change) -> None:
    """Change the features that `train` sees."""
    extract = probe.extract_features

    def changed(*arguments, **options):
        features = extract(*arguments, **options)
        change(features)
        return features

    monkeypatch.setattr(probe, "extract_features", changed)


def test_broken_features_are_named(backbone, rows, monkeypatch):
    features_from(monkeypatch, lambda features: features.__setitem__((3, 0, 0), np.nan))
    with pytest.raises(TrainingError, match="look for broken features"):
        train(rows, backbone=backbone, config=CONFIG, progress=False)


@pytest.mark.parametrize("value", [0.0, 250.0])
def test_a_feature_that_was_constant_does_not_count_when_it_varies(backbone, rows, monkeypatch, value):
    noise = np.float32(value) * (1 + 1e-7 * np.random.default_rng(0).normal(size=60)).astype(np.float32)
    features_from(monkeypatch, lambda features: features.__setitem__((slice(None), 0, 5), noise))
    classifier = train(
        rows, backbone=backbone, config=TrainConfig(taps="mean:2", units=8, epochs=3), progress=False
    ).classifier
    features = backbone.encode(rows[:4], [Tap(2, "mean")])[:, 0]
    features[:, 5] = value
    moved = features.copy()
    moved[:, 5] += 0.01
    np.testing.assert_allclose(classifier.probabilities_of(moved), classifier.probabilities_of(features), atol=1e-6)


class TestCandidateTaps:
    """Which taps an option names."""

    @pytest.mark.parametrize(
        ("layers", "wanted"),
        [(4, (2, 3, -1)), (36, (18, 27, -1)), (28, (14, 21, -1)), (1, (1, -1)), (2, (1, 2, -1))],
    )
    def test_auto_is_half_three_quarters_and_the_end(self, layers, wanted):
        class Deep:
            num_layers = layers

            def check_taps(self, taps):
                return taps

        seen = candidate_taps("auto", Deep())
        assert seen == [Tap(layer, pooling) for layer in wanted for pooling in ("mean", "last")]

    def test_a_list(self, backbone):
        assert candidate_taps("mean:-1, last:2,mean:-1", backbone) == [Tap(-1, "mean"), Tap(2, "last")]

    @pytest.mark.parametrize("text", ["", "mean", "mean:-1,", "mean:5", "sum:1", "auto,mean:1"])
    def test_impossible_ones(self, backbone, text):
        with pytest.raises(ConfigError):
            candidate_taps(text, backbone)

    def test_auto_needs_all_layers(self, backbone):
        part = Backbone.load(Path(backbone.folder), device="cpu", dtype="float32", num_layers=2)
        with pytest.raises(ConfigError, match="without num_layers"):
            candidate_taps("auto", part)
