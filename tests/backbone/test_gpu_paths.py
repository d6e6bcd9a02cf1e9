"""The paths that only GPUs take, on the CPU by their definition, and on a GPU if there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Tap
from qwen_vl_classifier.backbone.encoder import pooled_states
from qwen_vl_classifier.backbone.packing import pack_together
from tests.backbone.layers import varlen_definition
from tests.reference import assert_close, by_hand

pytestmark = pytest.mark.usefixtures("one_thread")

TAPS = [Tap(1, "mean"), Tap(-1, "last")]


@pytest.fixture(scope="module")
def reference(nano_backbone, reference_model, mixed_examples):
    backbone = nano_backbone(torch.float32)
    return backbone, by_hand(reference_model(torch.float32), backbone.processor, mixed_examples, TAPS)


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_attention_of_many_lengths_equals_transformers(varlen_anywhere, reference, mixed_examples, share_prefixes):
    backbone, wanted = reference
    assert_close(backbone.encode(mixed_examples, TAPS, share_prefixes=share_prefixes), wanted)
    assert varlen_definition.calls


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
