"""The layout of an adapter on disk and in a model: its settings, checked on reading, and the names of its weights.

The layout is PEFT's: ``adapter_config.json`` and ``adapter_model.safetensors``. Low-rank adapters are those of Hu et
al. (arXiv:2106.09685): a linear layer's weight W acts as W + alpha / rank * B A.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qwen_vl_classifier.backbone.checkpoint.stored import is_there, read_json
from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.errors import ArtifactError, CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SIDES = ("lora_A", "lora_B")

_PICKLED = "adapter_model.bin"
_NAME = "default"  # PEFT keeps several adapters apart by names; here there is one
_PREFIX = "base_model.model."  # of names in the file: PEFT wraps a model twice
_DECODER = "language_model.layers."
_BASE = ".base_layer."
_MOST_RANK = 1024
_MOST_ALPHA = 1e6
_MOST_TARGETS = 10_000
_LONGEST_NAME = 200

# Fields of PEFT with the values that are supported; empty values (null, false, [] and {}) are accepted everywhere.
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True,),
    "inference_mode": (True, False),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
_FREE = {"base_model_name_or_path", "revision", "peft_version"}  # for people; ignored on reading


@dataclass(frozen=True, slots=True)
class Adapter:
    """The settings of an adapter.

    Attributes:
        targets: Full names of the linear layers that it changes, in alphabetical order.
        rank: Rank of the change.
        alpha: The change is scaled by alpha / rank.
        dropout: Fraction of a layer's inputs that training hides from the adapter.
    """

    targets: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def scaling(self) -> float:
        """Factor of the change."""
        return self.alpha / self.rank

    @property
    def depth(self) -> int:
        """Number of decoder layers that a backbone must have loaded."""
        parts = (target.split(".") for target in self.targets if target.startswith(_DECODER))
        return max((int(number) + 1 for _, _, number, *_ in parts if number.isdecimal()), default=0)

    def to_json(self, base: str, revision: str | None) -> dict[str, Any]:
        """Return the content of `adapter_config.json`.

        Args:
            base: Name of the backbone; of a local folder only the last part is written.
            revision: Revision of the backbone.
        """
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": Path(base).name if Path(base).exists() else base,
            "revision": revision,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": "none",
            "target_modules": list(self.targets),
        }

    @classmethod
    def from_json(cls, content: Any, *, source: str) -> Adapter:
        """Check the content of `adapter_config.json` field by field.

        Raises:
            ArtifactError: It is another kind of adapter, or a field is missing, impossible or not supported; the
                message names it.
        """
        if not isinstance(content, dict):
            raise ArtifactError(f"{source}: {CONFIG} does not hold a JSON object; save the classifier again")
        for name, check, expected in _CHECKS:
            if name not in content or not check(content[name]):
                raise ArtifactError(
                    f"{source}: {CONFIG} has {name} = {str(content.get(name))[:80]!r}, expected {expected}; "
                    "save the classifier again"
                )
        for name in sorted(content.keys() - {check[0] for check in _CHECKS} - _FREE):
            value = content[name]
            if value not in _FIXED.get(name, ()) and value not in (None, False, [], {}):
                raise ArtifactError(
                    f"{source}: {CONFIG} has {str(name)[:80]!r} = {str(value)[:80]!r}, which is not supported; "
                    "give an adapter of plain LoRA"
                )
        return cls(
            targets=tuple(sorted(content["target_modules"])),
            rank=content["r"],
            alpha=float(content["lora_alpha"]),
            dropout=float(content["lora_dropout"]),
        )

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Return the shape of every weight of the adapter by its name in the file, for a model that has its targets."""
        shapes = {}
        for target in self.targets:
            layer: Any = model.get_submodule(target)
            shapes[_file_name(target, "lora_A")] = (self.rank, int(layer.in_features))
            shapes[_file_name(target, "lora_B")] = (int(layer.out_features), self.rank)
        return shapes


def refuse_adapter(folder: Path, name: str) -> None:
    """Refuse a checkpoint with a PEFT adapter in its folder, which would be neither applied nor mentioned.

    Args:
        folder: The folder of the checkpoint.
        name: Its name, for messages.

    Raises:
        CheckpointError: There is an adapter; the message says whether a model lies beside it, and what to do.
    """
    if not is_there(folder / CONFIG):
        return
    merge = "merge it into the model (merge_and_unload of peft, then save_pretrained)"
    if any(path.name != WEIGHTS for path in folder.glob("*.safetensors*")):  # weights, or their index
        weights = next((file for file in (WEIGHTS, _PICKLED) if (folder / file).exists()), WEIGHTS)
        raise CheckpointError(
            f"{name}: a PEFT adapter lies beside the weights ({CONFIG}), and it is unclear whether to apply it; "
            f"{merge} and give that folder, or delete {CONFIG} and {weights}"
        )
    base = read_json(folder / CONFIG, name).get("base_model_name_or_path")
    of_what = f"for {base[:200]}" if isinstance(base, str) and base else "and does not name its base model"
    raise CheckpointError(f"{name}: it holds only a PEFT adapter {of_what}; load the base model, or {merge}")


def adapter_weights(model: nn.Module, adapter: Adapter) -> dict[str, nn.Parameter]:
    """Return the weights of the adapter within a model, by their names in the file."""
    return {
        _file_name(target, side): weight
        for target in adapter.targets
        for side, weight in zip(SIDES, sides_of(model, target), strict=True)
    }


def sides_of(model: nn.Module, target: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weights A and B beside one linear layer of a model."""
    layer = model.get_submodule(target)
    down, up = (getattr(layer, side)[_NAME].weight for side in SIDES)
    return down, up


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model without those of an adapter, by their names without the adapter."""
    return {
        name.replace(_BASE, "."): tensor
        for name, tensor in model.state_dict().items()
        if not any(f".{side}." in name for side in SIDES)
    }


def _file_name(target: str, side: str) -> str:
    return f"{_PREFIX}{target}.{side}.weight"


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= _MOST_TARGETS
        and all(isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME for name in value)
        and len(set(value)) == len(value)
    )


_CHECKS = (
    ("peft_type", lambda value: value == "LORA", "LORA"),
    ("r", lambda value: type(value) is int and 1 <= value <= _MOST_RANK, f"a whole number from 1 to {_MOST_RANK}"),
    ("lora_alpha", lambda value: is_number(value, 1e-6, _MOST_ALPHA), f"a number above 0, at most {_MOST_ALPHA:g}"),
    ("lora_dropout", lambda value: is_number(value, 0, 0.999), "a number from 0 to below 1"),
    ("target_modules", _are_names, "a list of distinct layer names"),
)
