"""Which operators a device gets, and that kernels which are wrong are left."""

from __future__ import annotations

import logging

import pytest
import torch

from qwen_vl_classifier import Backbone, Tap
from qwen_vl_classifier.backbone.layers import chosen_operators, operators
from qwen_vl_classifier.backbone.layers.chosen_operators import VARIABLE, are_right, operators_for
from qwen_vl_classifier.backbone.layers.operators import OneDnnOperators, Operators

CPU = torch.device("cpu")
TAPS = [Tap(-1, "mean")]


@pytest.fixture(autouse=True)
def _choose_anew() -> None:
    chosen_operators._chosen.cache_clear()


def test_each_device_has_its_operators(monkeypatch):
    assert type(operators_for(CPU, torch.float32)) is OneDnnOperators
    assert operators_for(torch.device("meta"), torch.float32) is None
    assert operators_for(torch.device("mps"), torch.bfloat16) is None
    monkeypatch.setattr(chosen_operators, "find_spec", lambda _: None)
    assert type(operators_for(torch.device("cuda:0"), torch.bfloat16)) is Operators  # there is no Triton


def test_a_variable_keeps_to_the_operators_of_torch(tiny_backbone: Backbone, scene_rows, monkeypatch):
    wanted = tiny_backbone.encode(scene_rows[:2], TAPS)
    monkeypatch.setenv(VARIABLE, "torch")
    assert type(operators_for(CPU, torch.float32)) is Operators
    seen = tiny_backbone.encode(scene_rows[:2], TAPS)
    assert abs(seen - wanted).max() <= 1e-5 * abs(wanted).max()


def test_without_the_operators_of_onednn_torch_computes(monkeypatch):
    monkeypatch.setattr(chosen_operators, "has_fused_linear", lambda dtype: dtype == torch.float32)
    assert type(operators_for(CPU, torch.float32)) is OneDnnOperators
    assert type(operators_for(CPU, torch.bfloat16)) is Operators  # as on processors without AVX-512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_of_a_cpu_compute_what_a_layer_needs(dtype):
    """oneDNN refuses bfloat16 on some processors: what is chosen must run on this one."""
    chosen = operators_for(CPU, dtype)
    states, residual = torch.ones(3, 8, dtype=dtype), torch.full((3, 8), 0.5, dtype=dtype)
    product = torch.nn.Linear(8, 8, bias=False, dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(chosen.add(states, product, residual), product(states) + residual)
        torch.testing.assert_close(
            chosen.activate_and_multiply(states, product, product, torch.nn.SiLU()),
            torch.nn.functional.silu(product(states)) * product(states),
        )


class Forgetful(Operators):
    def add_and_normalise(self, states, product, residual, norm):
        return super().add_and_normalise(states, product, 0 * residual, norm)


class NotANumber(Operators):
    def rotate(self, query, key, rotary):
        return query * float("nan"), key


class Failing(Operators):
    def multiply_gate(self, gate, up, activation):
        raise RuntimeError("PTX was compiled with\nan unsupported toolchain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_that_are_right_are_used(dtype):
    assert are_right(OneDnnOperators(), CPU, dtype)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Forgetful, " here: torch computes instead"),
        (NotANumber, "off by nan here: torch computes instead"),
        (Failing, "fail here (PTX was compiled with\\nan unsupported toolchain): torch computes instead"),
    ],
)
def test_operators_that_are_not_are_left(wrong, message, caplog):
    with caplog.at_level(logging.WARNING):
        assert not are_right(wrong(), CPU, torch.float32)
    assert message in caplog.text


def test_operators_of_torch_round_as_transformers_does():
    """A weight multiplies what was rounded, a centred one what was not."""
    states, weight = torch.randn(9, 70).bfloat16(), torch.rand(70).bfloat16()
    scaled = states.float() * torch.rsqrt(states.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(operators.Operators().normalise(states, weight, 1e-6), weight * scaled.bfloat16())
    centred = operators.Operators().normalise(states, weight, 1e-6, centred=True)
    assert torch.equal(centred, (scaled * (1 + weight.float())).bfloat16())
