"""Translate the names of stored weights to names in the model, and recognise weights that do not belong to it.

The same model is published with several sets of names. Published Qwen2-VL and Qwen2.5-VL checkpoints have ``visual.*``
and ``model.layers.*``; trainers on transformers 4.52 and later write ``model.visual.*`` and ``model.language_model.*``;
a model that was saved without its language head has no prefix. Wrappers of torch add parts of their own.
"""

from __future__ import annotations

import re

HEAD = "lm_head.weight"
"""Name of the language head, which this package never loads whole."""

EMBEDDINGS = "language_model.embed_tokens.weight"

GATES = ("in_proj_a", "in_proj_b", "shared_expert_gate")
"""Last parts of the names of linear layers with one output, or one for each head, that say how much of others passes.

They get no adapter, since its rank would exceed their outputs, and are not quantised: they are small, and all that they
gate would be off.
"""

# torch.compile, FSDP and activation checkpointing put these parts anywhere in a name.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DECODER_PARTS = {"embed_tokens", "layers", "norm"}
# Heads for rewards, values, classes and embeddings, and multi-token prediction.
_OTHER_HEAD = re.compile(r"(\w*heads?|score|scorer|\w*classifier|regressor|qa_outputs|custom_text_proj|mtp)\.")
_BUFFER = re.compile(r"\brotary(_pos)?_emb\.inv_freq$")  # computed, but stored by old versions of transformers
_PEFT = re.compile(r"(^|\.)(base_layer|lora_[A-Za-z_]+|modules_to_save|original_module)\.|^base_model\.model\.")
_EXPERTS = re.compile(r"(?P<experts>.+\.experts)\.(gate_up|down)_proj")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_shape|weight_scale(_inv)?|weight_zero_point|input_scale"
    r"|SCB|weight_format|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))$"
)


def own_name(name: str) -> str | None:
    """Return the name that a stored weight has in the model, `HEAD` for the language head.

    Args:
        name: Its name in a weight file, in any of the layouts above.

    Returns:
        A name that begins with ``visual.`` or ``language_model.``, whether or not the model has such a weight; `HEAD`;
        or `None` if the name belongs to neither part.
    """
    first, *rest = _bare(name).split(".")
    if first == "language_model":
        while rest and rest[0] in ("model", "language_model"):
            rest = rest[1:]
        if rest and rest[0] == "lm_head":
            first, rest = "lm_head", rest[1:]
    elif first in _DECODER_PARTS:
        first, rest = "language_model", [first, *rest]
    whole = ".".join([first, *rest])
    return whole if first in ("visual", "language_model") or whole == HEAD else None


def part_passed_over(name: str) -> str | None:
    """Return the part of a stored weight that belongs to another trainer's head or is never needed for features.

    Returns:
        The name of that part, such as ``score.*``; `None` for all other weights.
    """
    bare = _bare(name)
    if bare == HEAD:
        return None
    if _BUFFER.search(bare):
        return f"*.{bare.rpartition('.')[2]}"
    found = _OTHER_HEAD.match(bare)
    return f"{found[1]}.*" if found else None


def is_of_adapter(name: str) -> bool:
    """Tell whether a stored weight was saved from a model with a PEFT adapter in it."""
    return _PEFT.search(name) is not None


def experts_of_array(name: str) -> str | None:
    """Return the name of the experts that a weight of the model is an array of, `None` for all other weights."""
    found = _EXPERTS.fullmatch(name)
    return found["experts"] if found else None


def is_quantised(name: str) -> bool:
    """Tell whether a stored weight belongs to a quantised layer."""
    return _QUANTISED.search(name) is not None


def _bare(name: str) -> str:
    """Return a name without the parts of wrappers and without the model's own prefix."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if len(parts) > 1 and parts[0] == "module":  # DistributedDataParallel
        parts = parts[1:]
    while len(parts) > 1 and parts[0] == "model":
        parts = parts[1:]
    return ".".join(parts)
