"""The gated delta rule as one kernel for GPUs, where flash-linear-attention is installed (extra "linear-attention")."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

Kernel: TypeAlias = Callable[..., tuple[Tensor, Tensor | None]]


def kernel_for(query: Tensor) -> Kernel | None:
    """Return the kernel if it is installed and as exact as torch for such queries: in bfloat16 on a GPU.

    In float32 it would round the factors of its products to TF32.
    """
    return _installed_kernel() if query.device.type == "cuda" and query.dtype == torch.bfloat16 else None


@cache
def _installed_kernel() -> Kernel | None:
    if find_spec("fla") is None:
        return None
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule  # type: ignore[no-any-return]


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
