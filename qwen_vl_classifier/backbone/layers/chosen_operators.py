"""Choose the operators of a device, once in a process."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from qwen_vl_classifier.backbone.layers.operators import OneDnnOperators, Operators, has_fused_linear
from qwen_vl_classifier.errors import one_line

VARIABLE = "QWEN_VL_CLASSIFIER_KERNELS"
"""Environment variable: "torch" keeps to torch's own operators on every device; anything else chooses."""

_log = logging.getLogger(__name__)
_MOST_ERROR = 0.01  # of the length of what torch gives; bfloat16 rounds to 0.004


def operators_for(device: torch.device, dtype: torch.dtype) -> Operators | None:
    """Return how layers compute on a device without gradients; `None` leaves them to transformers.

    Args:
        device: CPUs and GPUs of NVIDIA and AMD have operators.
        dtype: The type of the states.
    """
    if device.type not in ("cpu", "cuda"):
        return None
    return Operators() if os.environ.get(VARIABLE) == "torch" else _chosen(device, dtype)


@cache
def _chosen(device: torch.device, dtype: torch.dtype) -> Operators:
    if device.type == "cpu":
        return OneDnnOperators() if has_fused_linear(dtype) else Operators()
    if find_spec("triton") is None:
        return Operators()
    try:
        from qwen_vl_classifier.backbone.layers.triton_kernels import TritonOperators
    except Exception as error:  # a compiler of its own has errors of its own
        _log.warning("Triton fails here (%s): torch computes norms, gates and rotations", one_line(error, 200))
        return Operators()
    operators = TritonOperators()
    return operators if are_right(operators, device, dtype) else Operators()


def are_right(operators: Operators, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether operators agree with torch's on a sample, and log it if they do not.

    Args:
        operators: What to try.
        device: Where to compute.
        dtype: The type of the states.
    """
    try:
        with torch.inference_mode():
            results = [_sample(each, device, dtype) for each in (operators, Operators())]
        errors = [
            (seen.float() - wanted.float()).norm() / wanted.float().norm()
            for seen, wanted in zip(*results, strict=True)
        ]
        most = float(torch.stack(errors).max())  # NaN where one is NaN
    except Exception as error:  # a compiler of its own has errors of its own
        _log.warning("Triton kernels fail here (%s): torch computes instead", one_line(error, 200))
        return False
    if not most <= _MOST_ERROR:
        _log.warning("Triton kernels are off by %.0e here: torch computes instead", most)
        return False
    return True


class _RMSNorm(nn.Module):
    """A norm as `is_rms_norm` knows it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = 1e-6

    def forward(self, states: Tensor) -> Tensor:
        return Operators().normalise(states, self.weight, self.variance_epsilon)


def _sample(operators: Operators, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Run each operator on small inputs whose sizes are no powers of two, heads within a strip among them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    tokens, width = 5, 80
    states, residual, weight, bias = drawn(tokens, width), drawn(tokens, width), drawn(width), drawn(width)
    strip = drawn(tokens, 7, width)
    query, key = strip[:, :4], strip[:, 4:6]
    layer_norm = nn.LayerNorm(width, device=device, dtype=dtype)
    layer_norm.weight, layer_norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    results = [
        operators.normalise(query, weight, 1e-6),
        operators.normalise(states, weight, 1e-6, centred=True),
        operators.normalise_with_gate(states, residual, weight, 1e-6),
        operators.multiply_gate(states, residual, nn.SiLU()),
        operators.activate(states, SimpleNamespace(weight=drawn(70, width), bias=drawn(70)), ACT2FN["quick_gelu"]),
    ]
    for norm in (_RMSNorm(weight), layer_norm):
        results += operators.add_and_normalise(states.clone(), None, residual, norm)
    for angles in (width, 24):
        turns = drawn(tokens, angles // 2).repeat(1, 2)
        results += operators.rotate(query, key, (turns.cos(), turns.sin()))
    return results
