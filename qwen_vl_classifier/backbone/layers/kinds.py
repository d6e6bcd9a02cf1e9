"""The kinds of decoder layers, and the masks that say which tokens of a packed row a token may see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.layers.attention import packed_mask
from qwen_vl_classifier.backbone.layers.linear_attention import segment_layout
from qwen_vl_classifier.backbone.layers.row_plan import plan_rows
from qwen_vl_classifier.backbone.layers.transfer import to_device
from qwen_vl_classifier.backbone.layers.varlen import VarlenAttention, varlen_attention

Segments: TypeAlias = Sequence[Sequence[int]]

FULL, LINEAR = "full_attention", "linear_attention"  # as `layer_types` of a `config.json` says

MASKS: Mapping[str, Callable[[Segments, torch.device], Any]] = MappingProxyType(
    {FULL: packed_mask, LINEAR: segment_layout}
)
"""For each kind, the function that makes what its layers take as `attention_mask` from the segments of the rows.

For full attention, `plan_rows` takes its place where attention of many lengths runs."""

_IN_WORDS = {LINEAR: "linear attention (Gated DeltaNet)", FULL: "full attention"}  # in this order


def kind_of(layer: nn.Module) -> str:
    """Return the kind of a decoder layer, one of `MASKS`."""
    return LINEAR if hasattr(layer, "linear_attn") else FULL


def describe_layers(layers: Sequence[nn.Module], total: int, text_config: Any) -> str:
    """Describe how many layers of each kind there are, and how many experts.

    Args:
        layers: Decoder layers, from the first on.
        total: The number of layers of the checkpoint.
        text_config: The configuration of its decoder.

    Returns:
        One line such as "24: 18 linear attention (Gated DeltaNet), 6 full attention; 256 experts, 8 per token", or
        "3 of 24: ..." where only the first three are given.
    """
    counts = Counter(map(kind_of, layers))
    count = str(total) if len(layers) == total else f"{len(layers)} of {total}"
    if len(counts) == 1:
        kinds = _IN_WORDS[kind_of(layers[0])]
    else:
        kinds = ", ".join(f"{counts[kind]} {words}" for kind, words in _IN_WORDS.items() if kind in counts)
    with_experts = sum(hasattr(layer.mlp, "experts") for layer in layers)
    if not with_experts:
        return f"{count}: {kinds}"
    where = "" if with_experts == len(layers) else f" in {with_experts} layers"
    shared = " and a shared one" if getattr(text_config, "shared_expert_intermediate_size", 0) else ""
    experts = f"{text_config.num_experts} experts{where}, {text_config.num_experts_per_tok} per token{shared}"
    return f"{count}: {kinds}; {experts}"


def masks_for(layers: Iterable[nn.Module], segments: Segments | None, states: Tensor) -> dict[str, Any]:
    """Make the mask of each kind of layer, or what takes its place, without waiting for the device.

    Args:
        layers: Decoder layers.
        segments: For each row, the segment of each token, as in `packed_mask`; `None` if every row is one sequence,
            padded on the right at most.
        states: What the first layer takes, shape (rows, length, hidden).

    Returns:
        The mask by kind. `None` is causal attention, and for linear layers that rows begin at their first column.
    """
    masks: dict[str, Any] = {}
    for kind, layer in _one_of_each_kind(layers).items():
        attention = _varlen_attention_of(layer, states)
        if attention is not None:
            rows, length, _ = states.shape
            masks[kind] = to_device(plan_rows(segments, rows, length, attention), states.device)
        else:
            masks[kind] = None if segments is None else MASKS[kind](segments, states.device)
    return masks


def masked_part(layers: Sequence[nn.Module], states: Tensor) -> float:
    """Return the fraction of layers that compute attention for all pairs of tokens in a row, under a mask.

    Args:
        layers: Decoder layers.
        states: Any tensor of the device and type of their inputs.
    """
    layer = _one_of_each_kind(layers).get(FULL)
    if layer is None or _varlen_attention_of(layer, states) is not None:
        return 0.0
    return sum(kind_of(layer) == FULL for layer in layers) / len(layers)


def need_rows(layers: Sequence[nn.Module], states: Tensor) -> bool:
    """Tell whether any layer needs rows of one length, padded; the others take tokens of all rows in one strip.

    Args:
        layers: Decoder layers.
        states: Any tensor of the device and type of their inputs.
    """
    return any(_varlen_attention_of(layer, states) is None for layer in _one_of_each_kind(layers).values())


def _one_of_each_kind(layers: Iterable[nn.Module]) -> dict[str, nn.Module]:
    return {kind_of(layer): layer for layer in layers}


def _varlen_attention_of(layer: nn.Module, states: Tensor) -> VarlenAttention | None:
    if kind_of(layer) != FULL:
        return None
    attention: Any = layer.self_attn
    return varlen_attention(states, attention.head_dim, attention.num_key_value_groups)
