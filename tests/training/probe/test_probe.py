"""train: learns what is there, does not learn what is not, and changes nothing around it."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import log_loss

from qwen_vl_classifier import Backbone, Classifier, Example, FeatureStore, Tap, TrainConfig, train
from qwen_vl_classifier.classifier.score_distribution import (
    ScoreDistribution,
    index_by_chance,
    recorded_distribution,
    stability_index,
)
from qwen_vl_classifier.errors import DataError, TrainingError
from qwen_vl_classifier.training.overlap import row_hashes, sketch
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainConfig(taps="mean:2,last:-1", units=16, epochs=20, learning_rate=3e-3, batch_size=32)
LINEAR = TrainConfig(taps="mean:2", heads="linear")


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


def recorded(classifier: Classifier) -> ScoreDistribution:
    found = recorded_distribution(classifier.training, name="classifier")
    assert found is not None
    return found


def accuracy(classifier: Classifier, rows: list[Example]) -> float:
    return float(np.mean(classifier.predict(rows) == [row.label for row in rows]))


def test_a_signal_is_learned(result):
    assert accuracy(result.classifier, pictures(100, seed=2)) >= 0.95


def test_where_there_is_no_signal_none_is_found(backbone):
    found = train(pictures(60, seed=1, random_labels=True), backbone=backbone, config=CONFIG, progress=False).classifier
    # Of 300 fair coins, fewer than 1 in 10,000 lots lie outside of this.
    assert 0.38 < accuracy(found, pictures(300, seed=2, random_labels=True)) < 0.62


def test_the_table_is_sorted_and_its_best_is_the_classifier(result):
    losses = [round(row["log_loss"], 4) for row in result.table]
    assert losses == sorted(losses)
    assert str(result.classifier.tap) == result.table[0]["tap"]
    assert {row["head"] for row in result.table} == {"zero-shot", "calibrated", "linear", "mlp"}
    for row in result.table:
        assert row.keys() == {
            *("tap", "head", "log_loss", "log_loss_se", "accuracy", "accuracy_se", "auroc", "l2", "epochs")
        }


def test_the_estimate_is_right_about_new_rows(result):
    estimate = result.estimate
    assert estimate["method"] == "bootstrap bias corrected cross-validation"
    assert estimate["accuracy"]["low"] <= accuracy(result.classifier, pictures(200, seed=9)) + 0.02
    assert estimate["accuracy"]["mean"] > 0.9
    assert result.validation_rows == 0


def test_validation_rows_give_the_estimate_and_have_no_say(backbone, rows):
    wrong = [replace(row, label=1 - row.label) for row in pictures(30, seed=3)]
    plain, measured = (
        train(rows, validation, backbone=backbone, config=CONFIG, progress=False) for validation in (None, wrong)
    )
    assert measured.table == plain.table
    np.testing.assert_array_equal(measured.classifier.predict_proba(rows), plain.classifier.predict_proba(rows))
    assert measured.validation_rows == 30
    assert measured.estimate["method"] == "held-out rows"
    assert measured.estimate["accuracy"]["mean"] == accuracy(measured.classifier, wrong) < 0.1


def test_validation_rows_that_were_trained_on_are_noticed(backbone, rows):
    result = train(rows, rows, backbone=backbone, config=CONFIG, progress=False)
    assert result.classifier.training["notes"] == [
        "some validation rows are also training rows, so results look better than they are; give other rows"
    ]


def test_the_record_says_how_it_came_about(result, rows, tmp_path):
    classifier = result.classifier
    record = classifier.training
    assert record["method"] == "probe"
    assert (record["training_rows"], record["held_out_rows"], record["folds"]) == (60, 0, 5)
    assert record["options"]["units"] == 16
    assert record["table"] == result.table
    assert record["estimate"] == result.estimate
    assert record["rows_sketch"] == sketch(row_hashes(rows))
    assert record["threshold"] == {"objective": "accuracy", "threshold": classifier.threshold}
    assert record["calibration"].keys() >= {"method", "ece_before", "ece_after", "log_loss_before", "log_loss_after"}
    assert record["notes"] == []
    assert classifier.label_names == ("blue", "red")
    loaded = Classifier.load(classifier.save(tmp_path / "saved"), device="cpu")
    assert loaded.training == record
    np.testing.assert_array_equal(loaded.predict_proba(rows[:5]), classifier.predict_proba(rows[:5]))


def test_a_saved_classifier_loads_the_layers_of_its_tap_alone(backbone, rows, tmp_path):
    found = train(rows, backbone=backbone, config=LINEAR, progress=False).classifier
    loaded = Classifier.load(found.save(tmp_path / "saved"), device="cpu")
    assert loaded.backbone.num_layers == 2
    assert backbone.num_layers == 4
    np.testing.assert_allclose(loaded.predict_proba(rows[:5]), found.predict_proba(rows[:5]), atol=1e-6)


@pytest.mark.parametrize("head", ["zero-shot", "calibrated", "linear", "mlp"])
def test_each_head_answers_as_its_out_of_fold_answers_promise(backbone, rows, head):
    config = replace(CONFIG, heads=head, taps="mean:2")
    found = train(rows, backbone=backbone, config=config, progress=False)
    assert {row["head"] for row in found.table} == {head}
    probability = found.classifier.predict_proba(rows)[:, 1]
    assert 0 <= probability.min() < probability.max() <= 1
    if head in ("linear", "mlp"):
        assert accuracy(found.classifier, rows) > 0.9
    else:
        assert found.classifier.tap == Tap(-1, "last")
        assert log_loss([row.label for row in rows], probability) < found.table[0]["log_loss"] + 0.1


def test_without_a_language_head_there_is_a_note_in_place_of_the_baseline(rows, tmp_path):
    folder = nano.make_checkpoint("qwen2_5_vl", tmp_path / "checkpoint")
    shallow = Backbone.load(folder, device="cpu", dtype="float32", num_layers=2)
    found = train(rows, backbone=shallow, config=replace(LINEAR, heads="auto", epochs=2), progress=False)
    assert {row["head"] for row in found.table} == {"linear", "mlp"}
    assert "no zero-shot baseline: tap last:-1" in found.classifier.training["notes"][0]
    assert "Note: no zero-shot baseline" in str(found)


def test_twenty_rows_work_and_say_how_unsure_they_are(backbone):
    found = train(pictures(20, seed=1), backbone=backbone, config=CONFIG, progress=False)
    noise = train(pictures(20, seed=1, random_labels=True), backbone=backbone, config=CONFIG, progress=False)
    assert accuracy(found.classifier, pictures(100, seed=2)) > 0.8
    width = noise.estimate["accuracy"]["high"] - noise.estimate["accuracy"]["low"]
    assert width > 0.3
    assert found.estimate["rows"] == 20
    for one in (found, noise):
        assert "20 rows in 20 groups: too few to say" in " ".join(str(one).split())
        assert one.estimate["accuracy"]["low"] <= one.estimate["accuracy"]["mean"] <= one.estimate["accuracy"]["high"]
        record = one.classifier.training["calibration"]
        assert record["log_loss_after"] <= record["log_loss_before"]
        assert (one.classifier.temperature == 1) == (record["method"] != "temperature")
    assert found.estimate["accuracy"]["low"] < 0.9  # all 20 may be right, which proves little
    assert str(noise).startswith("No better than guessing, as far as these rows show: accuracy ")


def test_weights_of_classes_move_the_answers(backbone):
    rows = pictures(60, seed=1, random_labels=True)
    plain, heavy, balanced = (
        train(rows, backbone=backbone, config=replace(LINEAR, class_weight=weight), progress=False).classifier
        for weight in (None, {0: 1.0, 1: 20.0}, "balanced")
    )
    for one in (plain, heavy, balanced):
        assert sum(recorded(one).counts) == pytest.approx(60), "weights of classes say nothing of rows to come"
    new = pictures(50, seed=2)
    assert heavy.predict_proba(new)[:, 1].mean() > 0.8 > 0.65 > plain.predict_proba(new)[:, 1].mean()
    assert balanced.predict_proba(new)[:, 1].mean() == pytest.approx(0.5, abs=0.1)
    assert heavy.training["options"]["class_weight"] == {"0": 1.0, "1": 20.0}


def test_rows_without_weight_are_as_if_they_were_not_there(backbone, rows):
    wrong = [replace(row, label=1 - row.label, fields={"w": 0}) for row in pictures(40, seed=5)]
    weighted = [replace(row, fields={"w": 1}) for row in rows]
    config = replace(LINEAR, weight_column="w")
    found = train([*wrong, *weighted], backbone=backbone, config=config, progress=False)
    plain = train(rows, backbone=backbone, config=LINEAR, progress=False)
    assert found.table[0]["log_loss"] == pytest.approx(plain.table[0]["log_loss"], rel=1e-4)
    assert recorded(found.classifier).counts == recorded(plain.classifier).counts
    assert found.classifier.training["training_rows"] == 60


def test_soft_labels_are_learned(backbone, rows):
    soft = [replace(row, label=0.9 if row.label else 0.1) for row in rows]
    found = train(soft, backbone=backbone, config=LINEAR, progress=False)
    assert accuracy(found.classifier, pictures(100, seed=2)) > 0.9
    assert 0.6 < found.classifier.predict_proba(rows)[1::2, 1].mean() < 0.97
    with pytest.raises(DataError, match="among the validation examples"):
        train(rows, soft, backbone=backbone, config=LINEAR, progress=False)


def test_an_error_rate_is_kept_by_abstaining_on_rows_that_were_held_out(backbone):
    rows = pictures(150, seed=1)
    rng = np.random.default_rng(0)
    noisy = [replace(row, label=1 - row.label if rng.random() < 0.15 else row.label) for row in rows]
    found = train(noisy, backbone=backbone, config=replace(LINEAR, target_error_rate=0.05), progress=False)
    band = found.classifier.training["abstention"]
    assert found.classifier.abstention == tuple(band["band"])
    assert band["rows"] == found.validation_rows == 150 - found.classifier.training["training_rows"]
    assert 20 <= band["rows"] <= 45
    assert 0 < band["decided"] < 1
    assert "Abstention: no answer for probabilities from" in str(found)
    predictions = found.classifier.decide(pictures(100, seed=2))
    assert "abstain" in {prediction.decision for prediction in predictions}
    scores = recorded(found.classifier)
    assert sum(scores.counts) == found.classifier.training["training_rows"]
    new = scores.counts_of(np.array([prediction.probability for prediction in predictions]))
    assert stability_index(scores.counts, new) < index_by_chance(len(new), sum(scores.counts), sum(new))
    with pytest.raises(TrainingError, match="hold out at least"):
        train(noisy[:40], backbone=backbone, config=replace(LINEAR, target_error_rate=0.05), progress=False)


def test_the_objective_moves_the_threshold(backbone):
    rows = pictures(60, seed=1, random_labels=True)
    sure = train(rows, backbone=backbone, config=replace(LINEAR, objective="cost=9:1"), progress=False).classifier
    assert sure.threshold == pytest.approx(0.1, abs=0.05)
    assert sure.training["threshold"]["objective"] == "cost=9:1"


def test_what_is_exportable_is_chosen_among_taps_and_heads_that_other_engines_have(backbone, rows, tmp_path):
    config = replace(CONFIG, taps="auto", exportable=True)
    result = train(rows, backbone=backbone, config=config, progress=False)
    tried = [(Tap.parse(row["tap"]), row["head"]) for row in result.table]
    assert {Tap(1, "mean", normed=True), Tap(2, "last", normed=True), Tap(-1, "mean")} <= {tap for tap, _ in tried}
    assert all(tap.exportable and head != "mlp" for tap, head in tried)
    cost = result.classifier.training["exportable"]
    assert cost["log_loss"] == result.table[0]["log_loss"]
    assert cost["unrestricted"]["log_loss"] <= cost["log_loss"] + 1e-4  # of four equal decimals, either may win
    assert "It can be exported, which costs" in " ".join(str(result).split())
    folder = result.classifier.save(tmp_path / "classifier")
    loaded = Classifier.load(folder, device="cpu")
    assert loaded.trained_exportable
    np.testing.assert_allclose(loaded.predict_proba(rows[:4]), result.classifier.predict_proba(rows[:4]), atol=1e-6)


def test_a_better_tap_that_cannot_be_exported_is_named(backbone):
    """The label is in the user's own text, of which a mean over a large picture holds little."""
    rng = np.random.default_rng(0)
    rows = []
    for label in [0, 1] * 30:
        noise = Image.fromarray(rng.integers(0, 255, (84, 84, 3), dtype=np.uint8))
        rows.append(Example(noise, f"{rng.integers(1000)} {'red' if label else 'blue'} {rng.integers(1000)}", label))
    config = TrainConfig(heads="linear", taps="last:1:normed", exportable=True, epochs=3)
    result = train(rows, backbone=backbone, config=config, progress=False)
    best = result.classifier.training["exportable"]["unrestricted"]
    assert not Tap.parse(best["tap"]).exportable
    assert f"for {best['head']} at {best['tap']}, which cannot be exported" in " ".join(str(result).split())


