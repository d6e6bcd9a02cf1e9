"""Where consecutive sequences of patches or tokens lie: planned on the host, read by layers on a device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_vl_classifier.backbone.layers.transfer import Movable

PADDING = -1
PREFIX = 0
"""Segments of tokens in packed rows; those of suffixes are 1, 2, ..."""


@dataclass(frozen=True, slots=True)
class Sequences(Movable):
    """Sequences that lie one after the other.

    A layer reads lengths as Python numbers, so that it never waits for a device.

    Attributes:
        starts: int32, shape (sequences + 1,): where each sequence begins, and the end of the last one.
        longest: The longest length.
        groups: The lengths that occur, each with the places of the sequences of that length, int64 of shape
            (sequences of the length * length,), or `None` where all sequences have one length. Empty where only
            attention of many lengths in one call reads the sequences.
    """

    starts: Tensor
    longest: int
    groups: tuple[tuple[int, Tensor | None], ...] = ()


def sequences_of(lengths: npt.ArrayLike, *, grouped: bool = False) -> Sequences:
    """Lay out sequences one after the other, on the CPU.

    Args:
        lengths: Their lengths, at least one, each at least 1.
        grouped: Group the sequences by length.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.concatenate([[0], sizes.cumsum()])
    groups: list[tuple[int, Tensor | None]] = []
    distinct = np.unique(sizes).tolist() if grouped else []
    for size in distinct:
        places = None
        if len(distinct) > 1:
            places = torch.from_numpy((starts[:-1][sizes == size, None] + np.arange(size)).ravel())
        groups.append((size, places))
    return Sequences(torch.from_numpy(starts.astype(np.int32)), int(sizes.max()), tuple(groups))
