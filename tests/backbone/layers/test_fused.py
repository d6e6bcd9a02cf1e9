"""Layers in fewer passes against transformers' own, and when they step aside."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from qwen_vl_classifier import Backbone, Tap
from qwen_vl_classifier.backbone.layers import fused
from qwen_vl_classifier.backbone.layers.attention import use_faster_attention
from qwen_vl_classifier.backbone.layers.chosen_operators import VARIABLE
from qwen_vl_classifier.backbone.layers.operators import has_fused_linear
from tests.backbone.layers.hybrid import FOLDERS, HIDDEN, as_model, decoder, run_layers

TAPS = [Tap(1, "mean"), Tap(-1, "mean"), Tap(-1, "last")]


@pytest.fixture(scope="module")
def backbone(nano_checkpoint) -> Backbone:
    return Backbone.load(nano_checkpoint[1], device="cpu", dtype="float32")


def undo(model: nn.Module) -> None:
    """Give every layer transformers' own forward again."""
    for module in model.modules():
        if hasattr(module, "own_forward"):
            module.forward = module.own_forward


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often an MLP runs in the short way."""
    calls: list[int] = []
    run = fused._mlp_plus
    monkeypatch.setattr(fused, "_mlp_plus", lambda *states: calls.append(1) or run(*states))
    return calls


@pytest.mark.parametrize("fusing", [True, False])
def test_layers_give_what_transformers_gives(backbone, nano_checkpoint, mixed_examples, monkeypatch, fusing):
    calls = counted(monkeypatch)
    if not fusing:
        monkeypatch.setenv(VARIABLE, "torch")
    seen = backbone.encode(mixed_examples, TAPS)
    blocks = len(backbone.model.visual.blocks) + backbone.num_layers
    assert len(calls) >= blocks
    plain = Backbone.load(nano_checkpoint[1], device="cpu", dtype="float32")
    undo(plain.model)
    before = len(calls)
    wanted = plain.encode(mixed_examples, TAPS)
    assert len(calls) == before
    assert abs(seen - wanted).max() <= 1e-5 * abs(wanted).max()


@pytest.mark.parametrize("fusing", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FOLDERS)
def test_gates_experts_and_linear_layers_give_what_transformers_gives(kind, dtype, fusing, monkeypatch):
    """In bfloat16, results are two roundings of what float32 gives: neither may be further from it than the other."""
    calls = counted(monkeypatch)
    if not fusing:
        monkeypatch.setenv(VARIABLE, "torch")
    plain, model = decoder(kind).to(dtype), as_model(decoder(kind).to(dtype))
    use_faster_attention(model)
    fused.fuse_layers(model)
    states = torch.randn(2, 40, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.arange(40).expand(2, 40)
    masks = {"full": None, "linear": None}
    exact = run_layers(decoder(kind).to(dtype).float(), states.float(), positions, masks)
    wanted = run_layers(plain, states, positions, masks)
    assert not calls
    with torch.no_grad():
        seen = run_layers(model.language_model, states, positions, masks)
    assert len(calls) == len(plain.layers)
    assert seen.dtype == dtype
    errors = [(output.float() - exact).square().mean().sqrt() for output in (seen, wanted)]
    if dtype == torch.float32:
        assert (seen - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    else:
        assert errors[0] <= 1.2 * errors[1]


def test_with_gradients_transformers_own_layers_run(backbone, scene_rows, monkeypatch):
    calls = counted(monkeypatch)
    inputs = backbone.processor(scene_rows[:2])
    backbone.model.requires_grad_(True)
    try:
        backbone.encode_batch(inputs, TAPS).sum().backward()
        assert all(
            parameter.grad is not None and parameter.grad.isfinite().all()
            for name, parameter in backbone.model.named_parameters()
            if ".mlp." in name
        )
    finally:
        backbone.model.requires_grad_(False)
        backbone.model.zero_grad()
    assert not calls


def test_a_layer_that_is_not_plain_is_never_passed_over(nano_checkpoint, scene_rows):
    """An adapter, for example, replaces a linear layer by one that adds to it."""

    class Doubled(nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(states)

    changed, expected = (Backbone.load(nano_checkpoint[1], device="cpu", dtype="float32") for _ in range(2))
    layer = changed.model.language_model.layers[-1].self_attn
    doubled = Doubled(layer.o_proj.in_features, layer.o_proj.out_features, bias=False)
    doubled.weight = layer.o_proj.weight
    layer.o_proj = doubled
    with torch.no_grad():
        expected.model.language_model.layers[-1].self_attn.o_proj.weight.mul_(2)
    seen, wanted = (each.encode(scene_rows[:3], TAPS) for each in (changed, expected))
    assert abs(seen - wanted).max() <= 1e-5 * abs(wanted).max()


def test_what_comes_without_a_name_is_left_to_transformers(backbone, monkeypatch):
    calls = counted(monkeypatch)
    layer = backbone.model.language_model.layers[-1]
    states = torch.randn(1, 6, backbone.hidden_size)
    rotary = backbone.model.language_model.rotary_emb(states, torch.arange(6).expand(3, 1, 6))
    mask = torch.eye(6, dtype=torch.bool)[None, None]
    second = next(name for name in inspect.signature(layer.own_forward).parameters if name != "hidden_states")
    named = {"attention_mask": mask, "position_embeddings": rotary}
    with torch.no_grad():
        wanted = layer(states, **named)
        assert len(calls) == 1
        seen = layer(states, named.pop(second), **named)
        assert len(calls) == 1
        causal = layer(states, attention_mask=None, position_embeddings=rotary)
    torch.testing.assert_close(seen, wanted)
    assert not torch.allclose(causal, wanted, atol=1e-2)


def test_weights_stay_where_they_are(backbone):
    """Nothing is merged or copied: names and number of weights are those of the checkpoint."""
    undone = {name for name, _ in backbone.model.named_parameters()}
    assert undone == set(backbone.model.state_dict())
    assert not any("own_forward" in name for name in undone)


def test_the_operators_of_this_torch_are_found():
    """If this fails after an update of torch, encoding is still right, but slower."""
    assert has_fused_linear(torch.float32)


def test_a_product_embeds_patches_as_the_convolution_does_with_its_gradients(backbone, scene_rows):
    embedding = backbone.model.visual.patch_embed
    patches = backbone.processor(scene_rows[:2])["pixel_values"]
    weight = embedding.proj.weight
    results = []
    weight.requires_grad_(True)
    try:
        for forward in (embedding.forward, embedding.own_forward):
            output = forward(patches)
            (gradient,) = torch.autograd.grad(output.square().sum(), weight)
            results.append((output.detach(), gradient))
    finally:
        weight.requires_grad_(False)
    for seen, wanted in zip(*results, strict=True):
        assert (seen - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])  # with torch's own norms, and transformers'
def test_a_frozen_tower_runs_fast_in_training_too(nano_folder, scene_rows, monkeypatch, family):
    """Autocast to the type that weights and states have changes nothing."""
    calls = counted(monkeypatch)
    model = Backbone.load(nano_folder(family), device="cpu", dtype="bfloat16").model
    patches = torch.randn(24, 3 * 2 * 14 * 14, dtype=torch.bfloat16)
    grid = torch.tensor([[1, 4, 6]])
    with torch.no_grad():
        wanted = model.visual(patches, grid).pooler_output
        assert len(calls) == len(model.visual.blocks)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = model.visual(patches, grid).pooler_output
        assert len(calls) == 2 * len(model.visual.blocks)
        model.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.visual(patches.float(), grid)
        assert len(calls) == 2 * len(model.visual.blocks)
    assert (seen - wanted).norm() <= 1e-2 * wanted.norm()
