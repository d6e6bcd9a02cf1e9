"""Attention masks of packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PADDING = -1
PREFIX = 0


def packed_mask(segments: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Build the mask under which several suffixes share one prefix without seeing each other.

    A token attends to the tokens before it (and itself) that belong to the prefix or to its own suffix. What it
    sees is exactly what it would see alone, so its hidden states are those of a row of its own.

    Args:
        segments: For each row, the segment of each token: 0 for the prefix, 1, 2, ... for the suffixes, -1 for
            padding, on either side.
        device: Where to put the mask.

    Returns:
        Boolean, shape (rows, 1, length, length); true where the query (third axis) may see the key (fourth).
    """
    segment = torch.tensor(segments, device=device)
    length = segment.shape[1]
    query, key = segment.unsqueeze(2), segment.unsqueeze(1)
    earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    # Padding sees itself: a query with no key at all would turn into NaN and poison the next layer's values.
    itself = torch.eye(length, dtype=torch.bool, device=device)
    visible = earlier & ((key == PREFIX) | (key == query)) & (key != PADDING) & (query != PADDING)
    return (visible | itself).unsqueeze(1)
