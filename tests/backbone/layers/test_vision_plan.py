"""What a vision tower is told about pictures, compared with what transformers computes itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import vision_utils

from qwen_vl_classifier.backbone.layers.vision_plan import plan_vision


def random_grids(seed: int) -> list[tuple[int, int, int]]:
    """Draw sizes of one to five pictures, some of them twice, some of several frames."""
    random = np.random.default_rng(seed)
    grids = [
        (int(random.choice([1, 1, 1, 2])), 2 * int(random.integers(1, 9)), 2 * int(random.integers(1, 9)))
        for _ in range(random.integers(1, 5))
    ]
    return [*grids, grids[0]] if seed % 2 else grids


def visual_of(nano_backbone) -> nn.Module:
    return nano_backbone(torch.float32).model.visual


def pixels_of(visual: nn.Module, grids: list[tuple[int, int, int]]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    width = visual.patch_embed.proj.weight[0].numel()
    return torch.randn(sum(map(int, np.prod(grids, axis=1))), width, generator=generator)


@pytest.mark.parametrize("seed", range(6))
def test_a_plan_holds_what_transformers_computes(nano_backbone, seed):
    visual = visual_of(nano_backbone)
    grids = random_grids(seed)
    plan, grid_thw = plan_vision(visual, grids), torch.tensor(grids)
    assert plan.tokens == tuple(int(np.prod(grid)) // 4 for grid in grids)
    assert torch.equal(plan.grid_thw, grid_thw)
    assert torch.equal(plan.positions, vision_utils.get_vision_position_ids(grid_thw, 2).int())
    assert torch.equal(plan.frames.starts, vision_utils.get_vision_cu_seqlens(grid_thw))
    assert (plan.windows is None) == (not hasattr(visual, "fullatt_block_indexes"))
    if plan.windows is not None:
        order, starts = vision_utils.get_vision_window_index(grid_thw, 2, visual.window_size, visual.patch_size)
        assert torch.equal(plan.order, order)
        assert torch.equal(plan.windows.starts, starts)
        assert plan.windows.longest == int(starts.diff().max())
    assert (plan.table_rows is None) == (not hasattr(visual, "pos_embed"))
    if plan.table_rows is not None:
        rows, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid_thw, visual.num_grid_per_side, align_corners=True, spatial_merge_size=2
        )
        assert torch.equal(plan.table_rows, rows.int())
        assert torch.equal(plan.table_weights, weights)


@pytest.mark.parametrize("seed", [3, 4])
def test_a_planned_tower_gives_the_same_to_the_last_bit(nano_backbone, seed):
    visual = visual_of(nano_backbone)
    grids = random_grids(seed)
    pixels = pixels_of(visual, grids)
    with torch.inference_mode():
        own = visual(pixels, grid_thw=torch.tensor(grids))
        plan = plan_vision(visual, grids)
        # Sizes that contradict the plan show that nothing else is computed from them.
        planned = visual(pixels, **plan.arguments() | {"grid_thw": torch.tensor([[1, 2, 2]])})
    assert torch.equal(planned.pooler_output, own.pooler_output)
    levels = [getattr(output, "deepstack_features", None) or [] for output in (planned, own)]
    assert all(torch.equal(level, wanted) for level, wanted in zip(*levels, strict=True))


def test_a_size_is_computed_once(nano_backbone, monkeypatch):
    visual = visual_of(nano_backbone)
    once = plan_vision(visual, [(1, 10, 18)])
    monkeypatch.setattr("qwen_vl_classifier.backbone.layers.vision_plan.get_vision_position_ids", None)
    twice = plan_vision(visual, [(1, 10, 18), (1, 10, 18)])
    assert torch.equal(twice.positions, once.positions.repeat(2, 1))


def test_a_size_that_was_planned_for_inference_serves_training(nano_backbone):
    visual = visual_of(nano_backbone)
    grids = [(1, 14, 6)]
    with torch.inference_mode():
        plan_vision(visual, grids)
    patches = pixels_of(visual, grids).requires_grad_()
    with torch.enable_grad():
        visual(patches, **plan_vision(visual, grids).arguments()).pooler_output.sum().backward()
    assert patches.grad is not None
