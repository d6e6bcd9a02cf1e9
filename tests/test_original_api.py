"""The original API: every call of its README, and everything that must not go wrong in silence."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from qwen2_5_vl_classifier import ClassifierOutput, Qwen2_5_VLForBinaryClassification, Qwen2_5_VLTrainer
from qwen_vl_classifier import Example
from qwen_vl_classifier.errors import ArtifactError, BatchError, CheckpointError, ImageError, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")

RED, BLUE = (Image.new("RGB", (112, 84), colour) for colour in ("red", "blue"))
EXAMPLES = [
    {"image": RED, "text": "There is a red circle.", "label": 1},
    {"image": BLUE, "text": "Blue.", "label": 0},
    {"image": (RED, BLUE), "text": "Two pictures.", "label": 1},
    {"image": None, "text": "No picture at all.", "label": 0},
]


@pytest.fixture
def model() -> Qwen2_5_VLForBinaryClassification:
    torch.manual_seed(0)
    return Qwen2_5_VLForBinaryClassification(model_name="builtin:tiny", device="cpu", dtype="float32")


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_predict_returns_a_class_or_two_probabilities(model):
    label = model.predict(RED, "There is a red circle.", return_probs=False)
    probabilities = model.predict(RED, "There is a red circle.", return_probs=True)
    assert type(label) is int
    assert len(probabilities) == 2
    assert sum(probabilities) == pytest.approx(1, abs=1e-12)
    assert label == probabilities.index(max(probabilities))
    assert model.predict(None, "text alone") in (0, 1)
    with pytest.raises(ImageError):
        model.predict("missing.png", "text")


def test_predict_is_the_mean_over_all_tokens_through_the_head(model):
    from qwen_vl_classifier import Tap

    features = model.backbone.encode([Example(RED, "a claim")], [Tap(-1, "mean")])
    with torch.inference_mode():
        logits = model.classifier.eval()(torch.from_numpy(features[:, 0]))
    assert model.predict(RED, "a claim", return_probs=True) == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-6)


def test_predict_leaves_modes_as_they_were(model):
    model.train()
    model.base_model.eval()
    model.predict(RED, "text")
    assert model.training
    assert model.classifier.training
    assert not model.base_model.training


def test_freezing_leaves_exactly_the_classifier_to_train(model):
    model.freeze_base_model()
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in model.classifier.parameters()}
    model.unfreeze_base_model()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_training_changes_the_classifier_alone(model):
    model.freeze_base_model()
    before = snapshot(model)
    loss = Qwen2_5_VLTrainer(model, learning_rate=1e-3).train_step(model.collate(EXAMPLES))
    assert type(loss) is float
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"classifier.{name}" for name in model.classifier.state_dict()}
    assert all(parameter.grad is None for parameter in model.base_model.parameters())


def test_unfrozen_training_reaches_the_base_model_and_freezing_stops_it(model):
    trainer = Qwen2_5_VLTrainer(model, learning_rate=1e-5)
    batch = model.collate(EXAMPLES)
    before = snapshot(model.base_model)
    trainer.train_step(batch)
    assert not unchanged(model.base_model, before)
    # Freezing between steps is noticed by a trainer that is already there.
    model.freeze_base_model()
    before = snapshot(model.base_model)
    trainer.train_step(batch)
    assert unchanged(model.base_model, before)
    assert all(parameter.grad is None for parameter in model.base_model.parameters())


def test_loss_falls_in_both_stages(model):
    batch = model.collate(EXAMPLES)
    model.freeze_base_model()
    first = Qwen2_5_VLTrainer(model, learning_rate=1e-3)
    losses = [first.train_step(batch) for _ in range(10)]
    assert losses[-1] < losses[0]
    model.unfreeze_base_model()
    second = Qwen2_5_VLTrainer(model, learning_rate=1e-5)
    later = [second.train_step(batch) for _ in range(5)]
    assert later[-1] < losses[0]


@pytest.mark.parametrize("options", [{"autocast": True}, {"gradient_checkpointing": True}])
def test_options_of_training(options):
    checkpointing = options.pop("gradient_checkpointing", False)
    model = Qwen2_5_VLForBinaryClassification(
        "builtin:tiny", device="cpu", dtype="float32", gradient_checkpointing=checkpointing
    )
    plain = Qwen2_5_VLForBinaryClassification("builtin:tiny", device="cpu", dtype="float32")
    plain.classifier.load_state_dict(model.classifier.state_dict())
    for each in (model, plain):
        each.classifier[2].p = 0.0  # dropout would make the two losses differ
    batch = model.collate(EXAMPLES)
    loss = Qwen2_5_VLTrainer(model, learning_rate=1e-5, **options).train_step(batch)
    assert loss == pytest.approx(Qwen2_5_VLTrainer(plain, learning_rate=1e-5).train_step(batch), abs=0.02)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_weights_that_train_are_float32():
    model = Qwen2_5_VLForBinaryClassification("builtin:tiny", device="cpu", dtype="bfloat16")
    model.freeze_base_model()
    batch = model.collate(EXAMPLES)
    Qwen2_5_VLTrainer(model, learning_rate=1e-3).train_step(batch)
    assert model.backbone.dtype == torch.bfloat16
    model.unfreeze_base_model()
    Qwen2_5_VLTrainer(model, learning_rate=1e-6).train_step(batch)
    assert model.backbone.dtype == torch.float32


def test_fingerprint_follows_the_weights(model):
    before = model.backbone.fingerprint
    batch = model.collate(EXAMPLES)
    model.freeze_base_model()
    Qwen2_5_VLTrainer(model, learning_rate=1e-3).train_step(batch)
    assert model.backbone.fingerprint == before
    model.unfreeze_base_model()
    Qwen2_5_VLTrainer(model, learning_rate=1e-5).train_step(batch)
    assert model.backbone.fingerprint != before


def test_forward_takes_the_tensors_of_a_batch(model):
    batch = model.collate(EXAMPLES)
    output = model(**batch)
    assert isinstance(output, ClassifierOutput)
    assert output.logits.shape == (4, 2)
    assert output.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(output.logits, batch["labels"]).item())
    assert model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).loss is None


@pytest.mark.parametrize("name", ["my_classifier.pth", "my_classifier.safetensors"])
def test_weights_round_trip(model, tmp_path, name):
    path = tmp_path / name
    model.save_classifier_weights(path)
    other = Qwen2_5_VLForBinaryClassification("builtin:tiny", device="cpu", dtype="float32")
    assert not torch.equal(other.classifier[0].weight, model.classifier[0].weight)
    other.load_pretrained_weights(str(path))
    assert unchanged(other.classifier, snapshot(model.classifier))


class Trap:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def bad_weights(kind: str, good: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write a file of weights that must be refused."""
    path = folder / f"{kind}.pth"
    if kind == "missing file":
        return path
    if kind in ("hostile pickle", "raw pickle"):
        trap = {**good, "0.bias": Trap(folder / "sprung")}
        if kind == "raw pickle":
            path.write_bytes(pickle.dumps(trap))
        else:
            torch.save(trap, path)
        return path
    if kind in ("empty", "rubbish"):
        path.write_bytes(b"" if kind == "empty" else b"PK\x03\x04rubbish" * 10)
        return path
    if kind == "truncated safetensors":
        path = path.with_suffix(".safetensors")
        save_file(good, path)
        path.write_bytes(path.read_bytes()[:-100])
        return path
    weights: object = dict(good)
    if kind == "missing key":
        del weights["3.bias"]
    elif kind == "extra key":
        weights["4.weight"] = torch.zeros(2)
    elif kind == "other hidden size":
        weights["0.weight"] = torch.zeros(512, 64)
    elif kind == "other shape":
        weights["3.weight"] = torch.zeros(3, 512)
    elif kind == "whole numbers":
        weights["3.bias"] = torch.zeros(2, dtype=torch.long)
    elif kind == "NaN":
        weights["3.bias"] = torch.full((2,), float("nan"))
    elif kind == "a list":
        weights = list(good.values())
    torch.save(weights, path)
    return path


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("missing file", "no such file"),
        ("hostile pickle", "not a file of classifier weights"),
        ("raw pickle", "not a file of classifier weights"),
        ("empty", "not a file of classifier weights"),
        ("rubbish", "not a file of classifier weights"),
        ("truncated safetensors", "not a file of classifier weights"),
        ("missing key", "3.bias"),
        ("extra key", "4.weight"),
        ("other hidden size", r"\(512, 64\)"),
        ("other shape", r"\(3, 512\)"),
        ("whole numbers", "3.bias"),
        ("NaN", "3.bias"),
        ("a list", "list"),
    ],
)
def test_bad_weights_are_named_and_change_nothing(model, tmp_path, kind, named):
    before = snapshot(model)
    path = bad_weights(kind, snapshot(model.classifier), tmp_path)
    with pytest.raises(ArtifactError, match=named) as caught:
        model.load_pretrained_weights(path)
    assert "\n" not in str(caught.value)
    assert unchanged(model, before)
    assert not (tmp_path / "sprung").exists()


