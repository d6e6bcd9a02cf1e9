"""Joined and padded products, as GPUs run them, with torch's operators on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionBlock

from qwen_vl_classifier import Backbone, Tap
from qwen_vl_classifier.backbone.adapters import add_adapter, merge_adapter
from qwen_vl_classifier.backbone.layers import fused
from qwen_vl_classifier.backbone.layers.attention import use_faster_attention
from qwen_vl_classifier.backbone.layers.joined import join_layers, joined_layers
from qwen_vl_classifier.backbone.layers.operators import Operators
from qwen_vl_classifier.backbone.towers import train_towers
from tests import nano
from tests.backbone.adapted import LAST, SETTINGS, load_exact, train
from tests.backbone.layers.hybrid import as_model

TAPS = [Tap(1, "mean"), Tap(-1, "mean"), Tap(-1, "last")]
PADDED = {"intermediate_size": 61}  # 244 bytes in float32


@pytest.fixture(autouse=True)
def _as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "operators_for", lambda *_: Operators())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose vision MLP is padded."""
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("padded") / "model", vision_config=PADDED)


def loaded(folder: Path, *, joined: bool = True) -> Backbone:
    backbone = load_exact(folder)
    if joined:
        join_layers(backbone.model)
        assert count(backbone.model)
    return backbone


def count(model: nn.Module) -> int:
    return sum(joined_layers(module) is not None for module in model.modules())


def memory(model: nn.Module) -> int:
    """Count the bytes of the weights and of what is joined, each byte once."""
    tensors = list(model.parameters())
    for module in model.modules():
        joined = joined_layers(module)
        if joined is not None:
            tensors += [joined.together.weight, *([joined.last.weight] if joined.last else [])]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def difference(seen, wanted) -> float:
    return float(abs(seen - wanted).max() / abs(wanted).max())


def test_features_are_those_of_the_checkpoint(nano_checkpoint, mixed_examples, monkeypatch):
    wanted = loaded(nano_checkpoint[1], joined=False).encode(mixed_examples, TAPS)
    assert difference(loaded(nano_checkpoint[1]).encode(mixed_examples, TAPS), wanted) <= 1e-5


def test_each_decoder_layer_with_full_attention_and_each_gated_mlp_is_joined(nano_checkpoint):
    family, folder = nano_checkpoint
    attention = 1 if family in nano.HYBRID else nano.NUM_LAYERS
    mlps = 0 if family in nano.EXPERTS else nano.NUM_LAYERS
    assert count(loaded(folder).model) == attention + mlps + (3 if family == "qwen2_5_vl" else 0)


def test_padding_gives_the_same_features_in_little_more_memory(folder, mixed_examples):
    plain, joined = loaded(folder, joined=False), loaded(folder)
    assert difference(joined.encode(mixed_examples, TAPS), plain.encode(mixed_examples, TAPS)) <= 1e-5
    hidden, inner, blocks = 32, 61, 3
    padding = blocks * (128 - inner) * (3 * hidden + 2) * torch.float32.itemsize
    assert memory(joined.model) <= memory(plain.model) + padding
    weights = {name: weight.shape for name, weight in plain.model.state_dict().items()}
    assert {name: weight.shape for name, weight in joined.model.state_dict().items()} == weights


def test_the_padded_mlp_of_qwen2_5_vl_is_equal_to_the_last_bit_in_bfloat16():
    config = Qwen2_5_VLVisionConfig(hidden_size=128, intermediate_size=3420, num_heads=2)
    config._attn_implementation = "sdpa"
    block = Qwen2_5_VLVisionBlock(config, "sdpa").bfloat16().eval().requires_grad_(False)
    model = as_model(nn.Module())
    model.language_model.layers, model.language_model.config = [], config
    model.visual.blocks = nn.ModuleList([copy.deepcopy(block)])
    use_faster_attention(model)
    fused.fuse_layers(model)
    join_layers(model)
    (ours,) = model.visual.blocks
    joined = joined_layers(ours.mlp)
    assert joined.sizes == (3456, 3456)
    assert joined.last.weight.shape == (128, 3456)
    states = torch.randn(30, 128).bfloat16()
    with torch.no_grad():
        seen = fused._mlp_plus(Operators(), states, ours.mlp, torch.zeros_like(states))
        assert torch.equal(seen, block.mlp(states))
        joined.last.weight[:, -1] = joined.together.weight[3455] = joined.together.weight[-1] = 1
        assert not torch.equal(fused._mlp_plus(Operators(), states, ours.mlp, torch.zeros_like(states)), seen)


