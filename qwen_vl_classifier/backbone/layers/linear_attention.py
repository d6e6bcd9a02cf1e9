"""Gated linear attention (Qwen3.5) over packed rows: suffixes start from the state that their prefix leaves behind.

A linear layer has no mask: what a token sees is a state and the last inputs of a short convolution. So packed rows are
computed in two passes: all prefixes from nothing, then all suffixes, each a sequence of its own, from the final state
of the prefix and the last inputs of its convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from qwen_vl_classifier.backbone.layers.delta_rule import StateSharing, gated_delta_rule
from qwen_vl_classifier.backbone.layers.sequences import PADDING, PREFIX
from qwen_vl_classifier.backbone.layers.transfer import Movable, to_device


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Some sequences of tokens out of a batch of rows, as a batch of their own, padded on the right.

    Attributes:
        positions: int64, shape (sequences * longest,): where the tokens lie in the flattened rows; 0 for padding.
        padding: Boolean, shape (sequences, longest, 1), true where there is no token; `None` without padding.
        lengths: int64, shape (sequences,).
    """

    positions: Tensor
    padding: Tensor | None
    lengths: Tensor

    def gather(self, tokens: Tensor) -> Tensor:
        """Return (sequences, longest, features) of flattened rows, (rows * length, features); 0 for padding."""
        gathered = tokens.index_select(0, self.positions).view(len(self.lengths), -1, *tokens.shape[1:])
        return gathered if self.padding is None else gathered.masked_fill(self.padding, 0)


@dataclass(frozen=True, slots=True)
class SegmentLayout(Movable):
    """Where the sequences of packed rows lie: what takes the place of a mask in a linear layer.

    Attributes:
        first: For each row, the sequence that starts from nothing: its prefix. A row of fewer than two suffixes is one
            sequence.
        suffixes: The suffixes of the other rows, or `None`.
        sharing: For each of these suffixes, its row; `None` without suffixes.
        order: int64, shape (rows * length,): for each token, its place among those of `first` and of `suffixes`, one
            after the other, padding included; the place after the last for padding.
    """

    first: SequenceBatch
    suffixes: SequenceBatch | None
    sharing: StateSharing | None
    order: Tensor


def segment_layout(segments: Sequence[Sequence[int]], device: torch.device) -> SegmentLayout:
    """Find the sequences of packed rows.

    Args:
        segments: As `packed_mask` takes them: for each row, the segment of each token: 0 for the prefix, 1, 2, ... for
            the suffixes, -1 for padding, on either side.
        device: The device of the result.
    """
    table = np.array(segments, dtype=np.int64)
    columns = np.arange(table.size).reshape(table.shape)
    first: list[npt.NDArray[np.int64]] = []
    by_count: dict[int, list[tuple[int, list[npt.NDArray[np.int64]]]]] = {}
    for number, (row, places) in enumerate(zip(table, columns, strict=True)):
        suffixes = np.unique(row[row > PREFIX])
        shared = len(suffixes) > 1
        first.append(places[row == PREFIX if shared else row != PADDING])
        if shared:
            by_count.setdefault(len(suffixes), []).append((number, [places[row == suffix] for suffix in suffixes]))
    start, order = 0, np.full(table.size, -1)
    batches = []
    rows = [(number, suffixes) for group in by_count.values() for number, suffixes in group]
    for sequences in (first, [suffix for _, suffixes in rows for suffix in suffixes]):
        longest = max([1, *map(len, sequences)])
        positions = np.zeros((len(sequences), longest), dtype=np.int64)
        for number, places in enumerate(sequences):
            positions[number, : len(places)] = places
            order[places] = start + number * longest + np.arange(len(places))
        lengths = np.array([len(places) for places in sequences], dtype=np.int64)
        padding = np.arange(longest) >= lengths[:, None]
        batches.append(
            SequenceBatch(
                torch.from_numpy(positions.ravel()),
                torch.from_numpy(padding).unsqueeze(-1) if padding.any() else None,
                torch.from_numpy(lengths),
            )
        )
        start += positions.size
    order[order < 0] = start
    sharing = StateSharing(
        owners=torch.tensor([number for number, suffixes in rows for _ in suffixes], dtype=torch.long),
        groups=tuple((torch.tensor([number for number, _ in group]), count) for count, group in by_count.items()),
    )
    layout = SegmentLayout(
        first=batches[0],
        suffixes=batches[1] if rows else None,
        sharing=sharing if rows else None,
        order=torch.from_numpy(order),
    )
    return to_device(layout, device)


