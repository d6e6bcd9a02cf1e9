"""One step: batches are checked before anything happens, and a bad step changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from PIL import Image

from qwen_vl_classifier import Backbone, Example, Tap, finetune
from qwen_vl_classifier.classifier.head import mlp_head
from qwen_vl_classifier.errors import BatchError, ConfigError, ImageError, OutOfMemoryError, TrainingError
from qwen_vl_classifier.training.finetuning.step import (
    TrainableClassifier,
    add_gradients,
    check_batch,
    collate,
    train_step,
)
from tests import nano

ROWS = [
    Example(Image.new("RGB", (84, 56), "red"), "short", 1),
    Example((Image.new("RGB", (56, 56), "navy"), Image.new("RGB", (112, 56))), "a longer text about two", 0),
    Example(None, "no picture", 1),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> Backbone:
    folder = nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")
    return Backbone.load(folder, device="cpu", dtype="float32")


@pytest.fixture
def backbone(loaded) -> Backbone:
    """A backbone of its own for each test, which may change it."""
    own = copy.copy(loaded)
    own.model = copy.deepcopy(loaded.model)
    return own


@pytest.fixture
def model(backbone) -> TrainableClassifier:
    torch.manual_seed(0)
    return TrainableClassifier(backbone, Tap(-1, "mean"), mlp_head(backbone.hidden_size, units=8, dropout=0.0))


@pytest.fixture
def batch(loaded) -> dict[str, torch.Tensor]:
    return collate(ROWS, loaded.processor)


def padded_left(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with its padding on the left."""
    left = {name: tensor.clone() for name, tensor in batch.items()}
    for row, count in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            left[name][row] = batch[name][row].roll(batch[name].shape[1] - count)
    return left


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


class TestCollate:
    """Examples to a batch."""

    def test_it_is_the_processors_batch_with_labels(self, loaded, batch):
        inputs = loaded.processor(ROWS)
        assert batch.keys() == inputs.keys() | {"labels"}
        for name, tensor in inputs.items():
            assert torch.equal(batch[name], tensor)
        assert batch["labels"].tolist() == [1, 0, 1]
        assert batch["labels"].dtype == torch.int64

    def test_mappings_are_examples(self, loaded, batch):
        rows = [{"image": row.image, "text": row.text, "label": row.label, "more": 1} for row in ROWS]
        for name, tensor in collate(rows, loaded.processor).items():
            assert torch.equal(tensor, batch[name])

    @pytest.mark.parametrize("key", ["image", "text", "label"])
    def test_a_missing_key_is_named(self, loaded, key):
        row = {"image": None, "text": "x", "label": 1}
        del row[key]
        with pytest.raises(BatchError, match=f"example 1: no '{key}', only .*; give image, text and label"):
            collate([ROWS[0], row], loaded.processor)

    @pytest.mark.parametrize("label", [None, 2, -1, 0.5, "1"])
    def test_a_label_is_0_or_1(self, loaded, label):
        with pytest.raises(BatchError, match=r"example 2: label .*; give 0 or 1"):
            collate([*ROWS[:2], Example(None, "x", label)], loaded.processor)

    def test_no_examples(self, loaded):
        with pytest.raises(BatchError, match="at least one"):
            collate([], loaded.processor)

    def test_a_picture_that_cannot_be_opened(self, loaded):
        with pytest.raises(ImageError, match=r"missing\.png"):
            collate([Example("missing.png", "x", 1)], loaded.processor)


def without(name):
    return lambda batch: batch.pop(name)


def put(name, make):
    def change(batch):
        batch[name] = make(batch[name])

    return change


def at(name, place, value):
    def change(batch):
        batch[name][place] = value

    return change


