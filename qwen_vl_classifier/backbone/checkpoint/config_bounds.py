"""Check the numbers in a checkpoint's `config.json`, which may be wrong or hostile, before using them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qwen_vl_classifier.errors import CheckpointError, one_line

_MOST_LAYERS = 1024

# For each field of the whole, of the language model or of the vision tower: the least and the greatest number that a
# model could have. Shapes of weights are compared with the files afterwards; this bounds what is built before that.
_BOUNDS = {
    "num_hidden_layers": (1, _MOST_LAYERS),
    "depth": (1, _MOST_LAYERS),
    "hidden_size": (1, 1 << 18),
    "out_hidden_size": (1, 1 << 18),
    "embed_dim": (1, 1 << 18),
    "intermediate_size": (1, 1 << 21),
    "moe_intermediate_size": (1, 1 << 21),
    "shared_expert_intermediate_size": (1, 1 << 21),
    "num_experts": (1, 1 << 14),
    "num_local_experts": (1, 1 << 14),
    "num_experts_per_tok": (1, 1 << 14),
    "decoder_sparse_step": (1, _MOST_LAYERS),
    "full_attention_interval": (1, _MOST_LAYERS),
    "linear_conv_kernel_dim": (1, 256),
    "linear_key_head_dim": (1, 1 << 14),
    "linear_value_head_dim": (1, 1 << 14),
    "linear_num_key_heads": (1, 1 << 12),
    "linear_num_value_heads": (1, 1 << 12),
    "mlp_ratio": (1, 64),
    "vocab_size": (1, 1 << 24),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (1, 1 << 12),
    "num_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 14),
    "max_position_embeddings": (1, 1 << 30),
    "num_position_embeddings": (1, 1 << 24),
    "in_channels": (1, 64),
    "in_chans": (1, 64),
    "patch_size": (1, 256),
    "spatial_patch_size": (1, 256),
    "temporal_patch_size": (1, 64),
    "spatial_merge_size": (1, 64),
    "window_size": (1, 1 << 20),
    "tokens_per_second": (1, 1 << 20),
    "rms_norm_eps": (0, 1),
    "rope_theta": (1, 1e15),
    "partial_rotary_factor": (1e-3, 1),
    "factor": (1e-3, 1e6),
    "original_max_position_embeddings": (1, 1 << 30),
}
_ROTARY = 4  # height and width, a sine and a cosine of each
_LISTS = ("deepstack_visual_indexes", "fullatt_block_indexes", "layer_types", "mlp_only_layers")
_PARTS = ("text_config", "vision_config")
_ROTATIONS = ("rope_scaling", "rope_parameters")


def check_numbers(content: Mapping[str, Any], name: str) -> None:
    """Check that the numbers of a `config.json` are finite, and that no size is beyond what any model has.

    Args:
        content: Of the file.
        name: The checkpoint's name, for messages.

    Raises:
        CheckpointError: A number is impossible; the message names it.
    """
    parts = [content, *(content[key] for key in _PARTS if isinstance(content.get(key), Mapping))]
    parts += [part[key] for part in parts for key in _ROTATIONS if isinstance(part.get(key), Mapping)]
    for part in parts:
        for key, value in part.items():
            if key in _BOUNDS and value is not None:
                low, high = _BOUNDS[key]
                if not _is_number(value) or not low <= value <= high:
                    raise _impossible(key, value, f"a number from {low:,} to {high:,.15g}", name)
            if key in _LISTS and value is not None and not (isinstance(value, list) and len(value) <= _MOST_LAYERS):
                raise _impossible(key, value, f"a list of at most {_MOST_LAYERS:,}", name)
    if not _is_finite(content):
        raise CheckpointError(
            f"{name}: a number in its config.json is not finite; give the config.json that was saved with these weights"
        )


def check_heads(config: Any, name: str) -> None:
    """Check that heads and windows divide the sizes they belong to, and that there are enough experts.

    A model is built without that, and fails when it runs.

    Args:
        config: transformers' configuration.
        name: The checkpoint's name, for messages.

    Raises:
        CheckpointError: They do not.
    """
    text, vision = config.get_text_config(), config.vision_config
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    if heads % (text.num_key_value_heads or heads) or head % 2:
        raise _impossible("num_attention_heads", heads, "a multiple of num_key_value_heads, of even width each", name)
    keys = getattr(text, "linear_num_key_heads", 1)
    values = getattr(text, "linear_num_value_heads", keys)
    if values % keys:
        raise _impossible("linear_num_value_heads", values, f"a multiple of linear_num_key_heads, {keys:,}", name)
    experts, chosen = getattr(text, "num_experts", 1), getattr(text, "num_experts_per_tok", 1)
    if chosen > experts:
        raise _impossible("num_experts_per_tok", chosen, f"at most num_experts, {experts:,}", name)
    width = getattr(vision, "embed_dim", vision.hidden_size)
    if width % (vision.num_heads * _ROTARY):
        raise _impossible("num_heads", vision.num_heads, f"heads that divide {width:,}, of a width by {_ROTARY}", name)
    window = getattr(vision, "window_size", None)
    if window is not None and window < vision.patch_size * vision.spatial_merge_size:
        raise _impossible("window_size", window, "at least one merged patch", name)


def _impossible(key: str, value: object, expected: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {key} is {one_line(value, 80)} in its config.json, expected {expected}; "
        "give the config.json that was saved with these weights"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
