"""Attach, write, read and merge low-rank adapters (LoRA, arXiv:2106.09685), which need the extra "finetune".

An adapter is part of `backbone.model`, whose other weights stay frozen; `backbone.adapter` holds its settings. While
it is attached, `Backbone.fingerprint` covers it, and `Backbone.mark_changed` records that the adapter has trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.checkpoint.adapter_layout import (
    CONFIG,
    WEIGHTS,
    Adapter,
    adapter_weights,
    base_weights,
    sides_of,
)
from qwen_vl_classifier.backbone.checkpoint.quantisation import without_advice
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.backbone.towers import linear_layers
from qwen_vl_classifier.errors import ArtifactError, ConfigError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.files.bounded import check_tensor_file, read_json


def add_adapter(
    backbone: Backbone, *, towers: str, tap: Tap, rank: int, alpha: float, dropout: float = 0.0, seed: int = 0
) -> None:
    """Attach a new adapter to the linear layers of some towers; only its weights train.

    B starts as zeros, so that features do not change until it trains; A is drawn as in PEFT. The adapter's weights are
    float32, whatever the type of the backbone's own.

    Args:
        backbone: Changed in place.
        towers: One of `TOWERS`; chooses the linear layers.
        tap: Where features are read; decoder layers above it get no adapter.
        rank: Rank of the change.
        alpha: The change is scaled by alpha / rank.
        dropout: Fraction of a layer's inputs that training hides from the adapter.
        seed: Seed of the initial weights.

    Raises:
        ConfigError: An argument is out of range, or the backbone has an adapter already.
        MissingExtraError: PEFT is not installed.
    """
    backbone.check_taps([tap])
    _check_free(backbone)
    targets = sorted(linear_layers(backbone.model, towers, tap))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}
    try:
        adapter = Adapter.from_json(settings, source="adapter")
    except ArtifactError as error:
        raise ConfigError(f"rank {rank}, alpha {alpha}, dropout {dropout}: {error}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(backbone, adapter)
    for weight in adapter_weights(backbone.model, adapter).values():
        weight.requires_grad_(True)


def write_adapter(backbone: Backbone, folder: str | os.PathLike[str]) -> None:
    """Write the adapter in PEFT's layout, which `peft.PeftModel.from_pretrained` reads.

    Args:
        backbone: A backbone with an adapter.
        folder: Path of the new folder; it must not exist yet.

    Raises:
        ConfigError: The backbone has no adapter.
    """
    adapter = _adapter_of(backbone)
    folder = Path(folder)
    folder.mkdir()
    content = adapter.to_json(backbone.name, backbone.revision)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = adapter_weights(backbone.model, adapter)
    save_file(
        {name: weight.detach().cpu().contiguous() for name, weight in weights.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )


def read_adapter(backbone: Backbone, folder: str | os.PathLike[str]) -> None:
    """Attach a saved adapter, with frozen weights.

    Args:
        backbone: Changed in place; unchanged after an error.
        folder: The folder of the adapter.

    Raises:
        ArtifactError: A file is missing or damaged, a setting is impossible, a weight is missing, left over, of
            another shape or not finite, or a layer is not loaded.
        ConfigError: The backbone has an adapter already.
        MissingExtraError: PEFT is not installed.
    """
    _check_free(backbone)
    folder = Path(folder)
    adapter = read_adapter_settings(folder)
    linear = {name for name, layer in backbone.model.named_modules() if isinstance(layer, nn.Linear)}
    foreign = [target for target in adapter.targets if target not in linear]
    if foreign:
        raise ArtifactError(
            f"{folder}: the adapter changes {foreign[0][:80]!r}, which is not a linear layer of {backbone.name} "
            f"({backbone.num_layers} decoder layers loaded); give the backbone that it was made for"
        )
    weights = _read_weights(folder / WEIGHTS, adapter.shapes(backbone.model))
    _inject(backbone, adapter)
    for name, weight in adapter_weights(backbone.model, adapter).items():
        weight.data.copy_(weights[name])


def merge_adapter(backbone: Backbone) -> None:
    """Add the adapter to the backbone's own weights and remove its layers.

    The sum is rounded to the type of the weights.

    Raises:
        ConfigError: The backbone has no adapter, or its weights are quantised and cannot hold the sum.
    """
    adapter = _adapter_of(backbone)
    if backbone.quantization is not None:
        raise ConfigError(
            f"{backbone.name} is quantised to {backbone.quantization}, and such weights cannot hold the sum; "
            "load it without quantization, attach the saved adapter (read_adapter) and merge there"
        )
    for target in adapter.targets:
        parent, _, leaf = target.rpartition(".")
        layer: nn.Linear = backbone.model.get_submodule(target).base_layer  # type: ignore[assignment]
        # Not in place: another backbone may have the old weights too.
        layer.weight.data = _merged(backbone.model, adapter, target, layer.weight.data)
        setattr(backbone.model.get_submodule(parent), leaf, layer)
    del backbone.model.peft_config  # PEFT's record; the next adapter starts anew
    backbone.adapter = None
    backbone.mark_changed()


def merged_weights(backbone: Backbone) -> Mapping[str, Callable[[], Tensor]]:
    """Return functions that give the weights of a backbone by name, with its adapter, if any, added to them.

    The backbone does not change, and memory is needed for one sum at a time, rounded to the type of the weights.
    """
    adapter = backbone.adapter

    def get(name: str, weight: Tensor) -> Tensor:
        target = name.removesuffix(".weight")
        if adapter is None or target not in adapter.targets or not name.endswith(".weight"):
            return weight.detach()
        return _merged(backbone.model, adapter, target, weight.detach())

    return {name: partial(get, name, weight) for name, weight in base_weights(backbone.model).items()}


def read_adapter_settings(folder: str | os.PathLike[str]) -> Adapter:
    """Read and check the settings of a saved adapter.

    Raises:
        ArtifactError: They are missing, damaged or impossible.
    """
    path = Path(folder) / CONFIG
    try:
        content = read_json(path, inside=folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ArtifactError(
            f"{path}: the adapter's settings are missing or damaged ({reason}); save the classifier again"
        ) from None
    return Adapter.from_json(content, source=str(folder))


def _merged(model: nn.Module, adapter: Adapter, target: str, weight: Tensor) -> Tensor:
    """Return the weight of one linear layer with the adapter's change added, rounded to its type."""
    down, up = (side.detach().float() for side in sides_of(model, target))
    return (weight.float() + adapter.scaling * (up @ down)).to(weight.dtype)