def test_weights_that_cannot_be_written(model, tmp_path):
    for name in ("no/such/folder/w.pth", "no/such/folder/w.safetensors"):
        with pytest.raises(ArtifactError, match="cannot be written"):
            model.save_classifier_weights(tmp_path / name)


def test_a_broken_batch_changes_nothing(model):
    trainer = Qwen2_5_VLTrainer(model, learning_rate=1e-3)
    batch = model.collate(EXAMPLES)
    before = snapshot(model)
    for key in ("input_ids", "attention_mask", "labels", "pixel_values", "image_grid_thw"):
        with pytest.raises(BatchError, match=key):
            trainer.train_step({name: tensor for name, tensor in batch.items() if name != key})
    with pytest.raises(BatchError, match="labels: 2"):
        trainer.train_step({**batch, "labels": torch.tensor([0, 1, 2, 0])})
    assert unchanged(model, before)


def test_token_types_are_derived_and_never_trusted(model):
    model.eval()
    batch = model.collate(EXAMPLES)
    wanted = model(**batch).logits
    wrong = {**batch, "mm_token_type_ids": torch.zeros_like(batch["input_ids"])}
    assert torch.equal(model(**wrong).logits, wanted)


def test_a_loss_that_is_not_finite_changes_nothing(model):
    with torch.no_grad():
        model.classifier[3].bias[0] = float("inf")
    before = snapshot(model)
    with pytest.raises(TrainingError, match="loss is"):
        Qwen2_5_VLTrainer(model, learning_rate=1e-3).train_step(model.collate(EXAMPLES))
    assert unchanged(model, before)


