"""Packed rows as sequences, for attention of many lengths in one call.

The tokens of all rows lie in one strip, one row after the other. Each run of tokens of one segment is a sequence of
queries, and its keys are what it sees of the row before it and the run itself. So attention moves no token, and only
keys that several suffixes share are gathered, once for each of them.

Where every layer computes attention in this way, padding is left out of the strip, and no layer sees any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_vl_classifier.backbone.layers.sequences import PADDING, PREFIX, Sequences, sequences_of
from qwen_vl_classifier.backbone.layers.transfer import Movable
from qwen_vl_classifier.backbone.layers.varlen import VarlenAttention


@dataclass(frozen=True, slots=True)
class RowPlan(Movable):
    """Which keys each token of packed rows sees: what takes the place of a mask.

    Attributes:
        queries: The sequences of queries, which cover all rows.
        keys: For each of them, its keys. Its last query sees all of them, the one before it all but the last, and so
            on.
        places: int64, shape (keys,): where the keys lie in the flattened rows, or `None` where they are the tokens of
            all rows in their order.
        attention: What computes it.
    """

    queries: Sequences
    keys: Sequences
    places: Tensor | None
    attention: VarlenAttention

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
        """Compute attention, shape (rows * length, heads, head) of everything; keys may have fewer heads."""
        if self.places is not None:
            key = _Gathered.apply(key, self.places)  # type: ignore[no-untyped-call]
            value = _Gathered.apply(value, self.places)  # type: ignore[no-untyped-call]
        return self.attention(query, key, value, self.queries, self.keys, scale=scale, causal=True)


class _Gathered(torch.autograd.Function):
    """Some rows of a tensor, some of them several times; their gradients are summed in float32 at least.

    On GPUs, torch's own `index_select` sums them in their own type. Each of the many suffixes that may share a prefix
    adds a small gradient, which bfloat16 would round away.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = states.shape
        return states.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        precise = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=precise, device=gradient.device)
        return total.index_add_(0, places, gradient.to(precise)).to(gradient.dtype), None


def plan_rows(segments: Sequence[Sequence[int]] | None, rows: int, length: int, attention: VarlenAttention) -> RowPlan:
    """Find the sequences of rows, on the CPU.

    Args:
        segments: As `packed_mask` takes them, though rows may differ in length: for each row, the segment of each
            token: 0 for the prefix, 1, 2, ... for the suffixes, -1 for padding, on either side. `None` if every row is
            one sequence, padded on the right at most: later tokens are seen by no token before them, so padding needs
            no sequence of its own.
        rows: The number of rows; read without segments only, as `length` is.
        length: Their length.
        attention: What will compute it.
    """
    if segments is None:
        queries = sequences_of([length] * rows)
        return RowPlan(queries, queries, None, attention)
    lengths: list[int] = []
    keys: list[npt.NDArray[np.int64]] = []
    base = 0
    for row in (np.array(row, dtype=np.int32) for row in segments):
        first = len(keys)
        starts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            segment, before = row[start], row[:start]
            seen = np.flatnonzero((before == segment) | ((before == PREFIX) & (segment != PADDING))) + base
            own = np.arange(start, end) + base
            if len(keys) > first and np.array_equal(keys[-1], seen):  # the first suffix goes on where its prefix ends
                lengths[-1] += end - start
                keys[-1] = np.concatenate([seen, own])
            else:
                lengths.append(end - start)
                keys.append(np.concatenate([seen, own]))
        base += len(row)
    places = np.concatenate(keys)
    queries = sequences_of(lengths)
    if np.array_equal(places, np.arange(base)):
        return RowPlan(queries, queries, None, attention)
    return RowPlan(queries, sequences_of([len(part) for part in keys]), torch.from_numpy(places), attention)


@dataclass(frozen=True, slots=True)
class Strip(Movable):
    """The tokens of a batch of rows without padding, one row after the other.

    Attributes:
        segments: For each row, the segment of each of its tokens.
        places: int64, shape (tokens,): where the tokens lie in the flattened rows.
        order: int64, shape (rows * length,): for each place in the rows, its token in the strip; 0 for padding.
    """

    segments: list[list[int]]
    places: Tensor
    order: Tensor

    def take(self, rows: Tensor) -> Tensor:
        """Return (1, tokens, features) of (rows, length, features)."""
        return rows.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def put(self, strip: Tensor) -> Tensor:
        """Return (rows, length, features) of (1, tokens, features); in place of padding is the first token."""
        return strip[0].index_select(0, self.order).view(len(self.segments), -1, strip.shape[-1])


def strip_of(segments: npt.NDArray[np.int64]) -> Strip | None:
    """Leave padding out of a batch of rows, on the CPU.

    Args:
        segments: Shape (rows, length), as `packed_mask` takes them.

    Returns:
        The strip, or `None` where there is no padding.
    """
    tokens = segments != PADDING
    if tokens.all():
        return None
    places = np.flatnonzero(tokens)
    order = np.zeros(segments.size, dtype=np.int64)
    order[places] = np.arange(len(places))
    kept = [row[seen].tolist() for row, seen in zip(segments, tokens, strict=True)]
    return Strip(kept, torch.from_numpy(places), torch.from_numpy(order))
