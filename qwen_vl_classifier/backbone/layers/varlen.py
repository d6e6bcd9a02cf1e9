"""Attention of many sequences of any lengths in one call, by torch's flash attention for GPUs.

No mask, no padding and no repeated keys: queries lie in one strip, keys in another, and where each sequence begins is
a short vector. Whether torch's function is right on a device is tested once, on a small sample, before it is used, and
once more with gradients: its parameters changed between torch 2.11 and 2.12, neither says what it does where a sequence
has more keys than queries, or keys have fewer heads, and some cards have no gradients for large heads.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen

from qwen_vl_classifier.backbone.layers.sequences import Sequences, sequences_of
from qwen_vl_classifier.errors import one_line

_log = logging.getLogger(__name__)
_AMPERE = (8, 0)
_MOST_HEAD = 256  # features of a head
_MOST_ERROR = 0.05  # of the length of what plain attention gives


class VarlenAttention(Protocol):
    """Attention within sequences. Strips have the shape (tokens, heads, head), and keys may have fewer heads."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        queries: Sequences,
        keys: Sequences,
        *,
        scale: float,
        causal: bool = False,
    ) -> Tensor:
        """Return a strip like `query`.

        Causal, the last query of a sequence sees all of its keys, the one before it all but the last, and so on.
        """


def varlen_attention(states: Tensor, head: int, groups: int = 1) -> VarlenAttention | None:
    """Return attention of many lengths if it runs, and is right, where a tensor lies and in its type.

    The first call for a device and kind of head makes the host wait for the device; later ones do not.

    Args:
        states: Any tensor of the device and type of the layer's inputs.
        head: The number of features of a head.
        groups: How many heads of queries share a head of keys.
    """
    device, dtype = states.device, states.dtype
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if not may_run(device, dtype, head):
        return None
    return proven_attention(device, dtype, head, groups, torch.is_grad_enabled())


@cache
def may_run(device: torch.device, dtype: torch.dtype, head: int) -> bool:
    """Tell whether the function is made for such a device, type and number of features of a head."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head % 8 == 0
        and head <= _MOST_HEAD
        and torch.cuda.get_device_capability(device) >= _AMPERE
    )


@cache
def proven_attention(
    device: torch.device, dtype: torch.dtype, head: int, groups: int, gradients: bool
) -> VarlenAttention | None:
    """Test torch's function once, in every way that may be right, and return the first that is, if any."""
    return next((way for way in ways(groups) if is_right(way, device, dtype, head, groups, gradients)), None)


def ways(groups: int) -> list[VarlenAttention]:
    """Return the ways to call torch's function, the best first.

    Args:
        groups: How many heads of queries share a head of keys.
    """
    if groups == 1:
        return [run_varlen]
    has_option = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters  # since torch 2.12
    return [
        partial(run_varlen, options={"enable_gqa": True} if has_option else {}),
        partial(run_varlen, repeats=groups),
    ]


def run_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Sequences,
    keys: Sequences,
    *,
    scale: float,
    causal: bool = False,
    repeats: int = 1,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Tensor:
    """Call torch's function with some further options; `repeats` heads are made of each head of keys before."""
    if repeats > 1:
        key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    output: Tensor = varlen.varlen_attn(  # type: ignore[assignment]
        # Autocast does not know this function, and rotated queries may be float32 under it.
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        queries.starts,
        keys.starts,
        queries.longest,
        keys.longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        **options,
    )
    return output


def is_right(
    attention: VarlenAttention, device: torch.device, dtype: torch.dtype, head: int, groups: int, gradients: bool
) -> bool:
    """Return whether variable-length attention agrees with plain attention; log it if not.

    Args:
        attention: The function.
        device: Where to compute.
        dtype: Type of the sample.
        head: Features of a head.
        groups: How many heads of queries share a head of keys.
        gradients: Compare gradients too.

    Raises:
        torch.OutOfMemoryError: There is no memory for the sample.
    """
    lengths, key_lengths = [5, 70, 130], [5, 150, 131]  # more than a block of the kernel, and no multiple of it
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), 2 * groups, head), (sum(key_lengths), 2, head), (sum(key_lengths), 2, head))
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    queries, keys = sequences_of(lengths).to(device), sequences_of(key_lengths).to(device)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            for causal in (False, True):
                query, key, value = (part.clone().requires_grad_(gradients) for part in drawn)
                seen = attention(query, key, value, queries, keys, scale=head**-0.5, causal=causal)
                exact = [part.double().cpu().requires_grad_(gradients) for part in drawn]
                expected = _plain(exact, lengths, key_lengths, causal=causal)
                pairs = [(seen, expected)]
                if gradients:
                    pairs += zip(_gradients(seen, [query, key, value]), _gradients(expected, exact), strict=True)
                for one, other in pairs:
                    error = ((one.double().cpu() - other).norm() / other.norm()).item()
                    if not error <= _MOST_ERROR:  # also if it is NaN
                        _log.warning("torch's variable-length attention is off by %.0e here, and is not used", error)
                        return False
    except torch.OutOfMemoryError:  # says nothing about the function
        raise
    except (RuntimeError, TypeError, ValueError) as failure:
        _log.warning("torch's variable-length attention fails here, and is not used: %s", one_line(failure, 200))
        return False
    return True


def _gradients(output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output.double().square().sum(), list(inputs))


def _plain(strips: Sequence[Tensor], lengths: list[int], key_lengths: list[int], *, causal: bool) -> Tensor:
    """Compute the same from strips of queries, keys and values by plain attention, sequence by sequence."""
    outputs = []
    split = (
        torch.split(strip, sizes) for strip, sizes in zip(strips, (lengths, key_lengths, key_lengths), strict=True)
    )
    for query, key, value in zip(*split, strict=True):
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        length, key_length = len(query), len(key)
        seen = torch.from_numpy(np.tri(length, key_length, key_length - length if causal else key_length, dtype=bool))
        output = nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), attn_mask=seen
        )
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)
