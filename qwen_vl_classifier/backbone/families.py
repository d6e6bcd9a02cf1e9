"""The families of Qwen vision-language models, and how they differ, in one table.

A checkpoint is dispatched on the `model_type` of its `config.json`, never on its name:
`Qwen/Qwen2-VL-2B-Instruct` is often loaded through Qwen2.5-VL's classes, which gives wrong features without an error.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from qwen_vl_classifier.errors import CheckpointError, one_line


@dataclass(frozen=True, slots=True)
class Family:
    """One family of checkpoints.

    Attributes:
        model_type: The value of `model_type` in `config.json`.
        name: Its display name.
        model_class: transformers' class of the model without its language head, in the modelling module of its type.
        prefixes: For both towers, the prefix of weight names in the model and in published weight files.
        transposes_experts: Whether published files hold the arrays of experts with their last two axes swapped.
        splits_experts: Whether transformers saves the matrices of each expert apart, and joins them on loading.
        tokenizer_class: transformers' class of its tokeniser. Checkpoints of Qwen3.5 name that of Qwen2, which splits
            marks from their letters; transformers 5.17 believes them, and later versions take Qwen3.5's own.
    """

    model_type: str
    name: str
    model_class: str
    prefixes: tuple[tuple[str, str], ...]
    transposes_experts: bool = False
    splits_experts: bool = False
    tokenizer_class: str = "AutoTokenizer"

    def load_class(self) -> Any:
        """Import and return the transformers class of the model without its language head."""
        module = f"transformers.models.{self.model_type}.modeling_{self.model_type}"
        return getattr(importlib.import_module(module), self.model_class)

    def published_name(self, name: str) -> str:
        """Return the name that a weight of the model has in a published file."""
        for own, published in self.prefixes:
            if name.startswith(own):
                return published + name.removeprefix(own)
        raise KeyError(name)


_OLD_PREFIXES = (("visual.", "visual."), ("language_model.", "model."))
_NEW_PREFIXES = (("visual.", "model.visual."), ("language_model.", "model.language_model."))
_OWN = "Qwen3_5Tokenizer"

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2_vl", "Qwen2-VL", "Qwen2VLModel", _OLD_PREFIXES),
        Family("qwen2_5_vl", "Qwen2.5-VL", "Qwen2_5_VLModel", _OLD_PREFIXES),
        Family("qwen3_vl", "Qwen3-VL", "Qwen3VLModel", _NEW_PREFIXES),
        Family("qwen3_vl_moe", "Qwen3-VL-MoE", "Qwen3VLMoeModel", _NEW_PREFIXES, transposes_experts=True),
        Family("qwen3_5", "Qwen3.5", "Qwen3_5Model", _NEW_PREFIXES, tokenizer_class=_OWN),  # Qwen3.6 and Qwen3.8 too
        Family(
            "qwen3_5_moe", "Qwen3.5-MoE", "Qwen3_5MoeModel", _NEW_PREFIXES, splits_experts=True, tokenizer_class=_OWN
        ),
    )
}

_NOT_EXACT = {
    "qwen4_exp": "Qwen4-Exp chooses the keys of a token among those of the whole row, so texts that share a picture "
    "would change each other's features",
}
"""Families that cannot run in packed rows, and why."""


def family_of(model_type: object, *, source: str) -> Family:
    """Return the family of a checkpoint.

    Args:
        model_type: The value in its `config.json`.
        source: The checkpoint's name, for the message.

    Raises:
        CheckpointError: The checkpoint belongs to no supported family.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type in _NOT_EXACT:
        raise CheckpointError(
            f"{source}: its config.json has model_type {model_type!r}, which is not supported: "
            f"{_NOT_EXACT[model_type]}; choose a checkpoint of {', '.join(family.name for family in FAMILIES.values())}"
        )
    known = ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())
    raise CheckpointError(
        f"{source}: its config.json has model_type {one_line(repr(model_type), 80)}; this package works with {known}. "
        "Choose a checkpoint of one of these families, for example Qwen/Qwen2.5-VL-3B-Instruct."
    )