def _adapter_of(backbone: Backbone) -> Adapter:
    if backbone.adapter is None:
        raise ConfigError(f"{backbone.name} has no adapter; attach one first (add_adapter or read_adapter)")
    return backbone.adapter


def _check_free(backbone: Backbone) -> None:
    if backbone.adapter is not None:
        raise ConfigError(f"{backbone.name} has an adapter already; merge it first (merge_adapter)")


def _inject(backbone: Backbone, adapter: Adapter) -> None:
    """Wrap the target layers in adapter layers with initial, frozen weights."""
    model = backbone.model
    with without_advice():  # PEFT imports bitsandbytes where it is installed
        peft = require("peft", extra="finetune")
        config = peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules=list(adapter.targets),
        )
        peft.inject_adapter_in_model(config, model)
    for weight in adapter_weights(model, adapter).values():
        weight.data = weight.data.float()
    # PEFT returns new layers in training mode and makes weights trainable; undo both.
    model.train(model.training).requires_grad_(False)
    backbone.adapter = adapter
    backbone.mark_changed()


def _read_weights(path: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Read the adapter's weights, after checking names and shapes."""
    try:
        check_tensor_file(path, inside=path.parent)
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            seen = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            problems = {"missing": sorted(shapes.keys() - names), "unexpected": sorted(names - shapes.keys())}
            for what, found in problems.items():
                if found:
                    raise ArtifactError(
                        f"{path}: {len(found)} {what} weight(s) of the adapter, first {found[0][:120]}; "
                        "save the classifier again"
                    )
            for name, shape in shapes.items():
                if seen[name] != shape:
                    raise ArtifactError(
                        f"{path}: {name} has shape {seen[name]}, expected {shape}; give the backbone that the adapter "
                        "was made for, or save the classifier again"
                    )
            weights = {name: file.get_tensor(name) for name in shapes}
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, ArtifactError):
            raise
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ArtifactError(
            f"{path}: the adapter's weights are missing or damaged ({reason}); save the classifier again"
        ) from None
    for name, weight in weights.items():
        if not weight.is_floating_point() or not bool(weight.isfinite().all()):
            raise ArtifactError(f"{path}: {name} has values that are not finite; save the classifier again")
    return weights