def use_packed_linear_attention(model: nn.Module) -> None:
    """Let the linear layers of a transformers model take a `SegmentLayout` as their mask.

    Without a mask, rows begin at their first column, and padding is on the right. With a mask that is a tensor, or a
    cache, transformers' own forward runs. Weights and names do not change.

    Args:
        model: A model without language head; changed in place. Without linear layers nothing changes.
    """
    for layer in model.language_model.layers:  # type: ignore[union-attr]
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.forward = MethodType(_gated_delta_net, layer.linear_attn)


def _gated_delta_net(
    self: Any,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | SegmentLayout | None = None,
    **options: Any,
) -> Tensor:
    """Replace the forward of a linear layer, shape (rows, length, hidden)."""
    if cache_params is not None or isinstance(attention_mask, Tensor):
        own: Tensor = type(self).forward(self, hidden_states, cache_params, attention_mask, **options)
        return own
    rows, length, _ = hidden_states.shape
    inputs = self.in_proj_qkv(hidden_states)
    gate = self.in_proj_z(hidden_states).view(rows, length, -1, self.head_v_dim)
    beta = self.in_proj_b(hidden_states).sigmoid()
    slope = nn.functional.softplus(self.in_proj_a(hidden_states).float() + self.dt_bias)
    log_decay = -self.A_log.float().exp() * slope
    if attention_mask is None:
        before = inputs.new_zeros(rows, self.conv_kernel_size - 1, inputs.shape[-1])
        query, key, value = _convolved(self, before, inputs)
        output, _ = gated_delta_rule(query, key, value, log_decay, beta)
    else:
        output = _in_two_passes(self, inputs, log_decay, beta, attention_mask)
    normed = self.norm(output.reshape(-1, self.head_v_dim), gate.reshape(-1, self.head_v_dim))
    projected: Tensor = self.out_proj(normed.view(rows, length, -1))
    return projected


def _in_two_passes(module: Any, inputs: Tensor, log_decay: Tensor, beta: Tensor, layout: SegmentLayout) -> Tensor:
    """Run the prefixes and then the suffixes of packed rows, shape (rows, length, heads, value size)."""
    tokens = [part.flatten(0, 1) for part in (inputs, log_decay, beta)]
    inputs_of_first, *gates = (layout.first.gather(part) for part in tokens)
    reach = module.conv_kernel_size - 1
    nothing = inputs.new_zeros(len(inputs), reach, inputs.shape[-1])
    query, key, value = _convolved(module, nothing, inputs_of_first)
    output, states = gated_delta_rule(query, key, value, *gates, final_states=layout.suffixes is not None)
    outputs = [output.flatten(0, 1)]
    if layout.suffixes is not None and layout.sharing is not None:
        # The last inputs of each prefix: its token i is column i + reach here.
        columns = layout.first.lengths.unsqueeze(-1) + torch.arange(reach, device=inputs.device)
        padded = torch.cat([nothing, inputs_of_first], dim=1)
        before = padded.gather(1, columns.unsqueeze(-1).expand(-1, -1, inputs.shape[-1]))
        inputs_of_suffixes, *gates = (layout.suffixes.gather(part) for part in tokens)
        query, key, value = _convolved(module, before.index_select(0, layout.sharing.owners), inputs_of_suffixes)
        output, _ = gated_delta_rule(query, key, value, *gates, states=states, sharing=layout.sharing)
        outputs.append(output.flatten(0, 1))
    outputs.append(output.new_zeros(1, *output.shape[2:]))
    return torch.cat(outputs).index_select(0, layout.order).view(*inputs.shape[:2], *output.shape[2:])


def _convolved(module: Any, before: Tensor, inputs: Tensor) -> list[Tensor]:
    """Convolve each channel of sequences with what comes before them, and split the result into heads.

    Args:
        module: The linear layer.
        before: Shape (sequences, kernel - 1, channels).
        inputs: Shape (sequences, length, channels).

    Returns:
        Queries, keys and values, shape (sequences, length, heads, size) of each.
    """
    weight = module.conv1d.weight
    columns = torch.cat([before, inputs], dim=1).to(weight.dtype)
    # In two dimensions, torch convolves channels that are last as they lie, several times as fast.
    image = columns.transpose(1, 2).unsqueeze(2)
    convolved = nn.functional.conv2d(image, weight.unsqueeze(2), module.conv1d.bias, groups=len(weight))
    mixed = ACT2FN[module.activation](convolved).squeeze(2).transpose(1, 2).to(inputs.dtype)
    parts = mixed.split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    sizes = (module.head_k_dim, module.head_k_dim, module.head_v_dim)
    return [part.reshape(*part.shape[:2], -1, size) for part, size in zip(parts, sizes, strict=True)]
