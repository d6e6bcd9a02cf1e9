"""Write a checkpoint in the hub's layout, without its language head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from qwen_vl_classifier.backbone.checkpoint.adapter_layout import CONFIG, base_weights
from qwen_vl_classifier.backbone.checkpoint.expert_arrays import published_array
from qwen_vl_classifier.backbone.checkpoint.stored import read_json
from qwen_vl_classifier.backbone.families import Family


def copy_settings(source: Path, folder: Path, name: str, num_layers: int, *, untie: bool) -> None:
    """Copy all files of a checkpoint but its weights.

    Args:
        source: The folder of the checkpoint.
        folder: The folder to copy to; it exists.
        name: The checkpoint's name, for messages.
        num_layers: Number of decoder layers in the copied configuration.
        untie: Write that the language head is not tied to the embeddings.
    """
    for path in source.iterdir():
        kept = path.suffix in (".json", ".txt", ".jinja") and path.is_file()
        if kept and path.name != CONFIG and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = read_json(source / "config.json", name)
    text_config = config.get("text_config", config)
    text_config["num_hidden_layers"] = num_layers
    if text_config.get("layer_types"):
        text_config["layer_types"] = text_config["layer_types"][:num_layers]
    if untie:
        config["tie_word_embeddings"] = text_config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_weights(model: nn.Module, family: Family, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model's weights, an adapter's left out, under the names of published checkpoints.

    Args:
        model: The model without language head.
        family: Its family.
        folder: Gets a `model.safetensors`.
        dtype: Type of the written weights; `None` keeps their type.
    """
    weights = {
        family.published_name(name): published_array(family, name, tensor)
        .detach()
        .to("cpu", dtype or tensor.dtype)
        .contiguous()
        for name, tensor in base_weights(model).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