def test_default_model_is_the_one_of_the_original_readme():
    with pytest.raises(CheckpointError, match=r"Qwen/Qwen2-VL-2B-Instruct.*hub cannot be reached"):
        Qwen2_5_VLForBinaryClassification()


def test_every_family_trains_and_predicts(nano_checkpoint):
    family, folder = nano_checkpoint
    model = Qwen2_5_VLForBinaryClassification(folder, device="cpu", dtype="float32")
    assert model.backbone.family.model_type == family
    loss = Qwen2_5_VLTrainer(model, learning_rate=1e-5).train_step(model.collate(EXAMPLES))
    assert 0 < loss < 20
    assert sum(model.predict(RED, "text", return_probs=True)) == pytest.approx(1)


def test_a_damaged_pickle_is_refused_or_read_and_nothing_else(model, tmp_path):
    """Unpicklers raise nearly anything on a flipped byte; what a caller sees is one error."""
    path = tmp_path / "weights.pth"
    model.save_classifier_weights(path)
    content = path.read_bytes()
    refused = 0
    for place in (*range(0, 1500, 11), *range(len(content) - 800, len(content), 11)):
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            model.load_pretrained_weights(path)
        except ArtifactError:
            refused += 1
    assert refused > 50


def test_a_broken_batch_leaves_type_modes_and_fingerprint():
    model = Qwen2_5_VLForBinaryClassification("builtin:tiny", device="cpu", dtype="bfloat16")
    fingerprint = model.backbone.fingerprint
    modes = [module.training for module in model.modules()]
    with pytest.raises(BatchError):
        Qwen2_5_VLTrainer(model, learning_rate=1e-5).train_step({})
    assert model.backbone.dtype == torch.bfloat16
    assert model.backbone.fingerprint == fingerprint
    assert modes == [module.training for module in model.modules()]


def test_a_failed_step_in_float32_is_told_by_the_fingerprint():
    model = Qwen2_5_VLForBinaryClassification("builtin:tiny", device="cpu", dtype="bfloat16")
    fingerprint = model.backbone.fingerprint
    with torch.no_grad():
        model.classifier[3].bias[0] = float("nan")
    with pytest.raises(TrainingError):
        Qwen2_5_VLTrainer(model, learning_rate=1e-5).train_step(model.collate(EXAMPLES))
    assert model.backbone.dtype == torch.float32  # made ready for training: features differ in their last bits
    assert model.backbone.fingerprint != fingerprint


def test_other_whole_numbers_are_labels_too(model):
    batch = model.collate(EXAMPLES)
    wanted = model.eval()(**batch).loss.item()
    assert model(**{**batch, "labels": batch["labels"].int()}).loss.item() == pytest.approx(wanted, rel=1e-6)


def test_all_weights_frozen_is_one_clear_line(model):
    batch = model.collate(EXAMPLES)
    trainer = Qwen2_5_VLTrainer(model)
    trainer.train_step(batch)
    model.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(TrainingError, match="all weights of the model are frozen") as caught:
        trainer.train_step(batch)
    assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match="frozen"):
        Qwen2_5_VLTrainer(model).train_step(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.classifier.requires_grad_(True)
    assert trainer.train_step(batch) > 0


@pytest.mark.parametrize(
    "label", [np.array([1]), np.array([[1]]), torch.tensor([1]), torch.tensor(1), np.float32(1), True]
)
def test_a_label_may_be_one_number_in_an_array(model, label):
    assert model.collate([{**EXAMPLES[0], "label": label}])["labels"].tolist() == [1]


@pytest.mark.parametrize(
    "label", [np.array([1, 0]), torch.tensor([]), [1], "1", None, np.nan, 2, np.array([[1, 2], [3, 4]])]
)
def test_a_label_that_is_no_class_is_named_in_one_line(model, label):
    with pytest.raises(BatchError, match=r"example 1: label .*; give 0 or 1") as caught:
        model.collate([EXAMPLES[0], {**EXAMPLES[0], "label": label}])
    assert "\n" not in str(caught.value)