def test_the_same_seed_gives_the_same_classifier(backbone, rows, result):
    again = train(rows, backbone=backbone, config=CONFIG, label_names=("blue", "red"), progress=False)
    assert again.table == result.table
    assert again.classifier.training == result.classifier.training
    for one, other in zip(again.classifier.head.parameters(), result.classifier.head.parameters(), strict=True):
        assert torch.equal(one, other)
    assert train(rows, backbone=backbone, config=replace(CONFIG, seed=1), progress=False).table != result.table


def test_random_numbers_of_the_caller_are_left_alone(backbone, rows):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    train(rows, backbone=backbone, config=replace(CONFIG, epochs=2), progress=False)
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

    def counting(prepared, taps, **options):
        calls.append((len(prepared), len(taps)))
        return encode(prepared, taps, **options)

    monkeypatch.setattr(backbone, "encode_prepared", counting)
    store = FeatureStore(tmp_path)
    first = train(rows, backbone=backbone, config=replace(CONFIG, heads="linear"), store=store, progress=False)
    assert calls == [(60, 2)]
    second = train(
        rows[:40], rows[40:], backbone=backbone, config=replace(CONFIG, heads="linear"), store=store, progress=False
    )
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
    with pytest.raises(DataError, match="too few for cross-validation; give more examples"):
        train(rows[:3], backbone=backbone, config=CONFIG, progress=False)


def test_the_estimate_is_measured_on_the_rows_that_were_drawn_at_random(backbone, rows):
    marked = [
        replace(row, fields={"sampled": "random" if number < 54 else "uncertain"}) for number, row in enumerate(rows)
    ]
    found = train(marked, backbone=backbone, config=replace(LINEAR, sampled_column="sampled"), progress=False)
    assert found.classifier.training["training_rows"] == 60
    assert found.estimate["rows"] == 54
    assert sum(recorded(found.classifier).counts) == 54
    assert "54 rows drawn at random in 54 groups" in " ".join(str(found).split())
    assert "drawn at random" not in str(train(rows, backbone=backbone, config=LINEAR, progress=False))
