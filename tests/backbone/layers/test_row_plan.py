"""Packed rows as sequences, compared with attention under the mask of the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.layers.attention import packed_mask
from qwen_vl_classifier.backbone.layers.row_plan import plan_rows, strip_of
from qwen_vl_classifier.backbone.layers.varlen import run_varlen, ways
from tests.backbone.layers.varlen_definition import calls

CPU = torch.device("cpu")
HEADS, KEY_HEADS, HEAD = 4, 2, 16


def random_segments(seed: int) -> list[list[int]]:
    """Draw one to five rows: some without a prefix, some without suffixes, some with holes, padded on either side."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(random.integers(1, 6)):
        row = [0] * int(random.integers(0, 30) if random.random() < 0.8 else 0)
        for suffix in range(1, int(random.integers(0 if row else 1, 6)) + 1):
            row += [suffix] * int(random.integers(1, 12))
        if seed % 10 == 0:
            row.insert(int(random.integers(0, len(row))), -1)
        rows.append(row)
    if seed % 5 == 0:
        rows.append([0] * 7)
    length = max(map(len, rows)) + (seed % 3 == 0)
    left = seed % 4 == 0
    return [[-1] * (length - len(row)) * left + row + [-1] * (length - len(row)) * (not left) for row in rows]


def drawn(rows: int, length: int) -> list[Tensor]:
    """Draw queries, keys and values of float64, shape (rows, heads, length, head)."""
    torch.manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    return [torch.randn(rows, count, length, HEAD, dtype=torch.float64, requires_grad=True) for count in heads]


def by_plan(segments: list[list[int]] | None, inputs: list[Tensor]) -> Tensor:
    rows, _, length, _ = inputs[0].shape
    plan = plan_rows(segments, rows, length, ways(HEADS // KEY_HEADS)[0]).to(inputs[0].device)
    strips = (part.transpose(1, 2).flatten(0, 1) for part in inputs)
    return plan.attend(*strips, scale=0.3).view(rows, length, HEADS, HEAD)


def by_mask(mask: Tensor | None, inputs: list[Tensor]) -> Tensor:
    query, key, value = inputs
    key, value = (part.repeat_interleave(HEADS // KEY_HEADS, dim=1) for part in (key, value))
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=0.3
    )
    return output.transpose(1, 2)


def assert_equal(seen: Tensor, wanted: Tensor, inputs: list[Tensor], tokens: Tensor) -> None:
    assert (seen - wanted)[tokens].abs().max() < 1e-12
    weights = torch.randn_like(wanted) * tokens[..., None, None]
    pairs = zip(*(torch.autograd.grad((part * weights).sum(), inputs) for part in (seen, wanted)), strict=True)
    assert max((one - other).abs().max() for one, other in pairs) < 1e-12


@pytest.mark.parametrize("seed", range(40))
def test_packed_rows_see_what_their_mask_lets_them_see(varlen_anywhere, seed):
    segments = random_segments(seed)
    inputs = drawn(len(segments), len(segments[0]))
    tokens = torch.tensor(segments) >= 0
    assert_equal(by_plan(segments, inputs), by_mask(packed_mask(segments, CPU), inputs), inputs, tokens)
    assert [causal for _, causal in calls] == [True]


def test_rows_without_segments_are_causal(varlen_anywhere):
    inputs = drawn(3, 11)
    everything = torch.ones(3, 11, dtype=torch.bool)
    assert_equal(by_plan(None, inputs), by_mask(None, inputs), inputs, everything)


def test_only_shared_keys_are_gathered():
    plan = plan_rows([[0, 0, 0, 1, 1, 2, 2, -1]], 1, 8, run_varlen)
    assert plan.queries.starts.tolist() == [0, 5, 7, 8]  # the prefix with the first suffix, the second, padding
    assert plan.keys.starts.tolist() == [0, 5, 10, 11]
    assert plan.places is not None
    assert plan.places.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    alone = plan_rows([[0, 0, 1, -1], [-1, 0, 0, 0], [1, 1, 2, 2]], 3, 4, run_varlen)
    assert alone.places is None
    assert alone.keys is alone.queries


def test_a_plan_moves(varlen_anywhere):
    plan = plan_rows([[0, 1, 2]], 1, 3, run_varlen).to("meta")
    assert plan.queries.starts.device.type == plan.places.device.type == "meta"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_gradients_of_shared_keys_are_summed_precisely(varlen_anywhere, device):
    segments = [[0] * 4 + list(range(1, 200))]
    rounded = [part.detach().to(device, torch.bfloat16).requires_grad_() for part in drawn(1, len(segments[0]))]
    exact = [part.detach().double().cpu().requires_grad_() for part in rounded]
    gradients = [torch.autograd.grad(by_plan(segments, inputs).sum(), inputs[2])[0] for inputs in (rounded, exact)]
    seen, wanted = (gradient[:, :, :4].double().cpu() for gradient in gradients)
    assert (seen - wanted).norm() < 5e-3 * wanted.norm()


def test_a_strip_has_no_padding_and_goes_back_into_rows():
    segments = np.array([[0, 0, 1, -1, -1], [-1, 0, 1, 2, 2]])
    strip = strip_of(segments)
    assert strip is not None
    assert strip.segments == [[0, 0, 1], [0, 1, 2, 2]]
    rows = torch.arange(20.0).view(2, 5, 2)
    taken = strip.take(rows)
    assert taken.shape == (1, 7, 2)
    assert torch.equal(strip.put(taken)[torch.from_numpy(segments >= 0)], rows[torch.from_numpy(segments >= 0)])
    assert strip_of(segments[:, 1:3]) is None


def test_rows_of_a_strip_see_what_they_see_in_padded_rows(varlen_anywhere):
    segments = [[0, 0, 0, 1, 1, 2, -1, -1], [0, 1, 2, 3, 3, 3, 3, 4], [0, 0, -1, -1, -1, -1, -1, -1]]
    inputs = drawn(3, 8)
    strip = strip_of(np.array(segments))
    assert strip is not None
    plan = plan_rows(strip.segments, 1, 16, ways(HEADS // KEY_HEADS)[0])
    strips = (strip.take(part.transpose(1, 2))[0] for part in inputs)
    seen = strip.put(plan.attend(*strips, scale=0.3).flatten(1).unsqueeze(0)).view(3, 8, HEADS, HEAD)
    wanted = by_plan(segments, inputs)
    tokens = torch.tensor(segments) >= 0
    assert_equal(seen, wanted, inputs, tokens)
