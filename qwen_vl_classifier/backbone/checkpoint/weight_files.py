"""Find the weight files of a checkpoint, and read names and shapes of weights from their headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen_vl_classifier.backbone.checkpoint.adapter_layout import WEIGHTS as ADAPTER
from qwen_vl_classifier.backbone.checkpoint.quantisation import WHOLE_INSTEAD
from qwen_vl_classifier.backbone.checkpoint.stored import read_json, why_unreadable
from qwen_vl_classifier.backbone.checkpoint.weight_names import is_of_adapter, is_quantised, own_name, part_passed_over
from qwen_vl_classifier.errors import CheckpointError, first_of
from qwen_vl_classifier.files.bounded import check_tensor_file

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SUFFIX = ".safetensors"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_QUANTISED_TYPES = ("F8_", "F6_", "F4", "I8", "U8", "I4", "U4")  # not F64, which is a large number


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One weight of a file, as its header describes it.

    Attributes:
        name: Its name in the file.
        path: The file.
        shape: Its shape in the model.
        dtype: Its type as safetensors names it, such as "BF16".
        transposed: Whether its last two axes are swapped in the file.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """All weights of a checkpoint.

    Attributes:
        of_model: Weights by their name in the model; the language head is `HEAD`.
        passed_over: Names, as in the files, of weights of other trainers' heads.
        unknown: Weights with unknown names.
    """

    of_model: dict[str, StoredWeight]
    passed_over: tuple[str, ...]
    unknown: tuple[StoredWeight, ...]


def weight_files(folder: Path, name: str) -> list[str]:
    """Return the weight files of a checkpoint, relative to its folder, in order of their names.

    If there is an index, it alone decides. Else it is `model.safetensors`, else a complete set of numbered files,
    else the only file.

    Args:
        folder: The folder of the checkpoint.
        name: Its name, for messages.

    Raises:
        CheckpointError: There are none, files that the index names are missing, or it is unclear which files to load.
    """
    if (folder / INDEX).exists():
        return _indexed(folder, name)
    found = sorted(path.name for path in folder.glob(f"*{_SUFFIX}") if path.is_file() and path.name != ADAPTER)
    if WHOLE in found:
        return [WHOLE]
    if _complete(found) or (len(found) == 1 and not _NUMBERED.fullmatch(found[0])):
        return found
    if not found:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_FORMATS)
        kinds = f" ({first_of(others, 4)})" if others else ""
        raise CheckpointError(
            f"{name}: no {_SUFFIX} weights in it; other formats are not read{kinds}, because they can run code: save "
            "it with transformers' save_pretrained, or choose a checkpoint with safetensors"
        )
    raise CheckpointError(
        f"{name}: {first_of(found, 4)}, but neither {WHOLE} nor {INDEX}, so it is unclear which weights to load; add "
        "the index that was saved with them, or keep only one complete set of files"
    )


def indexed_files(index: Any, name: str) -> list[str]:
    """Return the files that an index names, in order of their names.

    Raises:
        CheckpointError: The index is malformed, or names a file outside the checkpoint's folder or of another format.
    """
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{name}: its {INDEX} has no weight_map from the names of weights to files; "
            "copy or download this file again"
        )
    files = sorted(set(weight_map.values()))
    for file in files:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file or ":" in file or path.suffix != _SUFFIX:
            raise CheckpointError(
                f"{name}: its {INDEX} names {file[:120]!r}, expected the name of a {_SUFFIX} file in its folder; "
                "give a checkpoint as save_pretrained writes it"
            )
    return files


def read_headers(folder: Path, name: str) -> StoredWeights:
    """Read the names and shapes of all weights of a checkpoint.

    Raises:
        CheckpointError: As in `weight_files`; or a file cannot be read, weights are quantised or belong to an adapter,
            or a weight is stored twice.
    """
    of_model: dict[str, StoredWeight] = {}
    passed_over: list[str] = []
    unknown: list[StoredWeight] = []
    for file in weight_files(folder, name):
        for weight in _read_header(folder / file, name):
            own = own_name(weight.name)
            if part_passed_over(weight.name):
                passed_over.append(weight.name)
            elif own is None:
                unknown.append(weight)
            elif own in of_model:
                first = of_model[own]
                raise CheckpointError(
                    f"{name}: one weight is stored twice, as {first.name} in {first.path.name} and as {weight.name} in "
                    f"{file}; keep one of them"
                )
            else:
                of_model[own] = weight
    return StoredWeights(of_model, tuple(sorted(passed_over)), tuple(unknown))


def read_tensors(weights: Mapping[str, StoredWeight], name: str) -> dict[str, Tensor]:
    """Map weights into memory under new names; their bytes are read when they are first used.

    Raises:
        CheckpointError: A file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    by_file: dict[Path, dict[str, StoredWeight]] = {}
    for key, weight in weights.items():
        by_file.setdefault(weight.path, {})[key] = weight
    for path, stored in by_file.items():
        try:
            check_tensor_file(path)
            with safe_open(path, framework="pt") as file:
                for key, weight in stored.items():
                    tensor = file.get_tensor(weight.name)
                    tensors[key] = tensor.transpose(-1, -2) if weight.transposed else tensor
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(path, name, error) from error
    return tensors


def _indexed(folder: Path, name: str) -> list[str]:
    files = indexed_files(read_json(folder / INDEX, name), name)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        whole = f", or delete {INDEX} if {WHOLE} holds all weights" if (folder / WHOLE).is_file() else ""
        raise CheckpointError(
            f"{name}: {len(missing)} of the {len(files)} files that its {INDEX} names are missing: "
            f"{first_of(missing, 4)}; copy or download them into the folder{whole}"
        )
    return files


def _complete(files: list[str]) -> bool:
    """Tell whether files are all those of one set of numbered files."""
    parts = [_NUMBERED.fullmatch(file) for file in files]
    numbers = [int(part["number"]) for part in parts if part]
    kinds = {(part["stem"], part["total"]) for part in parts if part}
    return len(kinds) == 1 and all(parts) and numbers == list(range(1, int(next(iter(kinds))[1]) + 1))


def _read_header(path: Path, name: str) -> list[StoredWeight]:
    found = []
    try:
        check_tensor_file(path)
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                part = file.get_slice(key)
                found.append(StoredWeight(key, path, tuple(part.get_shape()), part.get_dtype()))
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, name, error) from error
    for weight in found:
        if is_quantised(weight.name) or weight.dtype.startswith(_QUANTISED_TYPES):
            raise CheckpointError(
                f"{name}: is already quantised ({path.name} has {weight.name} in {weight.dtype}); {WHOLE_INSTEAD}"
            )
        if is_of_adapter(weight.name):
            raise CheckpointError(
                f"{name}: {path.name} was saved with a PEFT adapter in it (it has {weight.name}); merge it "
                "(merge_and_unload of peft) before save_pretrained"
            )
    return found


def _unreadable(path: Path, name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name}: its weights cannot be read: {path.name} ({why_unreadable(path, error)}); "
        "copy or download this file again"
    )
