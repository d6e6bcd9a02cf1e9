"""Random checkpoints in the hub's layout, and the shapes of Qwen2.5-VL that benchmarks run on; an untrained classifier.

Speed does not depend on what the weights are, only on their shapes. Tokeniser, chat template and special tokens are
those of the built-in backbone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_vl_classifier import Backbone, Classifier, Tap
from qwen_vl_classifier.backbone.checkpoint.expert_arrays import published_array
from qwen_vl_classifier.backbone.checkpoint.hub import BUILTIN
from qwen_vl_classifier.backbone.families import FAMILIES
from qwen_vl_classifier.classifier.head import HeadSpec

SPECIAL_TOKENS = (
    "bos_token_id",
    "eos_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "image_token_id",
    "video_token_id",
)
_SHARD_BYTES = 2_000_000_000
_DECAYS = (0.002, 0.3)  # a token; what is remembered lasts for 3 to 400 tokens


@dataclass(frozen=True, slots=True)
class Tower:
    """A stack of transformer layers.

    Attributes:
        layers: How many.
        hidden: Width.
        intermediate: Width inside the gated MLP.
        heads: Heads of the queries.
        key_heads: Heads of keys and values.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Qwen2.5-VL model.

    Attributes:
        name: How the benchmark calls it.
        text: The decoder.
        vision: The vision tower.
        full_attention: Vision layers that attend over the whole picture, counted from 0; the others see windows of
            112 x 112 pixels.
        vocabulary: Rows of the embeddings, which are also the language head; `None` takes the built-in tokeniser's.
        picture: Side of the benchmark's pictures, in pixels.
    """

    name: str
    text: Tower
    vision: Tower
    full_attention: tuple[int, ...]
    vocabulary: int | None
    picture: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("nano", Tower(4, 64, 128, 4, 2), Tower(3, 32, 64, 2, 2), (1,), None, 84),
        Shape("59m", Tower(12, 512, 1408, 8, 2), Tower(12, 384, 1024, 6, 6), (2, 5, 8, 11), None, 364),
        # The next one with half of its layers, for GPUs that hold it in float32 twice.
        Shape("3b-half", Tower(18, 2048, 11008, 16, 2), Tower(16, 1280, 3420, 16, 16), (7, 15), 151936, 896),
        # As in config.json of Qwen/Qwen2.5-VL-3B-Instruct.
        Shape("3b", Tower(36, 2048, 11008, 16, 2), Tower(32, 1280, 3420, 16, 16), (7, 15, 23, 31), 151936, 896),
    )
}
PATCH, TEMPORAL_PATCH, CHANNELS, MERGE, WINDOW = 14, 2, 3, 2, 112


def write_checkpoint(
    shape: Shape, folder: Path, seed: int = 0, device: str = "cpu", shard_bytes: int = _SHARD_BYTES
) -> Path:
    """Write a random checkpoint of a shape, with weights drawn on a device, and return its folder."""
    return write_random_checkpoint(configuration(shape), _picture_settings(), folder, seed, device, shard_bytes)


def write_random_checkpoint(
    config: Mapping[str, Any],
    picture_settings: Mapping[str, Any],
    folder: Path,
    seed: int = 0,
    device: str = "cpu",
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Write a random checkpoint of any family, in bfloat16 as the published ones are, and return its folder.

    Args:
        config: Its config.json, with the language head tied to the embeddings.
        picture_settings: Its preprocessor_config.json.
        folder: Where to; it must not exist.
        seed: Of the weights.
        device: Where they are drawn; a GPU draws three billion in a second.
        shard_bytes: Most bytes of weights in a file.
    """
    folder.mkdir(parents=True)
    builtin = BUILTIN["builtin:tiny"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin / name, folder)
    # Published checkpoints have their template here too, where transformers' own processor looks for it.
    template = json.loads((builtin / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(picture_settings), encoding="utf-8")
    family = FAMILIES[config["model_type"]]
    model_class = family.load_class()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # half of the memory, which counts at three billion weights
    try:
        torch.manual_seed(seed)
        with torch.device(device):
            model = model_class(model_class.config_class.from_dict(dict(config)))
    finally:
        torch.set_default_dtype(before)
    weights = {
        family.published_name(name): published_array(family, name, tensor).contiguous().cpu()
        for name, tensor in model.state_dict().items()
    }
    for name, tensor in weights.items():
        if name.endswith(".A_log"):  # as drawn by default, a layer of linear attention forgets within a token
            tensor.uniform_(*_DECAYS).log_()
    _save(weights, folder, shard_bytes)
    return folder


def make_classifier(backbone: Backbone, folder: Path) -> Path:
    """Save a classifier with a random head at the last layer, and return its folder."""
    return untrained(backbone).save(folder)


def untrained(backbone: Backbone) -> Classifier:
    """Return a classifier with a random head at the last layer."""
    spec = HeadSpec("linear", backbone.hidden_size)
    return Classifier(backbone, Tap(-1, "mean"), spec.build(), spec)


def configuration(shape: Shape) -> dict[str, Any]:
    """Return a config.json as published checkpoints have it: flat, with the names of transformers before 4.52."""
    builtin = json.loads((BUILTIN["builtin:tiny"] / "config.json").read_text(encoding="utf-8"))
    text, vision = shape.text, shape.vision
    pairs = text.hidden // text.heads // 2  # of one head's rotary dimensions; a quarter for time, the rest halved
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": text.hidden,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate,
        "max_position_embeddings": 128000,
        "max_window_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "num_key_value_heads": text.key_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [pairs // 4, pairs * 3 // 8, pairs * 3 // 8]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary or builtin["vocab_size"],
        **{key: builtin[key] for key in SPECIAL_TOKENS},
        "vision_config": {
            "depth": vision.layers,
            "hidden_act": "silu",
            "hidden_size": vision.hidden,
            "intermediate_size": vision.intermediate,
            "num_heads": vision.heads,
            "in_chans": CHANNELS,
            "out_hidden_size": text.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "spatial_patch_size": PATCH,
            "temporal_patch_size": TEMPORAL_PATCH,
            "tokens_per_second": 2,
            "window_size": WINDOW,
            "fullatt_block_indexes": list(shape.full_attention),
        },
    }


def _picture_settings() -> dict[str, Any]:
    return {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL_PATCH,
        "merge_size": MERGE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def _save(weights: dict[str, torch.Tensor], folder: Path, shard_bytes: int) -> None:
    """Write weights, in several files where they are large."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
