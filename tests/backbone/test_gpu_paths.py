"""The paths that only GPUs take, on the CPU by their definition, and on a GPU if there is one."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_vl_classifier import Backbone, Tap
from qwen_vl_classifier.backbone.encoder import pooled_states
from qwen_vl_classifier.backbone.layers import fused, varlen
from qwen_vl_classifier.backbone.layers.joined import join_layers
from qwen_vl_classifier.backbone.layers.kinds import masked_part
from qwen_vl_classifier.backbone.layers.operators import Operators
from qwen_vl_classifier.backbone.packing import pack_together
from tests import nano
from tests.backbone.layers import varlen_definition
from tests.reference import assert_close, by_hand

pytestmark = pytest.mark.usefixtures("one_thread")

TAPS = [Tap(1, "mean"), Tap(-1, "last")]


@pytest.fixture(scope="module")
def reference(nano_backbone, reference_model, mixed_examples):
    backbone = nano_backbone(torch.float32)
    return backbone, by_hand(reference_model(torch.float32), backbone.processor, mixed_examples, TAPS)


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_attention_of_many_lengths_equals_transformers(
    varlen_anywhere, nano_checkpoint, reference, mixed_examples, share_prefixes
):
    backbone, wanted = reference
    rows: list[int] = []
    hook = backbone.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, states: rows.append(len(states[0]))
    )
    assert_close(backbone.encode(mixed_examples, TAPS, share_prefixes=share_prefixes, token_budget=4000), wanted)
    hook.remove()
    assert max(rows) == 1 or nano_checkpoint[0] in nano.HYBRID  # rows of several lengths in one strip
    assert {causal for _, causal in varlen_definition.calls} == {False, True}  # both towers


def test_all_texts_of_a_picture_share_its_row(request, nano_checkpoint, nano_backbone):
    """Without a mask, texts that do not see each other cost nothing but themselves."""
    backbone = nano_backbone(torch.float32)
    layers, states = backbone.model.language_model.layers, torch.zeros(1)
    assert masked_part(layers, states) == (0.25 if nano_checkpoint[0] in nano.HYBRID else 1)
    request.getfixturevalue("varlen_anywhere")
    assert masked_part(layers, states) == 0


def test_gradients_through_attention_of_many_lengths_are_those_of_masks(request, reference, mixed_examples):
    backbone, _ = reference
    encoded = [backbone.processor.encode(example) for example in mixed_examples]
    packed, _ = pack_together(backbone.processor, encoded, backbone.device, backbone.hidden_size)
    weights = [layer.input_layernorm.weight for layer in backbone.model.language_model.layers]
    gradients = []
    for planned in (False, True):
        if planned:
            request.getfixturevalue("varlen_anywhere")
        with torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            output = pooled_states(backbone.model, packed, [Tap(-1, "mean")]).square().sum()
            gradients.append(torch.autograd.grad(output, weights))
            for weight in weights:
                weight.requires_grad_(False)
    assert varlen_definition.calls
    for seen, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(seen, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=0)


class CopiesFromHost(TorchDispatchMode):
    """The types of all tensors that were copied from the CPU to the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **(options or {}))
        tensors = [part for part in (result, *arguments) if isinstance(part, torch.Tensor)]
        if tensors and tensors[0].device.type == "meta":
            self.types += [part.dtype for part in tensors if part.device.type == "cpu" and part.ndim]
        return result


@pytest.mark.parametrize("fast", [False, True])
def test_nothing_is_read_back_during_a_pass(monkeypatch, nano_backbone, mixed_examples, fast):
    """On the meta device there are no numbers, so whatever reads one fails: `item`, `tolist`, a Boolean index."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the device does not have
    backbone = nano_backbone(torch.float32)
    model = copy.deepcopy(backbone.model).to("meta", torch.bfloat16)
    if fast:
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        monkeypatch.setattr(varlen, "may_run", lambda *_: True)
        monkeypatch.setattr(varlen, "proven_attention", lambda *key: varlen.ways(key[-2])[0])
        monkeypatch.setattr(fused, "operators_for", lambda *_: Operators())
        join_layers(model)
    encoded = [backbone.processor.encode(example) for example in mixed_examples]
    with torch.inference_mode(), CopiesFromHost() as copies:
        packed, _ = pack_together(backbone.processor, encoded, torch.device("meta"), backbone.hidden_size)
        assert packed.segments is not None
        assert pooled_states(model, packed, TAPS).shape == (len(mixed_examples), len(TAPS), backbone.hidden_size)
    assert set(copies.types) == {torch.uint8}  # many tensors joined: a copy of one alone makes the host wait


def test_nothing_is_read_back_during_a_step_of_training(monkeypatch, nano_backbone, mixed_examples):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(varlen, "may_run", lambda *_: True)
    monkeypatch.setattr(varlen, "proven_attention", lambda *key: varlen.ways(key[-2])[0])
    backbone = nano_backbone(torch.float32)
    model = copy.deepcopy(backbone.model).to("meta", torch.bfloat16).requires_grad_(True)
    encoded = [backbone.processor.encode(example) for example in mixed_examples]
    with torch.enable_grad(), CopiesFromHost() as copies:
        packed, _ = pack_together(backbone.processor, encoded, torch.device("meta"), backbone.hidden_size)
        pooled_states(model, packed, TAPS).sum().backward()
    assert model.visual.patch_embed.proj.weight.grad is not None
    assert set(copies.types) == {torch.uint8}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("head", "groups"), [(64, 1), (72, 1), (80, 1), (128, 2), (128, 8), (256, 4)])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_gpu_computes_attention_of_many_lengths(head, groups, gradients):
    states = torch.zeros(1, dtype=torch.bfloat16, device="cuda")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an Ampere GPU or a later one")
    if gradients and head > 192:
        pytest.skip("not every GPU has these gradients")
    with torch.set_grad_enabled(gradients):
        assert varlen.varlen_attention(states, head, groups) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", nano.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_never_waits_for_a_gpu_during_a_pass(tmp_path, mixed_examples, family, dtype):
    if family in nano.EXPERTS and (dtype != "bfloat16" or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("torch's grouped products read sizes back in float32, and before Hopper in bfloat16 too")
    folder = nano.make_checkpoint(family, tmp_path / "checkpoint")
    backbone = Backbone.load(folder, device="cuda", dtype=dtype)
    encoded = [backbone.processor.encode(example) for example in mixed_examples]

    def run() -> torch.Tensor:
        packed, _ = pack_together(backbone.processor, encoded, backbone.device, backbone.hidden_size)
        return pooled_states(backbone.model, packed, TAPS)

    with torch.inference_mode():
        wanted = run()  # compares kernels with torch, once
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(seen, wanted)
