"""What differs between the families of Qwen vision-language models, in one table.

A checkpoint is dispatched on the `model_type` of its `config.json`, never on its name:
`Qwen/Qwen2-VL-2B-Instruct` is often loaded through classes named after Qwen2.5-VL, with silent nonsense as result.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from qwen_vl_classifier.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Family:
    """One family of checkpoints.

    Attributes:
        model_type: The value of `model_type` in `config.json`.
        name: How people call it.
        module: The transformers module that implements it.
        model_class: The class of the model without its language head, in that module.
        prefixes: How published weight files begin the names of the model's two parts.
    """

    model_type: str
    name: str
    module: str
    model_class: str
    prefixes: tuple[tuple[str, str], ...]

    def load_class(self) -> Any:
        """Import and return the transformers class of the model without its language head."""
        return getattr(importlib.import_module(self.module), self.model_class)

    def published_name(self, name: str) -> str:
        """Return the name that a weight of the model has in a published file."""
        for own, published in self.prefixes:
            if name.startswith(own):
                return published + name.removeprefix(own)
        raise KeyError(name)


_OLD_PREFIXES = (("visual.", "visual."), ("language_model.", "model."))
_NEW_PREFIXES = (("visual.", "model.visual."), ("language_model.", "model.language_model."))

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "qwen2_vl",
            "Qwen2-VL",
            "transformers.models.qwen2_vl.modeling_qwen2_vl",
            "Qwen2VLModel",
            _OLD_PREFIXES,
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2.5-VL",
            "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
            "Qwen2_5_VLModel",
            _OLD_PREFIXES,
        ),
        Family(
            "qwen3_vl",
            "Qwen3-VL",
            "transformers.models.qwen3_vl.modeling_qwen3_vl",
            "Qwen3VLModel",
            _NEW_PREFIXES,
        ),
    )
}


def family_of(model_type: object, *, source: str) -> Family:
    """Return the family of a checkpoint.

    Args:
        model_type: `model_type` as its `config.json` has it.
        source: The checkpoint's name, for the message.

    Raises:
        CheckpointError: The checkpoint belongs to none of the families.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(f"{family.name} ({key})" for key, family in FAMILIES.items())
    raise CheckpointError(
        f"{source}: its config.json says model_type {model_type!r}; this package works with {known}. "
        "Choose a checkpoint of one of these families, for example Qwen/Qwen2.5-VL-3B-Instruct."
    )
