"""Gated linear attention over packed rows against transformers' own layer on each suffix in a row of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from qwen_vl_classifier.backbone.layers.attention import packed_mask, use_faster_attention
from qwen_vl_classifier.backbone.layers.fused import fuse_layers
from qwen_vl_classifier.backbone.layers.linear_attention import segment_layout, use_packed_linear_attention
from tests.backbone.layers.hybrid import CPU, FOLDERS, HIDDEN, as_model, decoder, own_rows, packed_rows, row, run_layers

EXACT = 1e-5  # of the largest value, in float32

MIXED = [
    row(0, 5, [3, 1, 70, 0], 92),  # longer than a chunk, shorter than the convolution, empty
    row(3, 40, [20], 92),  # one suffix
    row(1, 0, [2, 80], 92),  # no prefix
    row(0, 1, [3, 3], 92),  # a prefix that is shorter than the convolution
    row(7, 80, [1, 4], 92),
    row(0, 92, [], 92),
]


@pytest.fixture(scope="module")
def own() -> Any:
    """transformers' own layer."""
    return decoder("Qwen3_5").layers[0].linear_attn


@pytest.fixture(scope="module")
def packed() -> Any:
    """The same layer, that takes a layout."""
    model = as_model(decoder("Qwen3_5"))
    use_packed_linear_attention(model)
    return model.language_model.layers[0].linear_attn


def drawn(segments: list[list[int]], seed: int = 0) -> Tensor:
    return torch.randn(len(segments), len(segments[0]), HIDDEN, generator=torch.Generator().manual_seed(seed))


def alone(layer: Any, states: Tensor, segments: list[list[int]]) -> Tensor:
    """Run each suffix in a row of its own."""
    output = torch.zeros_like(states)
    for number, columns in own_rows(segments):
        output[number, columns] = layer(hidden_states=states[number : number + 1, columns])[0]
    return output


def tokens(segments: list[list[int]]) -> Tensor:
    return torch.tensor(segments) >= 0


