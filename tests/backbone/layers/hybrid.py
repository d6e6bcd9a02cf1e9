"""Small decoders of transformers' own code with random weights whose states last, and rows to pack.

transformers draws decays under which most heads forget everything within a token, and small weights: a lost state would
hardly show. Here a state lasts for tens of tokens. Experts are not square, so that a transposed one cannot pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

HIDDEN = 32
CPU = torch.device("cpu")

COMMON = {
    "vocab_size": 8,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SETTINGS: dict[str, dict[str, Any]] = {
    "Qwen3_5": COMMON | LINEAR,
    "Qwen3_5Moe": COMMON | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 20},
    "Qwen3VLMoe": COMMON
    | EXPERTS
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
}
FOLDERS = {"Qwen3_5": "qwen3_5", "Qwen3_5Moe": "qwen3_5_moe", "Qwen3VLMoe": "qwen3_vl_moe"}


def decoder(kind: str) -> Any:
    """Make a decoder of a kind, always the same one, frozen."""
    place = f"transformers.models.{FOLDERS[kind]}"
    config = getattr(import_module(f"{place}.configuration_{FOLDERS[kind]}"), f"{kind}TextConfig")
    torch.manual_seed(0)
    model = getattr(import_module(f"{place}.modeling_{FOLDERS[kind]}"), f"{kind}TextModel")(config(**SETTINGS[kind]))
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(0.002, 0.3).log_()
        elif parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        else:
            parameter.mul_(12 if "conv1d" in name else 6)
    return model


def as_model(text: nn.Module) -> Any:
    """Put a decoder where those of models with pictures are."""
    model = nn.Module()
    model.language_model = text
    model.visual = nn.Module()
    return model


def row(left: int, prefix: int, suffixes: Sequence[int], length: int) -> list[int]:
    """Write the segments of a row of so many tokens of each kind, the rest being padding on the right."""
    segments = [-1] * left + [0] * prefix
    for number, size in enumerate(suffixes, start=1):
        segments += [number] * size
    return segments + [-1] * (length - len(segments))


SIZES = st.one_of(st.integers(0, 5), st.integers(0, 90))
"""Tokens of a prefix or a suffix: shorter than the convolution, or more than a chunk."""


@st.composite
def packed_rows(draw: st.DrawFn) -> list[list[int]]:
    """Draw the segments of one to four rows of equal length, padded on both sides."""
    shapes = draw(
        st.lists(st.tuples(st.integers(0, 3), SIZES, st.lists(SIZES, min_size=1, max_size=4)), min_size=1, max_size=4)
    )
    length = max(1, *(left + prefix + sum(suffixes) for left, prefix, suffixes in shapes))
    return [row(left, prefix, suffixes, length) for left, prefix, suffixes in shapes]


def own_rows(segments: Sequence[Sequence[int]]) -> list[tuple[int, Tensor]]:
    """For each suffix, or prefix without any, give its row and the columns that it would have in a row of its own."""
    alone = []
    for number, line in enumerate(torch.tensor(segments)):
        suffixes = [int(segment) for segment in line.unique() if segment > 0] or [0]
        columns = [((line == 0) | (line == suffix)).nonzero()[:, 0] for suffix in suffixes]
        alone += [(number, tokens) for tokens in columns if len(tokens)]
    return alone


def run_layers(text: Any, states: Tensor, positions: Tensor, masks: dict[str, Any]) -> Tensor:
    """Run all layers and the last norm, each layer with the mask of its kind: "full" or "linear"."""
    rotary = text.rotary_emb(states, positions.expand(3, *positions.shape))
    for layer in text.layers:
        mask = masks["linear" if hasattr(layer, "linear_attn") else "full"]
        states = layer(states, attention_mask=mask, position_embeddings=rotary, use_cache=False)
    return text.norm(states)
