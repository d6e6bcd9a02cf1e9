"""Checkpoints of every family with the widths of a published one and few layers, for comparing families.

Widths and heads of both towers are those of the config.json of the checkpoint that is named with each shape. A decoder
has four layers, of which one has full attention where most have linear attention, and the vision tower has its share of
that. Mixtures have 32 experts, as wide and as many chosen for each token as published. Embeddings are those of the
built-in tokeniser.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import SPECIAL_TOKENS, write_random_checkpoint

from qwen_vl_classifier.backbone.checkpoint.hub import BUILTIN

_LAYERS = 4
_EXPERTS = 32
_OLD = ("qwen2_vl", "qwen2_5_vl")  # flat files, patches of 14 pixels


@dataclass(frozen=True, slots=True)
class FamilyShape:
    """The sizes of a checkpoint.

    Attributes:
        family: Its `model_type`.
        published: The checkpoint whose widths it has.
        text: What its config.json says about the decoder.
        vision: About the vision tower.
    """

    family: str
    published: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]


def _decoder(hidden: int, heads: int, key_heads: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": key_heads, **more}


def _tower(depth: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {"depth": depth, "hidden_size": hidden, "num_heads": heads, **more}


def _experts(width: int, **more: Any) -> dict[str, Any]:
    return {"num_experts": _EXPERTS, "num_experts_per_tok": 8, "moe_intermediate_size": width, **more}


def _linear(key_heads: int, value_heads: int) -> dict[str, Any]:
    return {
        "attn_output_gate": True,
        "full_attention_interval": _LAYERS,
        "layer_types": ["linear_attention"] * (_LAYERS - 1) + ["full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    }


_MROPE = {"rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
_INTERLEAVED = {
    "head_dim": 128,
    "rope_theta": 5000000,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
}
FAMILY_SHAPES = {
    shape.family: shape
    for shape in (
        FamilyShape(
            "qwen2_vl",
            "Qwen2-VL-2B",
            _decoder(1536, 12, 2, intermediate_size=8960, **_MROPE),
            {"depth": 5, "embed_dim": 1280, "hidden_size": 1536, "mlp_ratio": 4, "num_heads": 16},
        ),
        FamilyShape(
            "qwen2_5_vl",
            "Qwen2.5-VL-3B",
            _decoder(2048, 16, 2, intermediate_size=11008, **_MROPE),
            _tower(4, 1280, 16, intermediate_size=3420, window_size=112, fullatt_block_indexes=[3]),
        ),
        FamilyShape(
            "qwen3_vl",
            "Qwen3-VL-2B",
            _decoder(2048, 16, 8, intermediate_size=6144, **_INTERLEAVED),
            _tower(4, 1024, 16, intermediate_size=4096, deepstack_visual_indexes=[1, 2]),
        ),
        FamilyShape(
            "qwen3_vl_moe",
            "Qwen3-VL-30B-A3B",
            _decoder(2048, 32, 4, intermediate_size=6144, **_INTERLEAVED, **_experts(768, norm_topk_prob=True)),
            _tower(2, 1152, 16, intermediate_size=4304, deepstack_visual_indexes=[0]),
        ),
        FamilyShape(
            "qwen3_5",
            "Qwen3.5-0.8B",
            _decoder(1024, 8, 2, head_dim=256, intermediate_size=3584, **_linear(16, 16)),
            _tower(2, 768, 12, intermediate_size=3072, deepstack_visual_indexes=[]),
        ),
        FamilyShape(
            "qwen3_5_moe",
            "Qwen3.5-35B-A3B",
            _decoder(
                2048, 16, 2, head_dim=256, **_linear(16, 32), **_experts(512, shared_expert_intermediate_size=512)
            ),
            _tower(3, 1152, 16, intermediate_size=4304, deepstack_visual_indexes=[]),
        ),
    )
}


def narrow(shape: FamilyShape) -> FamilyShape:
    """Return a shape of the same kind and depth that runs in no time, to see that a benchmark works."""
    hidden = 2 * shape.text.get("head_dim", 128)
    text = {key: 48 if key.endswith("intermediate_size") else value for key, value in shape.text.items()}
    text |= {key: 2 for key in text if key.startswith("linear_num_")}
    text |= _decoder(hidden, 2, 1)
    width = {"embed_dim": 64, "hidden_size": hidden} if "embed_dim" in shape.vision else {"hidden_size": 64}
    vision = {**shape.vision, **width, "num_heads": 2}
    if "intermediate_size" in vision:
        vision["intermediate_size"] = 96
    return FamilyShape(shape.family, "nothing that is published", text, vision)


def write_family_checkpoint(shape: FamilyShape, folder: Path, seed: int = 0) -> Path:
    """Write a random checkpoint of a shape, and return its folder."""
    return write_random_checkpoint(configuration(shape), _picture_settings(shape), folder, seed)


def configuration(shape: FamilyShape) -> dict[str, Any]:
    """Return a config.json as published checkpoints of the family have it."""
    builtin = json.loads((BUILTIN["builtin:tiny"] / "config.json").read_text(encoding="utf-8"))
    tokens = {key: builtin[key] for key in SPECIAL_TOKENS}
    text = {
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "num_hidden_layers": _LAYERS,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "vocab_size": builtin["vocab_size"],
        **shape.text,
    }
    old = shape.family in _OLD
    vision = {
        "hidden_act": "quick_gelu" if shape.family == "qwen2_vl" else "silu" if old else "gelu_pytorch_tanh",
        "in_chans" if old else "in_channels": 3,
        "patch_size": _patch(shape),
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **shape.vision,
    }
    if shape.family != "qwen2_vl":  # its `hidden_size` is the decoder's
        vision["out_hidden_size"] = shape.text["hidden_size"]
    common = {"model_type": shape.family, "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    if old:
        return {**common, **text, **tokens, "use_sliding_window": False, "vision_config": vision}
    vision |= {"model_type": shape.family, "num_position_embeddings": 2304}
    text |= {"model_type": f"{shape.family}_text", "bos_token_id": tokens["bos_token_id"]}
    text["eos_token_id"] = tokens["eos_token_id"]
    return {**common, **tokens, "text_config": text, "vision_config": vision}


def _patch(shape: FamilyShape) -> int:
    return 14 if shape.family in _OLD else 16


def _picture_settings(shape: FamilyShape) -> dict[str, Any]:
    old = shape.family in _OLD
    return {
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        "patch_size": _patch(shape),
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073] if old else [0.5, 0.5, 0.5],
        "image_std": [0.26862954, 0.26130258, 0.27577711] if old else [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessor",
    }