BROKEN = {
    "no ids": (without("input_ids"), r"no tensor 'input_ids', only \['attention_mask'.*pass what collate returns"),
    "no mask": (without("attention_mask"), "no tensor 'attention_mask'"),
    "no labels": (without("labels"), "no tensor 'labels'"),
    "ids as a list": (put("input_ids", lambda t: t.tolist()), "no tensor 'input_ids'"),
    "one row of ids": (put("input_ids", lambda t: t[0]), r"input_ids: torch.int64 of shape \(\d+,\)"),
    "no rows": (put("input_ids", lambda t: t[:0]), r"input_ids: .* shape \(0, \d+\)"),
    "no tokens": (put("input_ids", lambda t: t[:, :0]), r"input_ids: .* shape \(3, 0\)"),
    "fractional ids": (put("input_ids", lambda t: t.float()), "input_ids: torch.float32"),
    "ids of a byte": (put("input_ids", lambda t: t.to(torch.uint8)), "input_ids: torch.uint8"),
    "ids of truth": (put("input_ids", lambda t: t.bool()), "input_ids: torch.bool"),
    "other mask": (put("attention_mask", lambda t: t[:, 1:]), r"attention_mask: shape .*, input_ids has"),
    "mask of twos": (put("attention_mask", lambda t: t * 2), "attention_mask: values other than 0 and 1"),
    "mask of NaN": (put("attention_mask", lambda t: t * torch.nan), "attention_mask: values other than 0 and 1"),
    "empty row": (at("attention_mask", 2, 0), "attention_mask: no token at all in row 2"),
    "gap": (at("attention_mask", (0, 3), 0), "attention_mask: gaps between tokens in row 0"),
    "labels of other rows": (put("labels", lambda t: t[:2]), r"labels: shape \(2,\), input_ids has 3 rows"),
    "labels as a column": (put("labels", lambda t: t[:, None]), r"labels: shape \(3, 1\)"),
    "fractional labels": (put("labels", lambda t: t.float()), r"labels: torch.float32; pass whole numbers"),
    "labels of truth": (put("labels", lambda t: t.bool()), "labels: torch.bool"),
    "label 2": (at("labels", 1, 2), "labels: 2 among them; pass 0 or 1"),
    "label -100": (at("labels", 1, -100), "labels: -100 among them"),
    "token beyond": (at("input_ids", (0, 0), 10**6), r"input_ids: \d+ to 1000000, this checkpoint has 0 to \d+"),
    "token below": (at("input_ids", (0, 0), -1), r"input_ids: -1 to"),
    "no pixels": (without("pixel_values"), r"pixel_values: missing, though the batch has \d+ image tokens"),
    "no grid": (without("image_grid_thw"), "image_grid_thw: missing"),
    "pixels as a list": (put("pixel_values", lambda t: t.tolist()), "pixel_values: missing"),
    "grid as a list": (put("image_grid_thw", lambda t: t.tolist()), "image_grid_thw: missing"),
    "grid of pairs": (put("image_grid_thw", lambda t: t[:, 1:]), r"image_grid_thw: torch.int64 of shape \(3, 2\)"),
    "flat grid": (put("image_grid_thw", lambda t: t.flatten()), r"image_grid_thw: .* shape \(9,\)"),
    "empty grid": (put("image_grid_thw", lambda t: t[:0]), r"image_grid_thw: .* shape \(0, 3\)"),
    "fractional grid": (put("image_grid_thw", lambda t: t.float()), "image_grid_thw: torch.float32"),
    "odd grid": (at("image_grid_thw", (0, 1), 3), "image_grid_thw: .* heights and widths are multiples of 2"),
    "zero grid": (at("image_grid_thw", (0, 0), 0), "image_grid_thw: .* above 0"),
    "too few patches": (put("pixel_values", lambda t: t[1:]), r"pixel_values: .* has \d+ patches of 1176"),
    "shorter patches": (put("pixel_values", lambda t: t[:, 1:]), "pixel_values: .* patches of 1176"),
    "stacked pixels": (put("pixel_values", lambda t: t[None]), "pixel_values: .* patches of 1176"),
    "whole pixels": (put("pixel_values", lambda t: t.long()), "pixel_values: torch.int64 .* floating-point"),
    "pictures in another order": (put("image_grid_thw", lambda t: t.flip(0)), "input_ids: image tokens in runs of"),
    "an image token less": (lambda batch: last_image_token(batch, 5), "input_ids: image tokens in runs of"),
    "image tokens as padding": (
        lambda batch: batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, image_token(batch)),
        "input_ids: image tokens where attention_mask is 0",
    ),
}  # fmt: skip


