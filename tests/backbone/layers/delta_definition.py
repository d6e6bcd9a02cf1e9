"""The gated delta rule by its definition, and what to try it on."""

from __future__ import annotations

import torch
from torch import Tensor

KEY_HEADS, HEADS, SIZE, WIDTH = 2, 4, 8, 12


def drawn(
    sequences: int, length: int, *, key_heads: int = KEY_HEADS, heads: int = HEADS, size: int = SIZE, width: int = WIDTH
) -> list[Tensor]:
    """Draw queries, keys, values, log decays that last for tens of tokens, and betas."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(sequences, length, key_heads, size, generator=generator) for _ in range(2))
    value = torch.randn(sequences, length, heads, width, generator=generator)
    log_decay = -0.05 * torch.rand(sequences, length, heads, generator=generator)
    beta = torch.rand(sequences, length, heads, generator=generator)
    return [query, key, value, log_decay, beta]


def drawn_states(count: int, *, heads: int = HEADS, size: int = SIZE, width: int = WIDTH, **_: int) -> Tensor:
    return torch.randn(count, heads, size, width, generator=torch.Generator().manual_seed(1))


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Follow equation 10 of arXiv:2412.06464."""
    query, key, value, log_decay, beta = (part.double() for part in (query, key, value, log_decay, beta))
    query, key = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (query, key))
    repeats = value.shape[2] // query.shape[2]
    query, key = (part.repeat_interleave(repeats, dim=2) for part in (query * query.shape[-1] ** -0.5, key))
    if states is None:
        states = torch.zeros(len(query), value.shape[2], key.shape[3], value.shape[3])
    state = states.double()
    outputs = []
    for token in range(query.shape[1]):
        state = state * log_decay[:, token, :, None, None].exp()
        error = value[:, token] - torch.einsum("nhk,nhkv->nhv", key[:, token], state)
        change = torch.einsum("nhk,nhv->nhkv", key[:, token], error * beta[:, token, :, None])
        state = state + change
        outputs.append(torch.einsum("nhk,nhkv->nhv", query[:, token], state))
    return torch.stack(outputs, dim=1), state