def assert_near(seen: Tensor, wanted: Tensor, tolerance: float = EXACT) -> None:
    assert (seen - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("count", [25, pytest.param(1500, marks=pytest.mark.soak)])
def test_suffixes_give_what_they_give_alone(own, packed, count):
    @settings(max_examples=count)
    @given(segments=packed_rows(), seed=st.integers(0, 2**32 - 1))
    def check(segments, seed):
        states = drawn(segments, seed)
        with torch.no_grad():
            seen = packed(hidden_states=states, attention_mask=segment_layout(segments, CPU))
            wanted = alone(own, states, segments)
        assert seen.isfinite().all()
        kept = tokens(segments)
        if kept.any():
            assert_near(seen[kept], wanted[kept])

    check()


def test_these_weights_show_a_lost_state_and_a_lost_convolution(own):
    """A control of the other tests: both would be far off."""
    states = drawn([row(0, 40, [20], 60)])
    wanted = own(hidden_states=states)[:, 40:]
    for lost in ("state", "inputs of the convolution"):
        cache = DynamicCache(config=decoder("Qwen3_5").config)
        own(hidden_states=states[:, :40], cache_params=cache)
        kept = own(hidden_states=states[:, 40:], cache_params=copy.deepcopy(cache))
        assert_near(kept, wanted)
        layer = cache.layers[0]
        for state in (layer.recurrent_states if lost == "state" else layer.conv_states).values():
            state.zero_()
        without = own(hidden_states=states[:, 40:], cache_params=cache)
        assert (without - wanted).abs().max() > 0.2 * wanted.abs().max(), lost


def test_without_a_mask_rows_are_whole_and_padding_is_on_the_right(own, packed):
    segments = [row(0, 70, [], 70), row(0, 9, [], 70)]
    states = drawn(segments)
    kept = tokens(segments)
    assert_near(packed(hidden_states=states)[kept], alone(own, states, segments)[kept])


def test_a_tensor_as_mask_and_a_cache_are_left_to_transformers(own, packed):
    segments = [row(0, 9, [], 9), row(4, 5, [], 9)]
    states = drawn(segments)
    mask = tokens(segments)
    assert torch.equal(
        packed(hidden_states=states, attention_mask=mask), own(hidden_states=states, attention_mask=mask)
    )
    outputs = []
    for layer in (packed, own):
        cache = DynamicCache(config=decoder("Qwen3_5").config)
        outputs.append([layer(hidden_states=part, cache_params=cache) for part in states[:1].split([5, 4], dim=1)])
    for seen, wanted in zip(*outputs, strict=True):
        assert torch.equal(seen, wanted)


def test_what_is_not_a_number_stays_in_its_row(packed):
    segments = [row(0, 4, [2, 9], 20), row(2, 4, [5, 3], 20)]
    states = drawn(segments)
    clean = packed(hidden_states=states, attention_mask=segment_layout(segments, CPU))
    states[0] = torch.nan
    spoilt = packed(hidden_states=states, attention_mask=segment_layout(segments, CPU))
    assert spoilt[0, 0].isnan().all()
    assert torch.equal(spoilt[1], clean[1])


def gradients(model: Any, run: Any, states: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Differentiate a weighted sum of what comes out by all weights and by what goes in."""
    model, states = copy.deepcopy(model).requires_grad_(True), states.clone().requires_grad_(True)
    (run(model, states) * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert states.grad is not None
    return found | {"states": states.grad}


def assert_same_gradients(seen: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert seen.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        assert (seen[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


def test_gradients_are_those_of_rows_of_their_own(own, packed):
    weights = drawn(MIXED, seed=1) * tokens(MIXED).unsqueeze(-1)
    assert_same_gradients(
        gradients(
            packed,
            lambda layer, states: layer(hidden_states=states, attention_mask=segment_layout(MIXED, CPU)),
            drawn(MIXED),
            weights,
        ),
        gradients(own, lambda layer, states: alone(layer, states, MIXED), drawn(MIXED), weights),
    )


def test_in_bfloat16_packing_adds_no_error(own, packed):
    """Compare with float32 on the same rounded weights: two results in bfloat16 are two roundings of one number."""
    states = drawn(MIXED).bfloat16()
    kept = tokens(MIXED)
    rounded, ours = (copy.deepcopy(layer).bfloat16() for layer in (own, packed))
    exact = alone(copy.deepcopy(rounded).float(), states.float(), MIXED)[kept]
    errors = [
        (output[kept].float() - exact).square().mean().sqrt()
        for output in (
            ours(hidden_states=states, attention_mask=segment_layout(MIXED, CPU)),
            alone(rounded, states, MIXED),
        )
    ]
    assert errors[0] <= 1.1 * errors[1]
    assert errors[1] <= 0.01 * exact.square().mean().sqrt()


@pytest.mark.parametrize("kind", FOLDERS)
def test_decoders_give_what_rows_of_their_own_give_with_their_gradients(kind):
    """All kinds of layers, one after the other, on the fast path of CPUs and with gradients."""
    plain, model = decoder(kind), as_model(decoder(kind))
    use_faster_attention(model)
    use_packed_linear_attention(model)
    fuse_layers(model)
    positions = torch.zeros(tokens(MIXED).shape, dtype=torch.long)
    for number, columns in own_rows(MIXED):
        positions[number, columns] = torch.arange(len(columns))
    masks = {"full": packed_mask(MIXED, CPU), "linear": segment_layout(MIXED, CPU)}

    def run_packed(text: Any, states: Tensor) -> Tensor:
        return run_layers(text, states, positions, masks)

    def run_alone(text: Any, states: Tensor) -> Tensor:
        output = torch.zeros_like(states)
        for number, columns in own_rows(MIXED):
            line = slice(number, number + 1)
            output[number, columns] = run_layers(
                text, states[line, columns], positions[line, columns], {"full": None, "linear": None}
            )[0]
        return output

    kept = tokens(MIXED)
    with torch.no_grad():
        seen, wanted = run_packed(model.language_model, drawn(MIXED)), run_alone(plain, drawn(MIXED))
    assert_near(seen[kept], wanted[kept])
    weights = drawn(MIXED, seed=1) * kept.unsqueeze(-1)
    assert_same_gradients(
        gradients(model.language_model, run_packed, drawn(MIXED), weights),
        gradients(plain, run_alone, drawn(MIXED), weights),
    )


def test_gradient_checkpointing_changes_nothing():
    """A layer that runs again for the backward pass gets its layout again."""
    model = as_model(decoder("Qwen3_5"))
    use_faster_attention(model)
    use_packed_linear_attention(model)
    text = model.language_model.train()
    positions = torch.arange(len(MIXED[0])).expand(tokens(MIXED).shape)
    masks = {"full": packed_mask(MIXED, CPU), "linear": segment_layout(MIXED, CPU)}
    weights = drawn(MIXED, seed=1) * tokens(MIXED).unsqueeze(-1)

    def run(layers: Any, states: Tensor) -> Tensor:
        return run_layers(layers, states, positions, masks)

    plain = gradients(text, run, drawn(MIXED), weights)
    text.activation_checkpointing_enable()
    assert text.is_activation_checkpointing
    assert_same_gradients(gradients(text, run, drawn(MIXED), weights), plain)
