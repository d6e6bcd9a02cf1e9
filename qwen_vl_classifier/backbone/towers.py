"""Choose which weights train: the decoder alone, the vision tower's blocks too, or everything.

The two towers share layer names (both have `gate_proj` in Qwen2.5-VL), so layers are always given by full names.
Decoder layers above the tap are never read, and never train.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.checkpoint.weight_names import GATES
from qwen_vl_classifier.backbone.layers.joined import part_layers
from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.config.finetune import TOWERS
from qwen_vl_classifier.errors import ConfigError


def train_towers(backbone: Backbone, towers: str, tap: Tap) -> None:
    """Make the weights of some towers trainable, and freeze all others.

    Args:
        backbone: Its model is changed in place.
        towers: One of `TOWERS`. "llm" trains the decoder layers that the tap reads, and the final norm where the tap
            reads it.
        tap: Where features are read.

    Raises:
        ConfigError: The towers are unknown, the backbone does not have the tap, or it has an adapter or quantised
            weights, which train through an adapter only.
    """
    backbone.check_taps([tap])
    if backbone.adapter is not None:
        raise ConfigError(
            f"{backbone.name} has an adapter, which freezes its own weights; "
            "train the adapter, or merge it first (merge_adapter)"
        )
    if backbone.quantization is not None:
        raise ConfigError(
            f"{backbone.name} is quantised to {backbone.quantization}, and such weights cannot train; "
            "train an adapter, or load it without quantization"
        )
    backbone.model.requires_grad_(False)
    for _, module in _parts(backbone.model, towers, tap):
        part_layers(module)
        module.requires_grad_(True)


def linear_layers(model: nn.Module, towers: str, tap: Tap) -> list[str]:
    """Return the full names of the linear layers of some towers, quantised ones too: what adapters attach to.

    Gates of a few outputs are left out, and so are routers and the arrays of experts, which are no linear layers: an
    adapter of a mixture of experts trains attention and the shared expert alone.

    Args:
        model: A transformers Qwen-VL model without language head.
        towers: One of `TOWERS`. "all" adds the mergers; embeddings have no linear layers.
        tap: Where features are read.

    Raises:
        ConfigError: Unknown towers.
    """
    return [
        ".".join(filter(None, (part, name)))
        for part, module in _parts(model, towers, tap)
        for name, layer in module.named_modules()
        # The quantised layers of bitsandbytes are subclasses.
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in GATES
    ]


def _parts(model: Any, towers: str, tap: Tap) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of the model that belong to some towers, with their names; no part lies within another."""
    if towers not in TOWERS:
        raise ConfigError(f"towers {towers!r}: expected one of {', '.join(TOWERS)}")
    for name, part in model.visual.named_children():
        if name == "deepstack_merger_list" and towers == "all":
            # Qwen3-VL adds the output of the first merger after the first decoder layer, and so on.
            read = len(part) if tap.layer == LAST_NORM else tap.layer - (not tap.normed)
            yield from ((f"visual.{name}.{number}", merger) for number, merger in enumerate(part[:read]))
        elif towers == "all" or (towers == "llm+vision" and name == "blocks"):
            yield f"visual.{name}", part
    if towers == "all":
        yield "language_model.embed_tokens", model.language_model.embed_tokens
    depth = len(model.language_model.layers) if tap.layer == LAST_NORM else tap.layer
    for number, layer in enumerate(model.language_model.layers[:depth]):
        yield f"language_model.layers.{number}", layer
    if tap.normed or tap.layer == LAST_NORM:
        yield "language_model.norm", model.language_model.norm
