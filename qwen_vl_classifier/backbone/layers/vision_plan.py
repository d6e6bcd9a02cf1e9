"""Compute on the host, once for each size, what a vision tower derives from the sizes of pictures alone.

transformers' vision towers compute it on the device in every pass, and read some of it back to the host, which then
waits for all that the device still has to do. They take what is computed already as keyword arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from qwen_vl_classifier.backbone.layers.sequences import Sequences, sequences_of
from qwen_vl_classifier.backbone.layers.transfer import Movable

Grid: TypeAlias = tuple[int, int, int]
"""Time, height and width of a picture, in patches."""

_SIZES_KEPT = 128  # about 60 bytes a patch


@dataclass(frozen=True, slots=True)
class VisionPlan(Movable):
    """All that a vision tower needs to know about some pictures, beside their patches.

    Attributes:
        grid_thw: int64, shape (pictures, 3).
        tokens: The number of image tokens of each picture.
        positions: int32, shape (patches, 2): row and column of each patch.
        frames: The frames of all pictures: a patch attends to those of its frame in layers with full attention.
        order: int64, shape (tokens,): image tokens sorted by window, or `None` in a tower without windows.
        windows: The windows of all pictures, in that order, or `None`.
        table_rows: int32, shape (patches, rows): the rows of the table of learned positions that are mixed for each
            patch, or `None` in a tower without such a table.
        table_weights: float32, of the same shape: their weights, or `None`.
    """

    grid_thw: Tensor
    tokens: tuple[int, ...]
    positions: Tensor
    frames: Sequences
    order: Tensor | None
    windows: Sequences | None
    table_rows: Tensor | None
    table_weights: Tensor | None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the tower's forward: all but the patches."""
        arguments: dict[str, Any] = {
            "grid_thw": self.grid_thw,
            "position_ids": self.positions,
            "cu_seqlens": self.frames,
        }
        if self.windows is not None:
            arguments |= {"window_index": self.order, "cu_window_seqlens": self.windows}
        if self.table_rows is not None:
            arguments |= {"interp_indices": self.table_rows, "interp_weights": self.table_weights}
        return arguments


def plan_vision(visual: Any, grids: Sequence[Grid]) -> VisionPlan:
    """Plan a pass of a vision tower over some pictures, on the CPU.

    Args:
        visual: A transformers vision tower whose attention `use_faster_attention` has replaced.
        grids: The size of each picture, in the order of their patches; at least one.
    """
    merge: int = visual.spatial_merge_size
    window = (visual.window_size, visual.patch_size) if hasattr(visual, "window_size") else None
    table = None
    if hasattr(visual, "num_grid_per_side"):
        table = (visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners)
    parts = [_plan_picture(grid, merge, window, table) for grid in grids]
    tokens = tuple(len(part.positions) // merge**2 for part in parts)
    firsts = np.cumsum((0, *tokens)).tolist()
    orders = [part.order + first for part, first in zip(parts, firsts[:-1], strict=True) if part.order is not None]
    windows = [part.windows for part in parts if part.windows is not None]
    rows = [part.table_rows for part in parts if part.table_rows is not None]
    weights = [part.table_weights for part in parts if part.table_weights is not None]
    return VisionPlan(
        grid_thw=torch.tensor(grids),
        tokens=tokens,
        positions=torch.cat([part.positions for part in parts]),
        frames=sequences_of([height * width for time, height, width in grids for _ in range(time)], grouped=True),
        order=torch.cat(orders) if window else None,
        windows=sequences_of(np.concatenate(windows), grouped=True) if window else None,
        table_rows=torch.cat(rows) if table else None,
        table_weights=torch.cat(weights) if table else None,
    )


@dataclass(frozen=True, slots=True)
class _PicturePlan:
    """The parts of a `VisionPlan` for one picture, with the lengths of its windows."""

    positions: Tensor
    order: Tensor | None
    windows: npt.NDArray[np.int32] | None
    table_rows: Tensor | None
    table_weights: Tensor | None


@lru_cache(maxsize=_SIZES_KEPT)
def _plan_picture(
    grid: Grid, merge: int, window: tuple[int, int] | None, table: tuple[int, str, bool] | None
) -> _PicturePlan:
    """Plan one picture.

    Args:
        grid: Its size.
        merge: Side of the square of patches that makes one token.
        window: Sides of a window and of a patch in pixels, or `None` in a tower without windows.
        table: Side of the table of learned positions, the mode of interpolation, and whether corners are aligned, or
            `None` in a tower without a table.
    """
    grid_thw = torch.tensor([grid])
    order = windows = rows = weights = None
    if window is not None:
        order, ends = get_vision_window_index(grid_thw, merge, *window)
        windows = np.diff(ends.numpy())
    if table is not None:
        side, mode, align_corners = table
        rows, weights = get_vision_interpolation_indices_and_weights(
            grid_thw, side, mode=mode, align_corners=align_corners, spatial_merge_size=merge
        )
    positions = get_vision_position_ids(grid_thw, merge)
    # Half as much to copy.
    return _PicturePlan(positions.int(), order, windows, None if rows is None else rows.int(), weights)
