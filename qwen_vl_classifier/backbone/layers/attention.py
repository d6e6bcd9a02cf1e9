"""Faster attention: windows of pictures without a loop, and packed rows with a mask or with a plan."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qwen_vl_classifier.backbone.layers.rotary import Rotary, rotate
from qwen_vl_classifier.backbone.layers.row_plan import RowPlan
from qwen_vl_classifier.backbone.layers.sequences import PADDING, PREFIX, Sequences, sequences_of
from qwen_vl_classifier.backbone.layers.transfer import to_device
from qwen_vl_classifier.backbone.layers.varlen import varlen_attention


def packed_mask(segments: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Build the mask under which several suffixes share one prefix without seeing each other.

    A token attends to itself and to earlier tokens of the prefix or of its own suffix. It sees exactly what it would
    see in a row of its own, so its hidden states are the same.

    Args:
        segments: For each row, the segment of each token: 0 for the prefix, 1, 2, ... for the suffixes, -1 for
            padding, on either side.
        device: The device of the mask.

    Returns:
        Boolean, shape (rows, 1, length, length); true where the query (third axis) may see the key (fourth).
    """
    segment = to_device(torch.from_numpy(np.array(segments, dtype=np.int32)), device)
    length = segment.shape[1]
    query, key = segment.unsqueeze(2), segment.unsqueeze(1)
    earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    # Padding sees itself, as any segment does: a query with no key at all would turn into NaN and poison the values
    # of the next layer. Nothing else sees it.
    visible = ((key == PREFIX) & (query != PADDING)).logical_or_(key == query).logical_and_(earlier)
    return visible.unsqueeze(1)


_MOST_KEYS = 384  # of a query; for more, plain products need too much memory
_NAME = "qwen_vl_classifier"  # of this attention in transformers' registry


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Compute attention, with plain matrix products where they train faster than torch's fused attention.

    That is the case for short sequences in bfloat16 on CPUs with gradients: the backward pass of the fused kernel is
    slow there.

    Args:
        query: Shape (batch, heads, queries, head).
        key: Shape (batch, heads, keys, head).
        value: Like `key`.
        scale: Factor of the scores before the softmax.
        mask: Boolean, true where a query may see a key; broadcast to the scores. `None` masks nothing.
        causal: Without a mask, let each query see the keys up to its own position only.

    Returns:
        Shape (batch, heads, queries, head).
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    plain = torch.is_grad_enabled() and dtype == torch.bfloat16 and key.shape[-2] <= _MOST_KEYS
    if query.device.type != "cpu" or not plain:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, is_causal=causal
        )
    scores = (query * scale) @ key.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(value.dtype) @ value


def use_faster_attention(model: nn.Module) -> None:
    """Replace the attention of a transformers Qwen-VL model by `attend`, in its decoder and its vision tower.

    transformers calls its vision attention once for each window of each picture, and the calls cost more than the
    attention. Here all windows, or at least all of one length, take one call. Weights and names do not change, and
    results only by the order of sums.

    Args:
        model: A model without language head; changed in place.
    """
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attend_in_decoder)
    model.language_model.config._attn_implementation = _NAME  # type: ignore[union-attr]
    for module in model.visual.modules():  # type: ignore[union-attr]
        if hasattr(module, "qkv") and hasattr(module, "proj"):
            module.forward = MethodType(_vision_attention, module)


def attend_in_decoder(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | RowPlan | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the signature of transformers' attention functions.

    Args:
        module: The attention layer.
        query: Shape (batch, heads, length, head).
        key: Shape (batch, heads that share keys, length, head).
        value: Like `key`.
        attention_mask: As `packed_mask` or `plan_rows` makes it; `None` is plain causal attention.
        scaling: Factor of the scores.

    Returns:
        Shape (batch, length, heads, head), and `None` for the weights.
    """
    groups = module.num_key_value_groups
    if isinstance(attention_mask, RowPlan):
        strips = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        attended = attention_mask.attend(*strips, scale=scaling)
        return attended.view(len(query), -1, *attended.shape[1:]), None
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    output = attend(query, key, value, scale=scaling, mask=attention_mask, causal=attention_mask is None)
    return output.transpose(1, 2).contiguous(), None


def _vision_attention(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor | Sequences,
    position_embeddings: Rotary,
    **_: Any,
) -> Tensor:
    """Replace the forward of a vision attention layer.

    Args:
        self: The layer.
        hidden_states: All windows, one after the other, shape (patches, hidden).
        cu_seqlens: The windows, as `VisionPlan` gives them, or where they begin and the end of the last one, as
            transformers does, shape (windows + 1,).
        position_embeddings: Cosine and sine of the rotary positions, each of shape (patches, head).
    """
    query, key, value = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1).unbind(1)
    query, key = (rotate(part, position_embeddings) for part in (query, key))
    projected: Tensor = self.proj(attend_within_windows(query, key, value, cu_seqlens, self.scaling))
    return projected


def attend_within_windows(
    query: Tensor, key: Tensor, value: Tensor, windows: Tensor | Sequences, scale: float
) -> Tensor:
    """Compute attention within consecutive windows: of all lengths in one call, or else all of one length in one call.

    Args:
        query: Rotated already, shape (patches, heads, head).
        key: Likewise.
        value: Likewise, but not rotated.
        windows: The windows, or where they begin and the end of the last one, shape (windows + 1,): a device is then
            waited for.
        scale: Factor of the scores before the softmax.

    Returns:
        Shape (patches, heads * head).
    """
    attention = varlen_attention(value, value.shape[-1])
    if attention is not None and isinstance(windows, Sequences):
        return attention(query, key, value, windows, windows, scale=scale).flatten(1)
    if isinstance(windows, Tensor):
        windows = sequences_of(np.diff(windows.cpu().numpy()), grouped=True).to(value.device)
    attended = torch.empty_like(query)
    for size, places in windows.groups:
        # (patches, heads, head) -> (windows, heads, patches of a window, head)
        split = [
            (part if places is None else part[places]).view(-1, size, *part.shape[1:]).transpose(1, 2)
            for part in (query, key, value)
        ]
        output = attend(*split, scale=scale).transpose(1, 2).flatten(0, 1)
        attended = output if places is None else attended.index_copy(0, places, output)
    return attended.flatten(1)
