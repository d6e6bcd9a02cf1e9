"""Compute the fingerprint of a backbone, a digest of everything that its features depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qwen_vl_classifier.backbone.checkpoint.adapter_layout import Adapter, adapter_weights
from qwen_vl_classifier.backbone.checkpoint.picture_settings import read_picture_settings
from qwen_vl_classifier.backbone.checkpoint.weight_files import weight_files
from qwen_vl_classifier.backbone.processor import PICTURE_SETTINGS, Processor
from qwen_vl_classifier.files import digests


def fingerprint_of(**record: Any) -> str:
    """Return the SHA-256 of JSON-able facts and the major version of transformers, in hexadecimal.

    Facts that are `None` are left out, so that a new kind of fact does not change the fingerprints without it.
    """
    record = {name: value for name, value in record.items() if value is not None}
    record["transformers"] = transformers.__version__.split(".", maxsplit=1)[0]
    text = json.dumps(record, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def content_digest(folder: Path, processor: Processor, facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the files and settings that decide features, in hexadecimal.

    Args:
        folder: The folder of the checkpoint.
        processor: Its processor.
        facts: Facts about its weights and configuration.
    """
    tokeniser = ["tokenizer.json"] if (folder / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    _, pictures = read_picture_settings(folder, str(folder))
    record = {
        **facts,
        "tokeniser": {name: digests.file_digest(folder / name) for name in tokeniser},
        "pictures": {name: pictures[name] for name in PICTURE_SETTINGS if name in pictures},
        "pixel_limits": processor.pixel_limits,
        **processor.prompt_facts(),
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def file_digests(folder: Path, name: str) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a checkpoint, in hexadecimal.

    Args:
        folder: The checkpoint.
        name: Its name, for messages.

    Raises:
        CheckpointError: Weight files are missing, or it is unclear which files they are.
    """
    files = weight_files(folder, name)
    return dict(zip(files, digests.file_digests([folder / file for file in files]), strict=True))


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of the values of each tensor, in hexadecimal."""
    return {name: tensor_digest(tensor) for name, tensor in tensors.items()}


def adapter_digests(model: nn.Module, adapter: Adapter | None) -> dict[str, Any] | None:
    """Return the facts that an adapter adds to a fingerprint, or `None` without an adapter."""
    if adapter is None:
        return None
    return {"scaling": adapter.scaling, "weights": tensor_digests(adapter_weights(model, adapter))}


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's values, in hexadecimal."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