def image_token(batch) -> int:
    return int(batch["input_ids"][batch["mm_token_type_ids"].bool()][0])


def last_image_token(batch, value) -> None:
    row, column = batch["mm_token_type_ids"].nonzero()[-1].tolist()
    batch["input_ids"][row, column] = value


class TestCheckBatch:
    """What does not fit together is named before anything runs."""

    @pytest.mark.parametrize("name", BROKEN)
    def test_a_batch_that_does_not_fit_is_named_and_changes_nothing(self, model, batch, name):
        change, message = BROKEN[name]
        change(batch)
        before, modes = state_of(model), [module.training for module in model.modules()]
        with pytest.raises(BatchError, match=f"^(batch has )?{message}") as caught:
            train_step(model, adam(model), batch)
        assert "\n" not in str(caught.value)
        assert not changed(model, before)
        assert modes == [module.training for module in model.modules()]

    def test_good_batches_pass(self, backbone, batch):
        check_batch(batch, backbone)
        check_batch(padded_left(batch), backbone)
        check_batch({name: tensor for name, tensor in batch.items() if name != "labels"}, backbone, labels=False)
        check_batch(collate([ROWS[2]], backbone.processor), backbone)

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("input_ids", torch.int32),
            ("attention_mask", torch.bool),
            ("attention_mask", torch.float32),
            ("labels", torch.int32),
            ("labels", torch.uint8),
            ("image_grid_thw", torch.int32),
            ("pixel_values", torch.float64),
        ],
    )
    def test_other_number_types_give_the_same_loss(self, model, batch, name, dtype):
        twin = copy.deepcopy(model)
        wanted = train_step(twin, adam(twin), batch)
        seen = train_step(model, adam(model), {**batch, name: batch[name].to(dtype)})
        assert seen == pytest.approx(wanted, rel=1e-5)


class TestTrainStep:
    """What a step does."""

    def test_the_loss_is_the_cross_entropy_before_the_step(self, model, batch, backbone):
        features = torch.from_numpy(backbone.encode(ROWS, [Tap(-1, "mean")])[:, 0])
        wanted = torch.nn.functional.cross_entropy(model.classifier(features), batch["labels"]).item()
        model.base_model.requires_grad_(True)
        optimizer = adam(model)
        first = train_step(model, optimizer, batch)
        assert first == pytest.approx(wanted, rel=1e-4)
        assert train_step(model, optimizer, batch) < first

    def test_padding_on_the_left_is_the_same_step(self, model, batch):
        model.base_model.requires_grad_(True)
        twin = copy.deepcopy(model)
        assert not torch.equal(padded_left(batch)["input_ids"], batch["input_ids"])
        seen = train_step(model, adam(model), padded_left(batch))
        assert seen == pytest.approx(train_step(twin, adam(twin), batch), rel=1e-5)
        for (name, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            if own.grad is not None:
                scale = other.grad.abs().max().item()
                torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-3 * scale + 1e-9, msg=name)

    def test_a_frozen_base_has_no_gradients_and_does_not_move(self, model, batch):
        model.base_model.requires_grad_(False)
        before = state_of(model)
        train_step(model, adam(model), batch)
        assert all(parameter.grad is None for parameter in model.base_model.parameters())
        assert changed(model, before) == {name for name in before if name.startswith("classifier.")}

    def test_a_trainable_base_moves_in_both_towers(self, model, batch):
        model.base_model.requires_grad_(True)
        before = state_of(model)
        train_step(model, adam(model), batch)
        moved = changed(model, before)
        # Keys' biases shift all scores of a query alike, so their gradient is zero but for rounding.
        assert {
            name for name in before if name not in moved and "k_proj.bias" not in name and "qkv.bias" not in name
        } == set()

    def test_the_gradient_is_clipped(self, model, batch):
        model.base_model.requires_grad_(True)
        with torch.no_grad():
            model.classifier[3].weight *= 1000
        train_step(model, adam(model), batch)
        norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        assert norms.norm().item() == pytest.approx(1.0, rel=1e-3)

    @pytest.mark.parametrize("base_trains", [False, True])
    def test_autocast_runs_and_keeps_pooling_and_head_in_float32(self, model, batch, base_trains):
        model.base_model.requires_grad_(base_trains)
        twin = copy.deepcopy(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = model.backbone.encode_batch(batch, [model.tap])
            logits = model.logits(batch)
        assert features.dtype == logits.dtype == torch.float32
        assert not torch.equal(features, features.bfloat16().float())
        loss = train_step(model, adam(model), batch, autocast=True)
        assert loss == pytest.approx(train_step(twin, adam(twin), batch), rel=0.05)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_loss_that_is_not_finite_changes_nothing(self, model, batch, value):
        with torch.no_grad():
            model.classifier[3].bias[0] = value
        model.base_model.requires_grad_(True)
        before, optimizer = state_of(model), adam(model)
        with pytest.raises(TrainingError, match=r"the loss is .*; lower the learning rate.* nothing was changed"):
            train_step(model, optimizer, batch)
        assert optimizer.state_dict()["state"] == {}
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)

    def test_a_gradient_that_is_not_finite_changes_nothing(self, model, batch):
        model.base_model.requires_grad_(True)
        model.classifier[0].weight.register_hook(lambda gradient: gradient * torch.nan)
        before, optimizer = state_of(model), adam(model)
        with pytest.raises(TrainingError, match="the gradient's norm is nan"):
            train_step(model, optimizer, batch)
        assert not changed(model, before)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_lack_of_memory_ends_in_advice(self, model, batch, monkeypatch):
        monkeypatch.setattr(model, "logits", lambda _batch: torch.empty(2**60))
        with pytest.raises(OutOfMemoryError, match="training on 3 examples"):
            train_step(model, adam(model), batch)


