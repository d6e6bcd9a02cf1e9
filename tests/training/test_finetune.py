"""finetune: the whole model trains, the start stays, and nothing old is taken for new."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import log_loss

from qwen_vl_classifier import Backbone, Classifier, Example, FeatureStore, FinetuneConfig, Tap, finetune
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.errors import DataError, OutOfMemoryError, TrainingError
from qwen_vl_classifier.training import finetune as module
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = FinetuneConfig(learning_rate=1e-3, head_learning_rate=1e-2, epochs=2, batch_size=8)


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


def pictures(count: int, seed: int) -> list[Example]:
    """Plain pictures, mostly red (1) or mostly blue (0)."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        shade = [int(value) for value in rng.integers(0, 110, 3)]
        shade[0 if number % 2 else 2] = int(rng.integers(140, 256))
        rows.append(Example(Image.new("RGB", (56, 56), tuple(shade)), "It is red.", number % 2))
    return rows


ROWS, VALIDATION = pictures(16, seed=1), pictures(12, seed=2)
LABELS = [row.label for row in VALIDATION]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")


def start_at(backbone: Backbone, tap: Tap, **options) -> Classifier:
    spec = HeadSpec("mlp", backbone.hidden_size, units=8, dropout=0.1)
    torch.manual_seed(0)
    return Classifier(backbone, tap, spec.build(), spec, **options)


@pytest.fixture(scope="module")
def start(checkpoint) -> Classifier:
    return start_at(
        Backbone.load(checkpoint, device="cpu", dtype="float32"),
        Tap(3, "mean"),
        threshold=0.4,
        abstention=(0.3, 0.5),
        label_names=("blue", "red"),
        training={"method": "none"},
    )


@pytest.fixture(scope="module")
def result(start):
    return finetune(start, ROWS, VALIDATION, config=CONFIG, progress=False)


def snapshot(classifier: Classifier) -> dict[str, torch.Tensor]:
    weights = {**classifier.backbone.model.state_dict(), **classifier.head.state_dict()}
    return {name: tensor.clone() for name, tensor in weights.items()}


def assert_same(seen: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert seen.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(seen[name], tensor), name


def test_it_learns(start, result):
    assert result.improved
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
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


def test_it_is_as_good_as_it_says(result):
    """The state that is kept is the best, and its temperature suits it."""
    best = min(row["validation_log_loss"] for row in result.history)
    classifier = result.classifier
    assert log_loss(LABELS, classifier.predict_proba(VALIDATION)) == pytest.approx(best, rel=1e-4)
    assert classifier.training["validation_log_loss"] == best


def test_the_rest_of_the_classifier_stays(start, result):
    classifier = result.classifier
    for name in ("tap", "spec", "threshold", "abstention", "label_names"):
        assert getattr(classifier, name) == getattr(start, name)
    assert classifier.backbone.name == start.backbone.name
    assert classifier.finetuned
    assert classifier.training["method"] == "finetune"
    assert classifier.training["start"] == {"method": "none"}
    assert classifier.training["history"] == result.history
    assert (classifier.training["training_rows"], classifier.training["validation_rows"]) == (16, 12)


def test_the_start_is_not_changed(checkpoint):
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(2, "mean"), training={"a": 1})
    before, fingerprint = snapshot(start), start.backbone.fingerprint
    probability = start.predict_proba(VALIDATION)
    finetune(start, ROWS, VALIDATION, config=CONFIG, progress=False)
    assert_same(snapshot(start), before)
    np.testing.assert_array_equal(start.predict_proba(VALIDATION), probability)
    assert start.backbone.fingerprint == fingerprint
    assert not start.finetuned
    assert start.training == {"a": 1}
    assert not start.head.training
    assert not any(parameter.requires_grad for parameter in start.backbone.model.parameters())


def test_a_fresh_process_gives_the_same_probabilities(result, tmp_path):
    folder = result.classifier.save(tmp_path / "saved")
    colours = json.dumps([row.image.getpixel((0, 0)) for row in VALIDATION])
    command = [sys.executable, "-c", FRESH, str(folder), colours, str(tmp_path / "seen.npy")]
    printed = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    np.testing.assert_array_equal(np.load(tmp_path / "seen.npy"), result.classifier.predict_proba(VALIDATION))
    assert printed.strip() == result.classifier.backbone.fingerprint
    assert {path.name for path in folder.iterdir()} == {"classifier.json", "head.safetensors", "README.md", "backbone"}


def test_kept_features_of_the_old_backbone_are_not_used_for_the_new(checkpoint, tmp_path):
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(2, "mean"))
    store = FeatureStore(tmp_path / "store")
    old = start.predict_proba(VALIDATION, store=store)
    new = finetune(start, ROWS, VALIDATION, config=CONFIG, progress=False).classifier
    assert new.backbone.fingerprint != start.backbone.fingerprint
    kept = new.predict_proba(VALIDATION, store=store)
    assert len(store) == 2 * len(VALIDATION)
    np.testing.assert_array_equal(kept, new.predict_proba(VALIDATION))
    assert np.abs(kept - old).max() > 1e-3
    loaded = Classifier.load(new.save(tmp_path / "saved"), device="cpu")
    np.testing.assert_array_equal(loaded.predict_proba(VALIDATION, store=store), kept)


