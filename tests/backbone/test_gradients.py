"""Gradients through packed rows are those of transformers' own model on one example at a time, in every family."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qwen_vl_classifier import Backbone, Tap
from qwen_vl_classifier.backbone.encoder import pooled_states
from qwen_vl_classifier.backbone.packing import PackedBatch, pack_together
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

TAPS = [Tap(2, "mean"), Tap(3, "last"), Tap(-1, "mean")]
TOLERANCE = 1e-5  # of a weight's largest gradient, in float32
TOLERANCE_OF_HYBRIDS = 5e-5  # their linear layers part sequences into other chunks, which begin where suffixes do
WRONG = 0.01

Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def loaded(nano_checkpoint, mixed_examples, reference_model) -> tuple[Backbone, PackedBatch, Tensor, Gradients]:
    """A backbone all of which trains, packed examples, what their features are weighed with, and wanted gradients."""
    backbone = Backbone.load(nano_checkpoint[1], device="cpu", dtype="float32")
    backbone.model.requires_grad_(True)
    examples = mixed_examples[:5]  # one picture twice, another, two pictures, none
    encoded = backbone.prepare(examples)
    batch, order = pack_together(backbone.processor, encoded, backbone.device, backbone.hidden_size)
    assert len(batch.input_ids) < len(examples)  # rows are shared
    drawn = np.random.default_rng(0).normal(size=(len(order), len(TAPS), backbone.hidden_size))
    weights = torch.from_numpy(drawn).float()
    reference = reference_model(torch.float32)
    loss = torch.zeros(())
    for number, weight in zip(order, weights, strict=True):
        states = transformers_states(reference, backbone.processor([examples[number]]))
        pooled = [states[tap.layer][-1] if tap.pooling == "last" else states[tap.layer].mean(dim=0) for tap in TAPS]
        loss = loss + (torch.stack(pooled) * weight).sum()
    return backbone, batch, weights, gradients_of(reference, loss)


def transformers_states(model: nn.Module, inputs: dict[str, Tensor]) -> dict[int, Tensor]:
    """Return the states of one example after each layer that is tapped, shape (tokens, hidden)."""
    states: dict[int, Tensor] = {}
    parts = {-1: model.language_model.norm, 2: model.language_model.layers[1], 3: model.language_model.layers[2]}
    hooks = [
        part.register_forward_hook(lambda *call, layer=layer: states.__setitem__(layer, call[-1][0]))
        for layer, part in parts.items()
    ]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


def gradients_of(model: nn.Module, loss: Tensor) -> Gradients:
    """Differentiate by all weights that a loss depends on; the weights' own `grad` stays as it is."""
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def gradients(backbone: Backbone, batch: PackedBatch, weights: Tensor) -> Gradients:
    backbone.model.train()
    found = gradients_of(backbone.model, (pooled_states(backbone.model, batch, TAPS) * weights).sum())
    backbone.model.eval()
    return found


def worst(seen: Gradients, wanted: Gradients) -> float:
    """Return the largest difference of any weight, as a share of that weight's largest gradient."""
    assert seen.keys() == wanted.keys()
    # A bias of keys has none: it adds the same to all scores of a query.
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    return max(
        float((seen[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3 * scale))
        for name, gradient in wanted.items()
    )


def test_packed_rows_have_those_of_single_ones(loaded, nano_checkpoint):
    backbone, batch, weights, wanted = loaded
    family, _ = nano_checkpoint
    trained = ["self_attn.q_proj.weight"]
    trained += ["linear_attn.A_log", "linear_attn.conv1d.weight", "in_proj_a.weight"] if family in nano.HYBRID else []
    trained += ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"] if family in nano.EXPERTS else []
    for ending in trained:  # arrays of experts and routers train like all others
        assert any(name.endswith(ending) and gradient.any() for name, gradient in wanted.items()), ending
    tolerance = TOLERANCE_OF_HYBRIDS if family in nano.HYBRID else TOLERANCE
    assert worst(gradients(backbone, batch, weights), wanted) <= tolerance
    # If rows were one sequence each, texts would see those before them, and it shows.
    assert worst(gradients(backbone, replace(batch, segments=None), weights), wanted) > WRONG
    backbone.enable_gradient_checkpointing()
    assert worst(gradients(backbone, batch, weights), wanted) <= tolerance
