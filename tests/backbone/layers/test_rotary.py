"""Rotary positions compared with transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import apply_rotary_pos_emb

from qwen_vl_classifier.backbone.layers.rotary import rotate


@pytest.mark.parametrize("angles", [16, 4])  # of a head of 16
@pytest.mark.parametrize("gradients", [True, False])
def test_features_with_angles_turn_and_the_others_stay(angles, gradients):
    torch.manual_seed(0)
    states = torch.randn(2, 5, 3, 16)
    turns = torch.randn(2, 5, angles // 2).repeat(1, 1, 2)
    cosine, sine = turns.cos(), turns.sin()
    with torch.set_grad_enabled(gradients):
        seen = rotate(states, (cosine, sine))
    wanted, _ = apply_rotary_pos_emb(states, states, cosine, sine, unsqueeze_dim=2)
    torch.testing.assert_close(seen, wanted)
    assert torch.equal(seen[..., angles:], states[..., angles:])