def test_no_epoch_better_than_the_start_keeps_the_start(start):
    nothing = FinetuneConfig(learning_rate=1e-30, head_learning_rate=1e-30, weight_decay=0, epochs=1)
    result = finetune(start, ROWS, VALIDATION, config=nothing, progress=False)
    assert not result.improved
    assert result.classifier is start
    assert len(result.history) == 2


def test_the_last_epoch_is_not_kept_for_being_last(start, monkeypatch):
    losses = iter([(0.9, 1.0), (0.5, 2.0), (0.7, 3.0), (0.6, 4.0)])
    states = []

    def validate(classifier, *_):
        states.append(snapshot(classifier))
        return next(losses)

    monkeypatch.setattr(module, "_validate", validate)
    config = FinetuneConfig(learning_rate=1e-3, head_learning_rate=1e-2, epochs=3)
    result = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert [row["validation_log_loss"] for row in result.history] == [0.9, 0.5, 0.7, 0.6]
    assert_same(snapshot(result.classifier), states[1])
    assert result.classifier.temperature == 2.0
    assert not torch.equal(states[3]["0.weight"], states[1]["0.weight"])


def test_a_temperature_of_the_start_does_not_stand_in_the_way(checkpoint):
    """A probe that was all right on few rows has the smallest temperature; logits divided by it look terrible."""
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(3, "mean"), temperature=0.05)
    result = finetune(start, ROWS, VALIDATION, config=CONFIG, progress=False)
    assert result.improved
    best = min(row["validation_log_loss"] for row in result.history)
    assert log_loss(LABELS, result.classifier.predict_proba(VALIDATION)) == pytest.approx(best, rel=1e-4)


def test_training_goes_on_from_a_result_that_was_not_saved(start):
    result = finetune(start, ROWS, VALIDATION, config=CONFIG, progress=False)
    assert result.classifier.backbone.changed
    nothing = FinetuneConfig(learning_rate=1e-30, head_learning_rate=1e-30, weight_decay=0, epochs=1)
    again = finetune(result.classifier, ROWS, VALIDATION, config=nothing, progress=False)
    best = min(row["validation_log_loss"] for row in result.history)
    assert again.history[0]["validation_log_loss"] == pytest.approx(best, rel=1e-4)
    assert again.classifier is result.classifier


def test_the_same_seed_gives_the_same_result(start, result):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    again = finetune(start, ROWS, VALIDATION, config=CONFIG, progress=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    assert again.history == result.history
    assert_same(snapshot(again.classifier), snapshot(result.classifier))


def test_gradient_checkpointing_changes_nothing_but_memory(start, result, monkeypatch):
    ran = []
    attention = type(start.backbone.model.language_model.layers[0].self_attn)
    forward = attention.forward

    def counting(self, *arguments, **options):
        ran.append(torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(attention, "forward", counting)
    config = FinetuneConfig(
        learning_rate=1e-3, head_learning_rate=1e-2, epochs=2, batch_size=8, gradient_checkpointing=True
    )
    seen = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    # 2 epochs of 2 steps through 3 layers, each layer once more on the way back.
    assert sum(ran) == 2 * 2 * 3 * 2
    for one, other in zip(seen.history, result.history, strict=True):
        assert one["validation_log_loss"] == pytest.approx(other["validation_log_loss"], rel=1e-3)


def test_autocast_runs(start, result):
    config = FinetuneConfig(learning_rate=1e-3, head_learning_rate=1e-2, epochs=1, autocast=True)
    seen = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert seen.classifier.backbone.dtype == torch.float32
    assert seen.history[1]["training_loss"] == pytest.approx(result.history[1]["training_loss"], rel=0.1)
    assert seen.history[1] != result.history[1]


def test_a_bfloat16_start_trains_in_float32(checkpoint):
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="bfloat16"), Tap(1, "last"))
    config = FinetuneConfig(learning_rate=1e-4, head_learning_rate=1e-2, epochs=1)
    result = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert result.improved
    assert result.classifier.backbone.dtype == torch.float32
    assert start.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_learning_rate_beyond_reason_is_an_error_and_changes_nothing(start, batch_size):
    """In the next step, or, where one step is an epoch, in validation."""
    before = snapshot(start)
    config = FinetuneConfig(learning_rate=1e30, head_learning_rate=1e30, epochs=2, batch_size=batch_size)
    with pytest.raises(TrainingError, match="lower the learning rate") as caught:
        finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert "\n" not in str(caught.value)
    assert_same(snapshot(start), before)


def test_lack_of_memory_ends_in_advice(start, monkeypatch):
    def full(*_arguments):
        return torch.empty(2**60)

    monkeypatch.setattr(module.TrainableClassifier, "logits", full)
    with pytest.raises(OutOfMemoryError, match="training on 8 examples"):
        finetune(start, ROWS, VALIDATION, config=CONFIG, progress=False)


def test_a_share_is_held_out_where_there_is_no_validation_data(start):
    config = FinetuneConfig(learning_rate=1e-3, head_learning_rate=1e-2, epochs=1, validation_share=0.25)
    record = finetune(start, ROWS, config=config, progress=False).classifier.training
    assert (record["training_rows"], record["validation_rows"]) == (12, 4)


@pytest.mark.parametrize("part", ["training", "validation"])
def test_both_classes_are_required(start, part):
    bad = [row for row in ROWS if row.label]
    with pytest.raises(DataError, match=f"all 8 {part} examples have label 1"):
        finetune(start, *((bad, ROWS) if part == "training" else (ROWS, bad)), config=CONFIG, progress=False)
