"""Rotary positions: rotate the pairs of features of queries and keys."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Rotary: TypeAlias = tuple[Tensor, Tensor]
"""Cosine and sine of the angles, each of shape (..., angles); the second half repeats the first."""


def rotate(states: Tensor, rotary: Rotary) -> Tensor:
    """Rotate pairs of features by their positions (Su et al., arXiv:2104.09864); the pairs are (i, i + angles / 2).

    Args:
        states: Queries or keys, shape (..., heads, head). Features that come after those with angles stay as they are.
        rotary: Cosine and sine for each token.
    """
    cosine, sine = (part.unsqueeze(-2) for part in rotary)
    angles = cosine.shape[-1]
    first, second = states[..., :angles].chunk(2, dim=-1)
    if torch.is_grad_enabled() or states.device.type != "cpu":
        turned = torch.cat((-second, first), dim=-1)
        whole = (states[..., :angles].to(cosine.dtype) * cosine + turned.to(sine.dtype) * sine).to(states.dtype)
        return whole if angles == states.shape[-1] else torch.cat((whole, states[..., angles:]), dim=-1)
    # Without gradients, products are written and summed in place, which halves the passes over memory.
    half = angles // 2
    cosine, sine = cosine[..., :half].to(states.dtype), sine[..., :half].to(states.dtype)
    rotated = torch.empty(states.shape, dtype=states.dtype)
    torch.mul(first, cosine, out=rotated[..., :half])
    torch.mul(second, cosine, out=rotated[..., half:angles])
    rotated[..., :half].addcmul_(second, sine, value=-1)
    rotated[..., half:angles].addcmul_(first, sine)
    rotated[..., angles:] = states[..., angles:]
    return rotated