def test_what_is_saved_after_a_pass_is_the_checkpoint(folder, scene_rows, tmp_path):
    plain, joined = loaded(folder, joined=False), loaded(folder)
    joined.encode(scene_rows[:2], TAPS)
    assert joined.fingerprint == plain.fingerprint
    for backbone in (plain, joined):
        backbone.mark_changed()
    assert joined.fingerprint == plain.fingerprint  # digests of tensors now
    for name, backbone in (("plain", plain), ("joined", joined)):
        backbone.save(tmp_path / name)
    assert joined.fingerprint == plain.fingerprint
    seen, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("joined", "plain"))
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[name], wanted[name]) for name in wanted)


def step(backbone: Backbone, rows: list) -> None:
    """Train all weights by one step."""
    train_towers(backbone, "all", LAST)
    optimizer = torch.optim.AdamW([weight for weight in backbone.model.parameters() if weight.requires_grad], lr=1e-3)
    backbone.encode_batch(backbone.processor(rows), TAPS).square().mean().backward()
    optimizer.step()
    backbone.model.requires_grad_(False)
    backbone.mark_changed()


def test_full_training_after_a_pass_changes_features_as_it_does_without(folder, scene_rows):
    before = loaded(folder).encode(scene_rows[:4], TAPS)
    results = []
    for joined in (True, False):
        backbone = loaded(folder, joined=joined)
        backbone.encode(scene_rows[:4], TAPS)
        step(backbone, scene_rows[:2])
        assert all(weight.is_contiguous() for weight in backbone.model.parameters())
        results.append(backbone.encode(scene_rows[:4], TAPS))
    assert difference(*results) <= 1e-5
    assert difference(results[0], before) >= 1e-3


def test_an_adapter_and_merging_it_change_features_as_they_do_without(folder, scene_rows):
    results = []
    for joined in (True, False):
        backbone = loaded(folder, joined=joined)
        features = [backbone.encode(scene_rows[:4], TAPS)]
        add_adapter(backbone, **SETTINGS)
        features.append(train(backbone).encode(scene_rows[:4], TAPS))
        merge_adapter(backbone)
        features.append(backbone.encode(scene_rows[:4], TAPS))
        results.append(features)
    for seen, wanted in zip(*results, strict=True):
        assert difference(seen, wanted) <= 1e-5
    assert difference(results[0][2], results[0][0]) >= 1e-3


def test_a_weight_that_changes_in_place_changes_the_product(folder, scene_rows):
    results = []
    for joined in (True, False):
        backbone = loaded(folder, joined=joined)
        layer, block = backbone.model.language_model.layers[0], backbone.model.visual.blocks[0]
        with torch.no_grad():
            for weight in (layer.self_attn.k_proj.weight, layer.mlp.up_proj.weight, block.mlp.down_proj.weight):
                weight.mul_(-2)
        results.append(backbone.encode(scene_rows[:4], TAPS))
    assert difference(*results) <= 1e-5


@pytest.mark.parametrize("place", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "vision mlp.down_proj"])
def test_a_layer_that_is_replaced_is_never_passed_over(folder, scene_rows, place):
    results = []
    for joined in (True, False):
        backbone = loaded(folder, joined=joined)
        parent, _, leaf = place.removeprefix("vision ").rpartition(".")
        layers = backbone.model.visual.blocks if "vision" in place else backbone.model.language_model.layers
        module = layers[1].get_submodule(parent)
        layer = copy.deepcopy(getattr(module, leaf))
        layer.weight.data.mul_(-2)
        setattr(module, leaf, layer)
        results.append(backbone.encode(scene_rows[:4], TAPS))
        assert joined_layers(module) is None
    assert difference(*results) <= 1e-5


@pytest.mark.parametrize("move", [nn.Module.double, copy.deepcopy, lambda model: model.to("meta")])
def test_a_model_that_moves_forgets_what_was_joined(folder, move):
    model = loaded(folder).model
    moved = move(model)
    assert count(moved) == 0
    assert moved.state_dict().keys() == load_exact(folder).model.state_dict().keys()


def test_a_pass_with_gradients_forgets_what_has_been_replaced(folder, scene_rows):
    backbone = loaded(folder)
    backbone.model.double().float().requires_grad_(True)
    backbone.encode_batch(backbone.processor(scene_rows[:1]), TAPS)
    assert not any("joined" in vars(module) for module in backbone.model.modules())