def test_a_weight_is_a_row_that_often():
    rows = torch.tensor([0, 0, 2, 2, 2, 2, 2, 3])
    weights = torch.tensor([2.0, 0.0, 5.0, 1.0], dtype=torch.float64)
    targets = torch.tensor([0, 1, 1, 0])
    logits = torch.tensor([[1.0, -2.0], [0.3, 0.4], [-3.0, 5.0], [2.0, 2.5]], dtype=torch.float64)
    weighted, repeated = (logits.clone().requires_grad_() for _ in range(2))
    value = add_gradients(weighted, targets, weights=weights, focal_gamma=2.0)
    assert value == pytest.approx(add_gradients(repeated[rows], targets[rows], focal_gamma=2.0))
    assert torch.allclose(weighted.grad, repeated.grad)


class TestSpread:
    """A model over several GPUs; here only torch's names of them."""

    @pytest.fixture
    def pair(self, monkeypatch) -> tuple[torch.device, torch.device]:
        devices = torch.device("cuda:0"), torch.device("cuda:1")
        monkeypatch.setattr(Backbone, "devices", devices)
        return devices

    def test_trainer_leaves_it_where_it_is(self, tiny_classifier, pair, tmp_path):
        model = TrainableClassifier(tiny_classifier.backbone, tiny_classifier.tap, tiny_classifier.head)
        trainer = transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
        assert set(model.hf_device_map.values()) == set(pair)
        assert trainer.is_model_parallel
        assert not trainer.place_model_on_device

    @pytest.mark.usefixtures("pair")
    def test_several_processes_do_not_train_it(self, tiny_classifier, scene_rows, monkeypatch, tmp_path):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match=r"'spread:cuda:0,cuda:1' in several processes: .* trains in one process"):
            finetune(tiny_classifier, scene_rows, run=tmp_path / "run")


def test_trainer_places_a_model_on_one_device(tiny_classifier, tmp_path):
    model = TrainableClassifier(tiny_classifier.backbone, tiny_classifier.tap, tiny_classifier.head)
    assert not hasattr(model, "hf_device_map")
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    assert transformers.Trainer(model, arguments).place_model_on_device
