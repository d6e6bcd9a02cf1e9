"""finetune: the model trains, the start stays, and nothing old is taken for new; test_trainer.py has the loop."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from qwen_vl_classifier import (
    Backbone,
    Classifier,
    FeatureStore,
    Tap,
    TrainConfig,
    finetune,
    train,
)
from qwen_vl_classifier.errors import DataError
from qwen_vl_classifier.training.finetuning.starting_point import trainable_copy
from tests.coloured_pictures import pictures
from tests.tuning import FULL, LABELS, LORA, NOTHING, ROWS, VALIDATION, assert_same, snapshot, start_at

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]

FRESH = """
import json, sys, numpy, torch
torch.set_num_threads(1)  # as here: the order of sums depends on it
from PIL import Image
from qwen_vl_classifier import Classifier, Example

loaded = Classifier.load(sys.argv[1], device="cpu")
print(loaded.backbone.fingerprint)
colours = map(tuple, json.loads(sys.argv[2]))
examples = [Example(Image.new("RGB", (56, 56), colour), "It is red.") for colour in colours]
numpy.save(sys.argv[3], loaded.predict_proba(examples))
"""


def test_it_learns(start, result):
    assert result.improved
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
    assert [row["step"] for row in result.history] == [0, 2, 4]
    assert result.history[0]["training_loss"] is None
    assert result.history[2]["training_loss"] < result.history[1]["training_loss"]
    best = min(row["validation_log_loss"] for row in result.history)
    assert best < result.history[0]["validation_log_loss"]
    held_out = pictures(40, seed=3)
    assert np.mean(result.classifier.predict_proba(held_out).argmax(axis=1) == [row.label for row in held_out]) >= 0.9


def test_both_towers_and_the_head_have_moved(start, result):
    before, after = snapshot(start), snapshot(result.classifier)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    for part in (
        "visual.patch_embed",
        "visual.blocks.0",
        "visual.merger",
        "language_model.layers.0",
        "language_model.layers.2",
    ):
        assert any(name.startswith(part) for name in moved), part
    assert {"0.weight", "3.bias"} <= moved
    assert not any(name.startswith("language_model.layers.3") for name in after)  # above the tap: never loaded


@pytest.mark.parametrize("config", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_starts_where_the_probe_ended(checkpoint, config, temperature):
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(3, "mean"), temperature=temperature)
    history = finetune(start, ROWS, VALIDATION, config=replace(config, epochs=1), progress=False).history
    probe = log_loss(LABELS, start.predict_proba(VALIDATION))
    assert history[0]["validation_log_loss"] == pytest.approx(probe, abs=1e-5)
    assert history[0]["validation_accuracy"] == np.mean(start.predict_proba(VALIDATION).argmax(axis=1) == LABELS)


def test_it_is_as_good_as_it_says(result):
    """The state that is kept is the best, and calibration makes it no worse."""
    best = min(row["validation_log_loss"] for row in result.history)
    classifier = result.classifier
    assert log_loss(LABELS, classifier.predict_proba(VALIDATION)) < result.history[0]["validation_log_loss"]
    own = log_loss(LABELS, classifier.predict_proba(VALIDATION))
    assert classifier.training["validation_log_loss"] == pytest.approx(own, abs=1e-9)
    assert own <= best + 1e-3


def test_the_rest_of_the_classifier_stays(start, result):
    classifier = result.classifier
    for name in ("tap", "spec", "label_names"):
        assert getattr(classifier, name) == getattr(start, name)
    assert classifier.backbone.name == start.backbone.name
    assert classifier.finetuned
    assert classifier.training["method"] == "full"
    assert classifier.training["start"] == {"method": "none"}
    assert classifier.training["history"] == result.history
    assert (classifier.training["training_rows"], classifier.training["validation_rows"]) == (16, 12)


@pytest.mark.parametrize("config", [FULL, replace(LORA, merge=True)], ids=["full", "merged"])
def test_the_start_is_not_changed(checkpoint, config):
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(2, "mean"), training={"a": 1})
    before, fingerprint = snapshot(start), start.backbone.fingerprint
    probability = start.predict_proba(VALIDATION)
    finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert_same(snapshot(start), before)
    np.testing.assert_array_equal(start.predict_proba(VALIDATION), probability)
    assert start.backbone.fingerprint == fingerprint
    assert not start.finetuned
    assert start.training == {"a": 1}
    assert not start.head.training
    assert not any(parameter.requires_grad for parameter in start.backbone.model.parameters())


def test_a_fresh_process_gives_the_same_probabilities(result, tmp_path, fresh):
    folder = result.classifier.save(tmp_path / "saved")
    colours = json.dumps([row.image.getpixel((0, 0)) for row in VALIDATION])
    done = fresh.run(FRESH, folder, colours, tmp_path / "seen.npy")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "seen.npy"), result.classifier.predict_proba(VALIDATION))
    assert done.stdout.strip() == result.classifier.backbone.fingerprint
    assert {path.name for path in folder.iterdir()} == {"classifier.json", "head.safetensors", "README.md", "backbone"}


def test_kept_features_of_the_old_backbone_are_not_used_for_the_new(checkpoint, tmp_path):
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(2, "mean"))
    store = FeatureStore(tmp_path / "store")
    old = start.predict_proba(VALIDATION, store=store)
    new = finetune(start, ROWS, VALIDATION, config=FULL, progress=False).classifier
    assert new.backbone.fingerprint != start.backbone.fingerprint
    kept = new.predict_proba(VALIDATION, store=store)
    assert len(store) == 2 * len(VALIDATION)
    np.testing.assert_array_equal(kept, new.predict_proba(VALIDATION))
    assert np.abs(kept - old).max() > 1e-3
    loaded = Classifier.load(new.save(tmp_path / "saved"), device="cpu")
    np.testing.assert_array_equal(loaded.predict_proba(VALIDATION, store=store), kept)


def test_no_state_better_than_the_start_keeps_the_start(start):
    result = finetune(start, ROWS, VALIDATION, config=NOTHING, progress=False)
    assert not result.improved
    assert result.classifier is start
    assert len(result.history) == 2


def test_training_goes_on_from_a_result_that_was_not_saved(start):
    result = finetune(start, ROWS, VALIDATION, config=FULL, progress=False)
    assert result.classifier.backbone.changed
    again = finetune(result.classifier, ROWS, VALIDATION, config=NOTHING, progress=False)
    now = log_loss(LABELS, result.classifier.predict_proba(VALIDATION))
    assert again.history[0]["validation_log_loss"] == pytest.approx(now, abs=1e-5)
    assert again.classifier is result.classifier


def test_the_same_seed_gives_the_same_result(start, result):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    again = finetune(start, ROWS, VALIDATION, config=FULL, progress=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert again.history == result.history
    assert_same(snapshot(again.classifier), snapshot(result.classifier))


def test_a_bfloat16_start_trains_in_float32(checkpoint):
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="bfloat16"), Tap(1, "last"))
    config = replace(FULL, learning_rate=1e-4, epochs=1)
    result = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert result.improved
    assert result.classifier.backbone.dtype == torch.float32
    assert start.backbone.dtype == torch.bfloat16


def test_a_share_is_held_out_where_there_is_no_validation_data(start):
    config = replace(FULL, epochs=1, validation_share=0.25)
    result = finetune(start, ROWS, config=config, progress=False)
    record = result.classifier.training
    assert (record["training_rows"], record["validation_rows"]) == (12, 4)
    assert record["stands_for"] == result.stands_for
    assert result.stands_for.startswith("new pictures, ")


@pytest.mark.parametrize("part", ["training", "validation"])
def test_both_classes_are_required(start, part):
    bad = [row for row in ROWS if row.label]
    with pytest.raises(DataError, match=f"all 8 {part} examples have label 1"):
        finetune(start, *((bad, ROWS) if part == "training" else (ROWS, bad)), config=FULL, progress=False)


def test_a_head_that_has_seen_the_rows_held_out_is_trained_again_without_them(checkpoint):
    backbone = Backbone.load(checkpoint, device="cpu", dtype="float32")
    probe = train(ROWS, backbone=backbone, config=TrainConfig(taps="mean:3", heads="linear"), progress=False).classifier
    result = finetune(probe, ROWS, config=replace(NOTHING, validation_share=0.25), progress=False)
    assert any("trained again without them" in note for note in result.notes)
    assert result.classifier is probe
    fresh = finetune(probe, ROWS, VALIDATION, config=NOTHING, progress=False)
    assert fresh.notes == ()
    assert fresh.history[0]["validation_log_loss"] == pytest.approx(
        log_loss(LABELS, probe.predict_proba(VALIDATION)), abs=1e-4
    )


def test_a_backbone_is_probed_first(checkpoint, tmp_path):
    probing = TrainConfig(taps="mean:3", heads="linear")
    backbone = Backbone.load(checkpoint, device="cpu", dtype="float32")
    rows = pictures(40, seed=4)
    store = FeatureStore(tmp_path / "features")
    config = replace(LORA, epochs=1, validation_share=0.25)
    record = finetune(backbone, rows, config=config, store=store, probing=probing, progress=False).classifier.training
    assert record["method"] == "lora"
    assert (record["training_rows"], record["validation_rows"]) == (30, 10)
    assert (record["start"]["method"], record["start"]["training_rows"]) == ("probe", 30)
    kept = len(store)
    config = replace(NOTHING, validation_share=0.25)
    record = finetune(backbone, rows, config=config, store=store, probing=probing, progress=False).classifier.training
    assert (record["method"], record["training_rows"]) == ("probe", 40)  # what is kept has seen all rows
    assert len(store) >= kept


def test_only_adapters_and_head_move(start):
    result = finetune(start, ROWS, VALIDATION, config=LORA, progress=False)
    assert result.improved
    before, after = snapshot(start), snapshot(result.classifier)
    for name, tensor in before.items():
        if name in after and not name.startswith(("0.", "3.")):
            assert torch.equal(after[name], tensor), name
    assert any("lora_B" in name and tensor.any() for name, tensor in after.items())


@pytest.mark.parametrize(("method", "quantization"), [("lora", None), ("qlora", "4bit")])
def test_adapters_train_over_the_weights_that_are_loaded_already(checkpoint, method, quantization):
    """A model takes its memory once, not once for the start and once for its copy."""
    start = start_at(Backbone.load(checkpoint, device="cpu", quantization=quantization), Tap(3, "mean"))
    places = places_of(start)
    copied = places_of(trainable_copy(start, replace(LORA, method=method)))
    adapters = {name for name in copied if "lora_" in name}
    assert adapters
    assert copied.keys() - adapters == {name for name in places if not name.startswith("language_model.layers.3")}
    assert all(copied[name] == places[name] for name in copied.keys() - adapters)
    other = "lora" if quantization else "full"
    assert not places.items() & places_of(trainable_copy(start, replace(LORA, method=other))).items()


def places_of(classifier: Classifier) -> dict[str, int]:
    """Where the weights of the backbone lie in memory."""
    weights = classifier.backbone.model.named_parameters()
    return {name.replace(".base_layer", ""): weight.data_ptr() for name, weight in weights}


def test_merged_adapters_are_plain_weights_again(start):
    result = finetune(start, ROWS, VALIDATION, config=replace(LORA, merge=True), progress=False)
    apart = finetune(start, ROWS, VALIDATION, config=LORA, progress=False)
    read = {name for name in snapshot(start) if not name.startswith("language_model.layers.3")}
    assert snapshot(result.classifier).keys() == read
    np.testing.assert_allclose(
        result.classifier.predict_proba(VALIDATION), apart.classifier.predict_proba(VALIDATION), atol=1e-5
    )


def test_an_adapter_goes_on_from_an_adapter(start, tmp_path):
    first = finetune(start, ROWS, VALIDATION, config=replace(LORA, epochs=1), progress=False).classifier
    second = finetune(first, ROWS, VALIDATION, config=LORA, progress=False)
    probability = log_loss(LABELS, first.predict_proba(VALIDATION))
    assert second.history[0]["validation_log_loss"] == pytest.approx(probability, abs=1e-4)
    assert second.improved
    assert "looks better than it is" in second.notes[0]
    folder = second.classifier.save(tmp_path / "saved")
    assert {"adapter", "backbone"} <= {path.name for path in folder.iterdir()}
    np.testing.assert_allclose(
        Classifier.load(folder, device="cpu").predict_proba(VALIDATION),
        second.classifier.predict_proba(VALIDATION),
        atol=1e-6,
    )


def test_adapters_train_on_four_bit_weights(checkpoint, tmp_path):
    backbone = Backbone.load(checkpoint, device="cpu", dtype="float32", quantization="4bit")
    start = start_at(backbone, Tap(3, "mean"))
    result = finetune(start, ROWS, VALIDATION, config=replace(LORA, method="qlora"), progress=False)
    probe = log_loss(LABELS, start.predict_proba(VALIDATION))
    assert result.history[0]["validation_log_loss"] == pytest.approx(probe, abs=1e-4)
    assert result.improved
    loaded = Classifier.load(result.classifier.save(tmp_path / "saved"), device="cpu")
    assert loaded.backbone.quantization == "4bit"
    np.testing.assert_allclose(loaded.predict_proba(VALIDATION), result.classifier.predict_proba(VALIDATION), atol=1e-6)
