"""The fingerprint of a backbone: a digest of everything that its features depend on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from qwen_vl_classifier.backbone.checkpoint import weight_files

_SHA256 = re.compile("[0-9a-f]{64}")


def digest_of(**record: Any) -> str:
    """Return the SHA-256 of JSON-able facts and the major version of transformers, in hexadecimal.

    What is `None` does not enter: a kind of fact that is new leaves the fingerprints of what lacks it as they were.
    """
    record = {name: value for name, value in record.items() if value is not None}
    record["transformers"] = transformers.__version__.split(".", maxsplit=1)[0]
    text = json.dumps(record, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a checkpoint, in hexadecimal."""
    return {path.name: file_digest(path) for path in weight_files(folder)}


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the SHA-256 of the values of each tensor, in hexadecimal."""
    return {name: tensor_digest(tensor) for name, tensor in tensors.items()}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    # In the hub's cache a weight file is a link to a blob that is named by its SHA-256.
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's values, in hexadecimal."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
