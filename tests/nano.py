"""Random checkpoints of every family, a few hundred kilobytes each, in the layout that the hub publishes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_vl_classifier.backbone.checkpoint.hub import BUILTIN

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
HYBRID = ("qwen3_5", "qwen3_5_moe")
"""Families with layers of linear attention: all but every fourth."""
EXPERTS = ("qwen3_vl_moe", "qwen3_5_moe")
"""Families with experts."""
KINDS = ("qwen2_5_vl", "qwen3_vl_moe", "qwen3_5")
"""A family of each kind of decoder: plain, with experts, hybrid. For what does not depend on more than that."""
HIDDEN_SIZE = 64
NUM_LAYERS = 4

_TOKEN_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "image_token_id",
    "video_token_id",
)
_TEXT = {
    "hidden_act": "silu",
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 128,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
}
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,  # of no other size, so that a transposed array shows
}
_HYBRID_TEXT = {
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 24,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
}
_OLD_NAMES = ("qwen2_vl", "qwen2_5_vl")  # the names of checkpoints that were published before transformers 4.52
_FLAT_TEXT = {
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": NUM_LAYERS,
    "attention_dropout": 0.0,
}


def make_checkpoint(
    family: str,
    folder: Path,
    *,
    shards: int = 1,
    tied: bool = False,
    chat_template: bool = True,
    seed: int = 0,
    text_config: dict | None = None,
    vision_config: dict | None = None,
) -> Path:
    """Write a random checkpoint of one family, with other values of its configuration if given; return its folder."""
    folder.mkdir(parents=True)
    builtin = BUILTIN["builtin:tiny"]
    shutil.copy(builtin / "tokenizer.json", folder)
    tokenizer_config = json.loads((builtin / "tokenizer_config.json").read_text())
    template = tokenizer_config.pop("chat_template")
    if chat_template and family in HYBRID:
        (folder / "chat_template.jinja").write_text(template)
    elif chat_template and family not in _OLD_NAMES:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    elif chat_template:
        tokenizer_config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = _config(family, json.loads((builtin / "config.json").read_text()), tied)
    config.get("text_config", config).update(text_config or {})
    config["vision_config"].update(vision_config or {})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor_config(family)))
    _write_weights(family, folder, config, shards, tied, seed)
    return folder


def reference_class(family: str) -> type:
    """Return transformers' own class, language head included."""
    import transformers

    return {
        "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
        "qwen3_vl_moe": transformers.Qwen3VLMoeForConditionalGeneration,
        "qwen3_5": transformers.Qwen3_5ForConditionalGeneration,
        "qwen3_5_moe": transformers.Qwen3_5MoeForConditionalGeneration,
    }[family]


def _config(family: str, builtin: dict, tied: bool) -> dict:
    tokens = {key: builtin[key] for key in _TOKEN_KEYS}
    vocabulary = {"vocab_size": builtin["vocab_size"]}
    common = {"model_type": family, "tie_word_embeddings": tied, "torch_dtype": "float32"}
    if family == "qwen2_vl":
        vision = {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": HIDDEN_SIZE,
            "mlp_ratio": 2,
            "num_heads": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        }
        return {**common, **_TEXT, **_FLAT_TEXT, **tokens, **vocabulary, "vision_config": vision}
    if family == "qwen2_5_vl":
        vision = {
            "depth": 3,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": HIDDEN_SIZE,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
        return {**common, **_TEXT, **_FLAT_TEXT, **tokens, **vocabulary, "vision_config": vision}
    vision = {
        "model_type": family,
        "depth": 3,
        "deepstack_visual_indexes": [] if family in HYBRID else [0, 1],
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": HIDDEN_SIZE,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text = {
        **_TEXT,
        **vocabulary,
        "model_type": f"{family}_text",
        "bos_token_id": tokens.pop("bos_token_id"),
        "eos_token_id": tokens.pop("eos_token_id"),
        "tie_word_embeddings": tied,
    }
    if family in HYBRID:
        text |= _HYBRID_TEXT
    else:
        text |= {
            "head_dim": 16,
            "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
        }
    if family in EXPERTS:
        text |= _EXPERTS
    if family == "qwen3_vl_moe":
        text |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    elif family == "qwen3_5_moe":
        text |= {"shared_expert_intermediate_size": 40}
        del text["intermediate_size"]
    return {**common, **tokens, "text_config": text, "vision_config": vision}


def _preprocessor_config(family: str) -> dict:
    if family not in _OLD_NAMES:
        return {
            "size": {"longest_edge": 200704, "shortest_edge": 1024},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        }
    return {
        "min_pixels": 3136,
        "max_pixels": 200704,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def _write_weights(family: str, folder: Path, config: dict, shards: int, tied: bool, seed: int) -> None:
    model_class = reference_class(family)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class.from_dict(config))
    weights = {
        _published_name(family, name): _published(family, name, tensor)
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    if family in HYBRID:  # multi-token prediction, which no feature needs
        weights["mtp.fc.weight"] = torch.randn(HIDDEN_SIZE, 2 * HIDDEN_SIZE)
        weights["mtp.layers.0.input_layernorm.weight"] = torch.randn(HIDDEN_SIZE)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _published_name(family: str, name: str) -> str:
    if family in _OLD_NAMES:
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
    return name


def _published(family: str, name: str, tensor: Tensor) -> Tensor:
    """Return random values for a weight, large enough that mistakes show, as the hub has them."""
    part = name.rpartition(".")[2]
    if part == "A_log":  # what a layer of linear attention remembers lasts from 3 to 400 tokens, not less than one
        return torch.empty_like(tensor).uniform_(0.002, 0.3).log()
    noise = torch.randn_like(tensor)
    if "conv1d" in name:
        return noise
    # Larger than the default, so that attention is far from uniform.
    values = tensor + noise * 0.15
    transposed = family == "qwen3_vl_moe" and ".experts." in name
    return (values.transpose(1, 2) if transposed else values).contiguous()
