"""finetune: the whole model trains, the start stays, and nothing old is taken for new."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from qwen2_5_vl_classifier import Qwen2_5_VLForBinaryClassification, Qwen2_5_VLTrainer
from qwen_vl_classifier import (
    Backbone,
    Classifier,
    Example,
    FeatureStore,
    FinetuneConfig,
    Tap,
    TrainConfig,
    finetune,
    train,
)
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.errors import ConfigError, DataError, OutOfMemoryError, TrainingError
from qwen_vl_classifier.training.batching import Rows
from qwen_vl_classifier.training.trainer import FinetuneTrainer, PackedClassifier
from tests import nano
from tests.shades import pictures

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
FULL = FinetuneConfig(
    method="full", towers="all", learning_rate=1e-3, head_learning_rate=1e-2, epochs=2, batch_size=8, warmup=0
)
LORA = replace(FULL, method="lora", rank=4, adapter_dropout=0.0)
NOTHING = replace(FULL, learning_rate=1e-30, head_learning_rate=1e-30, weight_decay=0, epochs=1)


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


ROWS, VALIDATION = pictures(16, seed=1), pictures(12, seed=2)
LABELS = [row.label for row in VALIDATION]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")


def start_at(backbone: Backbone, tap: Tap, *, dropout: float = 0.1, **options) -> Classifier:
    spec = HeadSpec("mlp", backbone.hidden_size, units=8, dropout=dropout)
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
def still(checkpoint) -> Classifier:
    """A start without dropout: random numbers do not depend on how a batch is cut."""
    return start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(3, "mean"), dropout=0.0)


@pytest.fixture(scope="module")
def result(start):
    return finetune(start, ROWS, VALIDATION, config=FULL, progress=False)


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
    assert classifier.training["validation_log_loss"] == best


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


def test_the_start_is_not_changed(checkpoint):
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(2, "mean"), training={"a": 1})
    before, fingerprint = snapshot(start), start.backbone.fingerprint
    probability = start.predict_proba(VALIDATION)
    finetune(start, ROWS, VALIDATION, config=FULL, progress=False)
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


def course(monkeypatch, losses: list[float]) -> list[dict[str, torch.Tensor]]:
    """Let validation give these losses, and return what the weights were at each."""
    given = iter(losses)
    states: list[dict[str, torch.Tensor]] = []

    def mean_loss(*_):
        return next(given)

    def validation_logits(self):
        states.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return np.zeros((len(VALIDATION), 2), np.float32)

    monkeypatch.setattr(Rows, "mean_loss", mean_loss)
    monkeypatch.setattr(FinetuneTrainer, "validation_logits", validation_logits)
    return states


def test_the_last_state_is_not_kept_for_being_last(start, monkeypatch):
    states = course(monkeypatch, [0.9, 0.5, 0.7, 0.6])
    result = finetune(start, ROWS, VALIDATION, config=replace(FULL, epochs=3), progress=False)
    assert [row["validation_log_loss"] for row in result.history] == [0.9, 0.5, 0.7, 0.6]
    seen = result.classifier.head.state_dict()
    for name, tensor in seen.items():
        assert torch.equal(tensor, states[1][f"classifier.{name}"])
        assert not torch.equal(tensor, states[3][f"classifier.{name}"])


@pytest.mark.parametrize(("patience", "looks"), [(1, 3), (2, 5), (0, 7)])
def test_it_stops_when_validation_gets_no_better(start, monkeypatch, patience, looks):
    course(monkeypatch, [0.9, 0.5, 0.7, 0.5, 0.8, 0.4, 0.9])
    config = replace(FULL, epochs=6, patience=patience)
    losses = [
        row["validation_log_loss"] for row in finetune(start, ROWS, VALIDATION, config=config, progress=False).history
    ]
    if patience == 2:
        assert losses == [0.9, 0.5, 0.7, 0.5]  # no better than 0.5, twice
    else:
        assert len(losses) == looks


def test_it_looks_at_validation_as_often_as_asked(start):
    config = replace(FULL, epochs=1, batch_size=4, evaluations_per_epoch=2)
    history = finetune(start, ROWS, VALIDATION, config=config, progress=False).history
    assert [row["step"] for row in history] == [0, 2, 4]


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


def test_gradient_checkpointing_changes_nothing_but_memory(start, result, monkeypatch):
    ran = []
    attention = type(start.backbone.model.language_model.layers[0].self_attn)
    forward = attention.forward

    def counting(self, *arguments, **options):
        ran.append(torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(attention, "forward", counting)
    config = replace(FULL, gradient_checkpointing=True)
    seen = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    # 2 epochs of 2 steps through 3 layers, each layer once more on the way back.
    assert sum(ran) == 2 * 2 * 3 * 2
    for one, other in zip(seen.history, result.history, strict=True):
        assert one["validation_log_loss"] == pytest.approx(other["validation_log_loss"], rel=1e-3)


def test_bfloat16_products_run(start, result):
    config = replace(FULL, epochs=1, bf16=True)
    seen = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert seen.classifier.backbone.dtype == torch.float32
    assert seen.history[1]["training_loss"] == pytest.approx(result.history[1]["training_loss"], rel=0.1)
    assert seen.history[1] != result.history[1]


def test_a_bfloat16_start_trains_in_float32(checkpoint):
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="bfloat16"), Tap(1, "last"))
    config = replace(FULL, learning_rate=1e-4, epochs=1)
    result = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert result.improved
    assert result.classifier.backbone.dtype == torch.float32
    assert start.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_learning_rate_beyond_reason_is_an_error_and_changes_nothing(start, batch_size):
    """In the next step, or, where one step is an epoch, in validation."""
    before = snapshot(start)
    config = replace(FULL, learning_rate=1e30, head_learning_rate=1e30, batch_size=batch_size)
    with pytest.raises(TrainingError, match="lower the learning rate") as caught:
        finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert "\n" not in str(caught.value)
    assert_same(snapshot(start), before)


def assert_same_course(seen, wanted, rel: float) -> None:
    for one, other in zip(seen.history, wanted.history, strict=True):
        assert {**one, "training_loss": one["training_loss"] or 0} == pytest.approx(
            {**other, "training_loss": other["training_loss"] or 0}, rel=rel
        )


def limit(monkeypatch, most: int) -> list[int]:
    """Let memory run out in the backward pass of more than so many examples; return what was tried."""
    forward = PackedClassifier.forward
    tried = []

    def limited(self, rows):
        logits = forward(self, rows)
        if self.training:
            tried.append(len(logits))
            if len(logits) > most:
                logits.register_hook(lambda _: torch.empty(2**60))
        return logits

    monkeypatch.setattr(PackedClassifier, "forward", limited)
    return tried


def test_lack_of_memory_takes_smaller_pieces_and_the_same_steps(still, monkeypatch):
    """Gradients that were added before memory ran out are not added twice."""
    wanted = finetune(still, ROWS, VALIDATION, config=replace(FULL, epochs=1), progress=False)
    tried = limit(monkeypatch, most=2)
    seen = finetune(still, ROWS, VALIDATION, config=replace(FULL, epochs=1), progress=False)
    assert tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert_same_course(seen, wanted, rel=1e-3)


def test_a_single_example_that_does_not_fit_ends_in_advice(start, monkeypatch):
    limit(monkeypatch, most=0)
    with pytest.raises(OutOfMemoryError, match="training on 1 examples"):
        finetune(start, ROWS, VALIDATION, config=FULL, progress=False)


def test_a_micro_batch_changes_nothing_but_memory(still, monkeypatch):
    wanted = finetune(still, ROWS, VALIDATION, config=FULL, progress=False)
    tried = limit(monkeypatch, most=99)
    seen = finetune(still, ROWS, VALIDATION, config=replace(FULL, micro_batch_size=3), progress=False)
    assert tried == [3, 3, 2] * 4
    assert_same_course(seen, wanted, rel=1e-2)


def test_a_share_is_held_out_where_there_is_no_validation_data(start):
    config = replace(FULL, epochs=1, validation_share=0.25)
    record = finetune(start, ROWS, config=config, progress=False).classifier.training
    assert (record["training_rows"], record["validation_rows"]) == (12, 4)


@pytest.mark.parametrize("part", ["training", "validation"])
def test_both_classes_are_required(start, part):
    bad = [row for row in ROWS if row.label]
    with pytest.raises(DataError, match=f"all 8 {part} examples have label 1"):
        finetune(start, *((bad, ROWS) if part == "training" else (ROWS, bad)), config=FULL, progress=False)


def recipe(start: Classifier, steps: int, rate: float) -> list[float]:
    """Train the same classifier by the original API, all rows in each step; the losses before each."""
    model = Qwen2_5_VLForBinaryClassification(start.backbone.folder, device="cpu", dtype="float32")
    model.tap, model.classifier = start.tap, copy.deepcopy(start.head).requires_grad_(True)
    trainer = Qwen2_5_VLTrainer(model, learning_rate=rate)
    batch = model.collate(ROWS)
    return [trainer.train_step(batch) for _ in range(steps)]


def test_the_original_recipe_takes_the_same_steps(checkpoint):
    """Stage 2 by `Qwen2_5_VLTrainer.train_step` and by `finetune`: one step function, the same course."""
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(-1, "mean"), dropout=0.0)
    config = replace(FULL, learning_rate=1e-3, head_learning_rate=1e-3, schedule="constant", epochs=5, batch_size=16)
    history = finetune(start, ROWS, VALIDATION, config=replace(config, patience=0), progress=False).history
    seen = [row["training_loss"] for row in history[1:]]
    assert seen == pytest.approx(recipe(start, 5, 1e-3), rel=1e-3)
    assert seen[-1] < seen[0] - 0.05


def test_soft_labels_and_weights_count(still):
    """A row of weight 2 is a row given twice; a soft label is the row given with both labels."""
    config = replace(FULL, batch_size=64, weight_column="weight", head_learning_rate=1e-3, learning_rate=1e-4)
    validation = [replace(row, fields={"weight": 1}) for row in VALIDATION]

    def losses(rows: list[Example]) -> list[float]:
        history = finetune(still, rows, validation, config=config, progress=False).history
        return [row["training_loss"] for row in history[1:]]

    weighted = [replace(row, fields={"weight": 1 + number % 3}) for number, row in enumerate(ROWS)]
    repeated = [replace(row, fields={"weight": 1}) for row in weighted for _ in range(row.fields["weight"])]
    assert losses(weighted) == pytest.approx(losses(repeated), rel=1e-3)
    soft = [replace(row, label=0.5, fields={"weight": 2}) for row in weighted[:4]]
    both = [replace(row, label=label, fields={"weight": 1}) for row in weighted[:4] for label in (0, 1)]
    assert losses(soft + weighted[4:]) == pytest.approx(losses(both + weighted[4:]), rel=1e-3)


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
    backbone = Backbone.load(checkpoint, device="cpu", dtype="float32")
    rows = pictures(40, seed=4)
    store = FeatureStore(tmp_path / "features")
    config = replace(LORA, epochs=1, validation_share=0.25)
    record = finetune(backbone, rows, config=config, store=store, progress=False).classifier.training
    assert record["method"] == "lora"
    assert (record["training_rows"], record["validation_rows"]) == (30, 10)
    assert (record["start"]["method"], record["start"]["training_rows"]) == ("probe", 30)
    kept = len(store)
    config = replace(NOTHING, validation_share=0.25)
    record = finetune(backbone, rows, config=config, store=store, progress=False).classifier.training
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
    assert "flatters it" in second.notes[0]
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


def test_the_folder_of_a_run_shows_its_course(start, tmp_path):
    config = replace(LORA, epochs=1, augment="light", report_to="tensorboard")
    finetune(start, ROWS, VALIDATION, config=config, run=tmp_path / "run", progress=False)
    assert "It is red." in (tmp_path / "run/augmentation.html").read_text(encoding="utf-8")
    assert [*(tmp_path / "run/runs").rglob("events.out.tfevents.*")]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"augmentation.html", "run.json", "runs"}


def test_unknown_places_to_report_to_are_refused(start):
    with pytest.raises(ConfigError, match="report_to 'blackboard'"):
        finetune(start, ROWS, VALIDATION, config=replace(LORA, report_to="blackboard"), progress=False)
