"""The kinds of decoder layers, and what tells each of them which tokens of a packed row a token may see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import nn

from qwen_vl_classifier.backbone.layers.attention import packed_mask
from qwen_vl_classifier.backbone.layers.linear_attention import segment_layout

Segments: TypeAlias = Sequence[Sequence[int]]

FULL, LINEAR = "full_attention", "linear_attention"  # as `layer_types` of a `config.json` says

MASKS: Mapping[str, Callable[[Segments, torch.device], Any]] = MappingProxyType(
    {FULL: packed_mask, LINEAR: segment_layout}
)
"""For each kind, the function that makes what its layers take as `attention_mask` from the segments of the rows."""


def kind_of(layer: nn.Module) -> str:
    """Return the kind of a decoder layer, one of `MASKS`."""
    return LINEAR if hasattr(layer, "linear_attn") else FULL


def masks_for(layers: Iterable[nn.Module], segments: Segments | None, device: torch.device) -> dict[str, Any]:
    """Make the mask of each kind of layer.

    Args:
        layers: Decoder layers.
        segments: For each row, the segment of each token, as in `packed_mask`; `None` if every row is one sequence,
            padded on the right at most, which no layer needs a mask for.
        device: The device of the masks.

    Returns:
        The mask by kind.
    """
    kinds = {kind_of(layer) for layer in layers}
    return {kind: None if segments is None else MASKS[kind](segments, device) for kind in kinds}
