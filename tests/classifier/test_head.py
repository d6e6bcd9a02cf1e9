"""Heads: the original API's layers, standardisation folded in, and weights loaded whole or not at all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qwen_vl_classifier.classifier.head import HeadSpec, fold_line, fold_standardisation, load_head_weights, mlp_head
from qwen_vl_classifier.errors import ArtifactError

HIDDEN, UNITS = 6, 5


def test_the_head_of_the_original_api():
    head = mlp_head(HIDDEN)
    assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()} == {
        "0.weight": (512, HIDDEN),
        "0.bias": (512,),
        "3.weight": (2, 512),
        "3.bias": (2,),
    }
    assert head[2].p == 0.1


def test_a_spec_builds_its_head():
    linear = HeadSpec("linear", HIDDEN).build()
    assert isinstance(linear, nn.Linear)
    assert linear.weight.shape == (2, HIDDEN)
    mlp = HeadSpec("mlp", HIDDEN, units=UNITS, dropout=0.3).build()
    assert mlp[0].weight.shape == (UNITS, HIDDEN)
    assert mlp[2].p == 0.3


@pytest.mark.parametrize("spec", [HeadSpec("linear", HIDDEN), HeadSpec("mlp", HIDDEN, UNITS)], ids=["linear", "mlp"])
def test_folding_standardisation_changes_no_logit(spec):
    head = spec.build().double().eval()
    folded = copy.deepcopy(head)
    x = torch.randn(50, HIDDEN, dtype=torch.float64) * 3 + 7
    mean, scale = x.mean(dim=0), x.std(dim=0)
    fold_standardisation(folded, mean, scale)
    torch.testing.assert_close(folded(x), head((x - mean) / scale), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(folded(x), head(x))


def test_folding_a_line_moves_the_margin():
    head = HeadSpec("linear", HIDDEN).build()
    folded = copy.deepcopy(head)
    fold_line(folded, 3.0, -2.0)
    x = torch.randn(50, HIDDEN)
    torch.testing.assert_close(folded(x) @ torch.tensor([-1.0, 1.0]), 3 * (head(x) @ torch.tensor([-1.0, 1.0])) - 2)


def test_folding_in_float32_is_as_good_as_float32():
    head = HeadSpec("mlp", HIDDEN, UNITS).build().eval()
    folded = copy.deepcopy(head)
    x = torch.randn(50, HIDDEN) * 3 + 7
    mean, scale = x.mean(dim=0), x.std(dim=0)
    fold_standardisation(folded, mean, scale)
    torch.testing.assert_close(folded(x), head((x - mean) / scale), rtol=1e-5, atol=1e-5)


def test_an_infinite_scale_takes_a_feature_out():
    head = HeadSpec("linear", HIDDEN).build()
    scale = torch.ones(HIDDEN)
    scale[2] = torch.inf
    fold_standardisation(head, torch.full((HIDDEN,), 0.5), scale)
    x = torch.randn(4, HIDDEN)
    moved = x.clone()
    moved[:, 2] += 1e6
    torch.testing.assert_close(head(moved), head(x))


@pytest.fixture
def head() -> nn.Module:
    return HeadSpec("mlp", HIDDEN, UNITS).build()


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {
        name: torch.randn_like(tensor) for name, tensor in HeadSpec("mlp", HIDDEN, UNITS).build().state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_come_in(head, weights, dtype):
    load_head_weights(head, {name: tensor.to(dtype) for name, tensor in weights.items()}, source="w")
    for name, tensor in head.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, weights[name].to(dtype).float())


WRONG = {
    "missing": ({"0.bias": None}, r"missing keys \['0.bias'\]"),
    "left over": ({"4.weight": torch.zeros(1)}, r"unexpected keys 1, first \['4.weight'\]"),
    "a key that is no text": ({7: torch.zeros(1)}, r"unexpected keys 1, first \['7'\]"),
    "thousands of keys": ({f"k{number}": torch.zeros(1) for number in range(5000)}, "unexpected keys 5000, first"),
    "other shape": ({"0.weight": torch.zeros(UNITS, HIDDEN + 1)}, r"0.weight has shape \(5, 7\), .* needs \(5, 6\)"),
    "other rank": ({"3.bias": torch.zeros(2, 1)}, "3.bias has shape"),
    "NaN": ({"3.bias": torch.tensor([0.0, torch.nan])}, "3.bias holds NaN or infinity"),
    "infinity": ({"0.bias": torch.full((UNITS,), torch.inf)}, "0.bias holds NaN or infinity"),
    "too large for float32": ({"3.bias": torch.tensor([0.0, 1e300], dtype=torch.float64)}, "3.bias holds NaN or inf"),
    "whole numbers": ({"3.bias": torch.zeros(2, dtype=torch.long)}, "3.bias holds no floating-point tensor"),
    "complex": ({"3.bias": torch.zeros(2, dtype=torch.complex64)}, "3.bias holds no floating-point tensor"),
    "eight bits": ({"3.bias": torch.zeros(2).to(torch.float8_e4m3fn)}, "3.bias holds no floating-point tensor"),
    "sparse": ({"3.bias": torch.zeros(2).to_sparse()}, "3.bias holds no floating-point tensor"),
    "no values": ({"3.bias": torch.zeros(2, device="meta")}, "3.bias holds no floating-point tensor"),
    "no tensor": ({"3.bias": [0.0, 0.0]}, "3.bias holds no floating-point tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_are_named_and_change_nothing(head, weights, name):
    change, message = WRONG[name]
    weights = {key: value for key, value in {**weights, **change}.items() if value is not None}
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ArtifactError, match=rf"^weights.pth: .*{message}") as caught:
        load_head_weights(head, weights, source="weights.pth")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)
