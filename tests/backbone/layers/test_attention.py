"""Attention: the mask of packed rows token by token, and our attention compared with transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen_vl_classifier.backbone.layers import varlen
from qwen_vl_classifier.backbone.layers.attention import attend, attend_within_windows, packed_mask
from qwen_vl_classifier.backbone.layers.sequences import sequences_of
from tests.backbone.layers import varlen_definition


def test_suffixes_see_the_prefix_and_themselves_only():
    segments = [[0, 0, 1, 1, 2, -1], [-1, -1, 0, 0, 1, 1]]
    mask = packed_mask(segments, torch.device("cpu"))
    assert mask.shape == (2, 1, 6, 6)
    for row, line in enumerate(segments):
        for query, own in enumerate(line):
            for key, other in enumerate(line):
                sees = key <= query and (other == own or (other == 0 and own != -1))  # padding sees padding
                assert bool(mask[row, 0, query, key]) == sees, (row, query, key)


def test_every_query_sees_something():
    assert packed_mask([[-1, -1, -1]], torch.device("cpu")).any(dim=-1).all()


def test_padding_on_the_left_is_seen_by_padding_only():
    mask = packed_mask([[-1, -1, 0, 0]], torch.device("cpu"))[0, 0]
    assert not mask[2:, :2].any()


@pytest.mark.parametrize("kind", ["free", "causal", "masked"])
@pytest.mark.parametrize("keys", [7, 500])  # below and above the length at which the fused kernel takes over
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_torch(kind, keys, dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, keys, 8, dtype=dtype) for _ in range(3))
    mask = torch.rand(2, 1, keys, keys) < 0.6
    mask |= torch.eye(keys, dtype=torch.bool)
    arguments = {"mask": mask} if kind == "masked" else {"causal": kind == "causal"}
    ours = attend(query, key, value, scale=0.3, **arguments)
    exact = nn.functional.scaled_dot_product_attention(
        *(states.float() for states in (query, key, value)),
        attn_mask=mask if kind == "masked" else None,
        is_causal=kind == "causal",
        scale=0.3,
    )
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), exact, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-2)


def test_under_autocast_products_are_plain_and_gradients_flow():
    query, key, value = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attend(query, key, value, scale=0.3, causal=True)
    output.float().sum().backward()
    assert all(states.grad is not None and states.grad.isfinite().all() for states in (query, key, value))


@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 8, 1, 8, 5]])
def test_windows_of_all_lengths_in_one_call_are_those_of_plain_attention(varlen_anywhere, monkeypatch, lengths):
    torch.manual_seed(0)
    strips = [torch.randn(sum(lengths), 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    windows = sequences_of(lengths, grouped=True)
    together = attend_within_windows(*strips, windows, 0.3)
    assert varlen_definition.calls[-1] == (len(lengths), False)
    monkeypatch.setattr(varlen, "may_run", lambda *_: False)
    varlen_definition.calls.clear()
    for apart in (windows, windows.starts):
        wanted = attend_within_windows(*strips, apart, 0.3)
        assert (together - wanted).abs().max() < 1e-12
        weights = torch.randn_like(wanted)
        gradients = (
            torch.autograd.grad((part * weights).sum(), strips, retain_graph=True) for part in (together, wanted)
        )
        assert max((one - other).abs().max() for one, other in zip(*gradients, strict=True)) < 1e-12
    assert not varlen_definition.calls
