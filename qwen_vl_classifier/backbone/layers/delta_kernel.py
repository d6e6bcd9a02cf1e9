"""The gated delta rule as one kernel for GPUs, where flash-linear-attention is installed (extra "linear-attention").

The kernel is compiled for each GPU by a package that changes often. So it is compared with torch once, on a small
sample with gradients, before it is used; where it fails or differs, torch computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from qwen_vl_classifier.errors import one_line

Kernel: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]

Rule: TypeAlias = Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]]
"""From query, key, value, log decay and beta, and the states that sequences start from, to outputs and last states."""

_log = logging.getLogger(__name__)
_MOST_ERROR = 0.03  # of the length of what torch gives


def kernel_for(query: Tensor, value: Tensor, by_torch: Rule) -> Kernel | None:
    """Return the kernel if it is installed and right for such queries and values: in bfloat16 on a GPU.

    In float32 it would round the factors of its products to TF32.

    Args:
        query: Shape (sequences, length, key heads, key size).
        value: Shape (sequences, length, value heads, value size).
        by_torch: The same rule computed by torch.
    """
    if query.device.type != "cuda" or query.dtype != torch.bfloat16 or find_spec("fla") is None:
        return None
    return _proven_kernel(query.device, query.shape[-1], value.shape[-1], by_torch)


@cache
def _proven_kernel(device: torch.device, key_size: int, value_size: int, by_torch: Rule) -> Kernel | None:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    kernel: Kernel = chunk_gated_delta_rule
    return kernel if is_right(kernel, by_torch, device, key_size, value_size) else None


def is_right(kernel: Kernel, by_torch: Rule, device: torch.device, key_size: int, value_size: int) -> bool:
    """Return whether a kernel agrees with torch on a sample in bfloat16, with gradients, and log it if not.

    Args:
        kernel: With the arguments of flash-linear-attention's `chunk_gated_delta_rule`.
        by_torch: The same rule computed by torch.
        device: Where to compute.
        key_size: Of a head.
        value_size: Of a head.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, 90, 2)  # more than one chunk of 64, and no multiple of it

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    def run(inputs: list[Tensor], states: Tensor) -> tuple[Tensor, Tensor | None]:
        return run_kernel(kernel, *inputs, states=states, final_states=True)

    wide = [drawn(*shape, size) for size in (key_size, key_size, value_size)]
    inputs = [part.to(device, torch.bfloat16) for part in (*wide, -0.1 * drawn(*shape).exp(), drawn(*shape).sigmoid())]
    inputs[3] = inputs[3].float()
    states = drawn(2, 2, key_size, value_size).to(device)
    results = []
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for rule in (run, by_torch):
                parts = [part.clone().requires_grad_() for part in (*inputs, states)]
                output, last = rule(parts[:5], parts[5])
                assert last is not None
                gradients = torch.autograd.grad(output.float().square().sum() + last.square().sum(), parts)
                results.append([part.detach().float() for part in (output, last, *gradients)])
        errors = [(seen - wanted).norm() / wanted.norm() for seen, wanted in zip(*results, strict=True)]
        most = torch.stack(errors).max().item()  # NaN where one is NaN
    except Exception as error:  # a compiler of its own has errors of its own
        _log.warning("the kernel of flash-linear-attention fails here (%s): torch is used", one_line(error, 200))
        return False
    if not most <= _MOST_ERROR:
        _log.warning("the kernel of flash-linear-attention is off by %.0e here: torch is used", most)
        return False
    return True


def run_kernel(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    states: Tensor | None = None,
    final_states: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the gated delta rule by a kernel with the arguments of flash-linear-attention's `chunk_gated_delta_rule`.

    Args and results are those of `gated_delta_rule`, with a state for each sequence.
    """
    repeats = value.shape[2] // query.shape[2]
    if repeats > 1:  # kernels before 0.5 take as many key heads as value heads only
        query, key = (part.repeat_interleave(repeats, dim=2) for part in (query, key))
    return kernel(
        query,
        key,
        value,
        g=log_decay,
        beta=beta,
        initial_state=states,
        output_final_state=final_states,
        use_qk_l2norm_in_kernel=True,
    )
