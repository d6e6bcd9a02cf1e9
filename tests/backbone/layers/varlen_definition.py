"""What torch's attention of many lengths computes, sequence by sequence, on any device and in any type."""

from __future__ import annotations

import torch
from torch import Tensor, nn

calls: list[tuple[int, bool]] = []
"""The number of sequences of each call, and whether it was causal."""


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Take the arguments of `torch.nn.attention.varlen.varlen_attn` that flash attention is called with."""
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError("Expect query and key/value to have the same number of heads")
    return without_gqa(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def without_gqa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Take the arguments of torch 2.11, where heads may differ without a word."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    assert window_size in ((-1, -1), (-1, 0))
    calls.append((len(cu_seq_q) - 1, window_size == (-1, 0)))
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    outputs = []
    starts = [cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:]]
    for start, end, first, last in zip(*(edges.tolist() for edges in starts), strict=True):
        seen = torch.ones(end - start, last - first, dtype=torch.bool, device=query.device)
        if window_size == (-1, 0):
            seen = seen.tril(last - first - (end - start))
        strips = (query[start:end], key[first:last], value[first:last])
        output = nn.functional.scaled_dot_product_attention(
            *(strip.transpose(0, 1) for strip in strips), attn_mask=seen, scale=scale
        )
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)
