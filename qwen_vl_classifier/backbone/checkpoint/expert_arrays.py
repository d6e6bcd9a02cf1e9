"""Convert the weights of experts, of which files have several layouts, to the arrays that the model uses.

Published Qwen3.5-MoE has them as the model does: `gate_up_proj` of shape (experts, 2 * width, hidden) and `down_proj`
of shape (experts, hidden, width). Published Qwen3-VL-MoE has the last two axes swapped. transformers 5 saves
Qwen3.5-MoE as three matrices for each expert, `gate_proj`, `up_proj` and `down_proj`, and joins them on loading, which
takes less memory than to join them here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.checkpoint.weight_files import StoredWeight
from qwen_vl_classifier.backbone.checkpoint.weight_names import experts_of_array
from qwen_vl_classifier.backbone.families import Family

_ALIGNMENT = 64  # bytes
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"

Shapes = dict[str, tuple[int, ...]]


def match_experts(
    family: Family, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredWeight]
) -> tuple[Shapes, dict[str, StoredWeight]]:
    """Match the expert weights that the model expects with those in the files, in one layout.

    Args:
        family: The checkpoint's family.
        expected: The shape of every weight of the model.
        stored: The stored weights, by their name in the model.

    Returns:
        Expected shapes, with three matrices for each expert where the files have those; and the stored weights, marked
        as transposed, with the shape that the model has, where files have the last two axes swapped.
    """
    expected, stored = dict(expected), dict(stored)
    for experts in sorted({found for key in expected if (found := experts_of_array(key))}):
        names = [f"{experts}.{part}" for part in (_GATE_UP, _DOWN)]
        single = family.splits_experts and f"{experts}.0.{_DOWN}.weight" in stored
        if single and not any(name in stored for name in names):
            gate_up, down = (expected.pop(name) for name in names)
            expected |= _of_single_experts(experts, gate_up, down)
        elif all(name in stored for name in names) and _is_transposed(*(stored[name].shape for name in names)):
            for name in names:
                *first, rows, columns = stored[name].shape
                stored[name] = replace(stored[name], shape=(*first, columns, rows), transposed=True)
    return expected, stored


def lay_out_experts(model: nn.Module) -> None:
    """Copy arrays of experts whose axes are swapped in memory, or that are less aligned than torch aligns its own.

    The order of sums in a matrix product depends on both, and files with the same weights should give the same features
    to the last bit. Memory is needed for one array at a time.

    Args:
        model: A model on the device where it stays; changed in place.
    """
    for name, parameter in model.named_parameters():
        aligned = parameter.device.type != "cpu" or parameter.data_ptr() % _ALIGNMENT == 0
        if experts_of_array(name) and not (parameter.is_contiguous() and aligned):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def published_array(family: Family, name: str, weight: Tensor) -> Tensor:
    """Return a weight in the layout that published files of its family use.

    Args:
        family: The family of the model.
        name: The weight's name in the model.
        weight: The weight.
    """
    return weight.transpose(1, 2) if family.transposes_experts and experts_of_array(name) else weight


def _of_single_experts(experts: str, gate_up: tuple[int, ...], down: tuple[int, ...]) -> Shapes:
    """Return the shapes of the matrices of each expert, by name, from those of a layer's arrays."""
    count, hidden, width = down
    shapes: Shapes = {}
    for number in range(count):
        for part in ("gate_proj", "up_proj"):
            shapes[f"{experts}.{number}.{part}.weight"] = (gate_up[1] // 2, gate_up[2])
        shapes[f"{experts}.{number}.{_DOWN}.weight"] = (hidden, width)
    return shapes


def _is_transposed(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Tell by the shapes of a layer's two arrays whether their last two axes are swapped.

    One of them alone can be square and does not tell; together they always do. As in the model they are
    (experts, 2 * width, hidden) and (experts, hidden, width); swapped, (experts, hidden, 2 * width) and
    (experts, width, hidden).
    """
    return len(gate_up) == len(down) == 3 and (gate_up[1], gate_up[2]) == (down[2], 2 * down[1])
