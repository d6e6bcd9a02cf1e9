"""The gated delta rule in chunks against its definition, token by token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.layers.delta_rule import StateSharing, gated_delta_rule
from tests.backbone.layers.delta_definition import HEADS, SIZE, WIDTH, by_definition, drawn, drawn_states


def assert_equal(seen: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert seen.shape == wanted.shape
    assert (seen.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("from_states", [False, True])
@pytest.mark.parametrize("length", [1, 2, 8, 9, 20, 33, 63, 64, 65, 150])
def test_chunks_give_what_tokens_give_one_by_one(length, from_states):
    inputs = drawn(3, length)
    states = drawn_states(3) if from_states else None
    output, last = gated_delta_rule(*inputs, states=states, final_states=True)
    wanted, wanted_last = by_definition(*inputs, states)
    assert_equal(output, wanted)
    assert_equal(last, wanted_last)
    only, nothing = gated_delta_rule(*inputs, states=states)
    assert torch.equal(only, output)
    assert nothing is None


@pytest.mark.parametrize("length", [5, 100])  # one chunk, and several
def test_sequences_that_share_states_give_what_they_give_with_copies(length):
    owners = torch.tensor([2, 2, 0, 0, 3, 3, 3, 1])
    groups = ((torch.tensor([2, 0]), 2), (torch.tensor([3]), 3), (torch.tensor([1]), 1))
    inputs, states = drawn(len(owners), length), drawn_states(4)
    shared = gated_delta_rule(*inputs, states=states, sharing=StateSharing(owners, groups), final_states=True)
    copied = gated_delta_rule(*inputs, states=states[owners], final_states=True)
    for seen, wanted in zip(shared, copied, strict=True):
        assert_equal(seen, wanted.double(), 1e-6)
    mistaken, _ = gated_delta_rule(*inputs, states=states[owners.flip(0)])
    assert (mistaken - copied[0]).abs().max() > 0.1 * copied[0].abs().max()


def test_padding_leaves_states_and_tokens_alone():
    inputs = drawn(1, 20)
    output, last = gated_delta_rule(*inputs, final_states=True)
    query, key, value, log_decay, beta = (torch.cat([part, part], dim=1) for part in inputs)
    log_decay[:, 20:], beta[:, 20:] = 0, 0
    padded, padded_last = gated_delta_rule(query, key, value, log_decay, beta, final_states=True)
    assert_equal(padded[:, :20], output.double(), 1e-6)
    assert_equal(padded_last, last.double(), 1e-6)


@pytest.mark.parametrize("length", [6, 70])
def test_gradients_are_those_of_the_definition(length):
    owners = torch.tensor([0, 0, 1])
    sharing = StateSharing(owners, ((torch.tensor([0]), 2), (torch.tensor([1]), 1)))
    weights = torch.randn(3, length, HEADS, WIDTH, generator=torch.Generator().manual_seed(2))
    gradients = []
    for shared in (True, False):
        inputs = [*drawn(3, length), drawn_states(2)]
        for part in inputs:
            part.requires_grad_(True)
        *parts, states = inputs
        if shared:
            output, _ = gated_delta_rule(*parts, states=states, sharing=sharing)
        else:
            output, _ = by_definition(*parts, states[owners])
        gradients.append(torch.autograd.grad((output * weights).sum(), inputs))
    for seen, wanted in zip(*gradients, strict=True):
        assert_equal(seen, wanted.double())


def test_states_are_float32_whatever_the_type():
    """A sum of many small changes would stop growing in bfloat16."""
    inputs = [part.bfloat16() for part in drawn(2, 300)]
    output, last = gated_delta_rule(*inputs, final_states=True)
    exact, exact_last = by_definition(*inputs)
    assert (output.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert_equal(last, exact_last)
    assert_equal(output, exact, 2**-8)  # rounded once, on the way out


def test_autocast_does_not_reach_it():
    inputs = drawn(2, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.functional.linear(inputs[0], torch.eye(SIZE)).dtype == torch.bfloat16
        output, _ = gated_delta_rule(*inputs)
    assert torch.equal(output, gated_delta_rule(*inputs)[0])
