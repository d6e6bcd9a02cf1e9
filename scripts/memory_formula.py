"""How much memory a model takes: loaded, reading features, and in training. docs/models.md has the formula in words.

Everything is counted on a model without data (torch's "meta" device), so that no weights are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from memory_checkpoints import Checkpoint
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from qwen_vl_classifier.backbone.checkpoint.quantisation import loading_options
from qwen_vl_classifier.backbone.checkpoint.weight_names import experts_of_array
from qwen_vl_classifier.backbone.devices import token_bytes
from qwen_vl_classifier.backbone.families import FAMILIES
from qwen_vl_classifier.backbone.taps import LAST_NORM, Tap
from qwen_vl_classifier.backbone.towers import linear_layers

HALF, WHOLE = torch.bfloat16, torch.float32
EXAMPLE = 1024 + 64
"""Tokens of the example in the tables: a picture of a megapixel, prompt and text."""

RANK = 16

_ADAM = 3  # numbers beside each trained one: its gradient and AdamW's two averages
_BLOCK, _BLOCK_OF_BLOCKS = 64, 256  # of weights with one scale, and of scales with one scale, in 4 bits
_LARGEST_CHUNK = 64  # tokens in a chunk of the delta rule


def build(checkpoint: Checkpoint) -> Any:
    """Build a checkpoint's model without language head and without data."""
    model_class = FAMILIES[checkpoint.family].load_class()
    config = model_class.config_class(text_config=checkpoint.text, vision_config=checkpoint.vision)
    with torch.device("meta"):
        return model_class(config)


def count(module: nn.Module) -> int:
    """Count the weights of a module."""
    return sum(weight.numel() for weight in module.parameters())


def active(model: Any) -> int:
    """Count the weights that compute something for one token of text: of experts, the chosen ones."""
    text = model.config.get_text_config()
    decoder = count(model.language_model) - count(model.language_model.embed_tokens)
    experts = sum(count(layer.mlp.experts) for layer in model.language_model.layers if _has_experts(layer))
    return decoder - experts + (experts * text.num_experts_per_tok // text.num_experts if experts else 0)


def quantised_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights that `quantization` shrinks, by the name of their layer; the arrays of experts are of one."""
    skipped = loading_options("4bit", HALF)["quantization_config"].llm_int8_skip_modules
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and should_convert_module(name, skipped):
            yield name, module.weight
    for name, weight in model.named_parameters():
        if experts := experts_of_array(name):
            yield experts, weight


def weight_bytes(model: nn.Module, quantization: str | None = None, dtype: torch.dtype = HALF) -> int:
    """Return the memory of a loaded model's weights.

    Args:
        model: Without language head, not quantised.
        quantization: How it is to be quantised: "8bit", "4bit", or `None`.
        dtype: Type of what is not quantised.
    """
    size = count(model) * dtype.itemsize
    if quantization is not None:
        for _, weight in quantised_weights(model):
            size += _quantised_bytes(weight, quantization) - weight.numel() * dtype.itemsize
    return size


def _quantised_bytes(weight: nn.Parameter, quantization: str) -> int:
    """Return the memory of one quantised weight with its scales (Dettmers et al., arXiv:2208.07339, 2305.14314)."""
    weights = weight.numel()
    if quantization == "8bit":
        return weights + 4 * weight.shape[:-1].numel()
    blocks = -(-weights // _BLOCK)
    # Half a byte for each weight, one for each block, four for each block of blocks; tables of 16 and 256 values.
    return -(-weights // 2) + blocks + 4 * (-(-blocks // _BLOCK_OF_BLOCKS) + 1 + 16 + 256)


def adapter_targets(model: nn.Module) -> list[str]:
    """Return the names of the layers that get an adapter by default."""
    return linear_layers(model, "llm", Tap(LAST_NORM, "mean"))


def adapter_weights(model: nn.Module, rank: int = RANK) -> int:
    """Count the weights of the adapters."""
    layers: list[Any] = [model.get_submodule(name) for name in adapter_targets(model)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def kept_bytes(model: Any, rank: int | None = RANK, *, dropout: bool = True) -> list[int]:
    """Return what each decoder layer keeps of one token for the backward pass.

    Args:
        model: Without language head.
        rank: Of adapters over weights in bfloat16; `None` for full training in float32.
        dropout: Whether adapters have dropout, which keeps a byte for each input.
    """
    text = model.config.get_text_config()
    kept = [_kept_by_layer(layer, text, adapters=rank is not None) for layer in model.language_model.layers]
    if rank is not None:
        for name in adapter_targets(model):
            number = int(name.removeprefix("language_model.layers.").partition(".")[0])
            inputs: Any = model.get_submodule(name).in_features
            kept[number] += (4 + dropout) * inputs + 4 * rank  # both in float32
    return kept


def _kept_by_layer(layer: Any, text: Any, *, adapters: bool) -> int:
    """Count what a layer keeps, adapters' own apart: frozen weights need no inputs, which is most of the difference."""
    size = HALF.itemsize if adapters else WHOLE.itemsize
    kept = (8 if adapters else 24) * text.hidden_size  # inputs of both norms; their results, which are other inputs
    kept += _by_linear_attention(text, adapters) if hasattr(layer, "linear_attn") else _by_attention(layer, text, size)
    mlp = layer.mlp
    if not _has_experts(layer):
        return int(kept + (3 if adapters else 4) * size * text.intermediate_size)
    width = (3 if adapters else 4) * text.moe_intermediate_size + (1 if adapters else 2) * text.hidden_size
    kept += text.num_experts_per_tok * width * size + 4 * text.num_experts
    if hasattr(mlp, "shared_expert"):
        kept += ((3 if adapters else 4) * text.shared_expert_intermediate_size + text.hidden_size) * size
    return int(kept)


def _by_attention(layer: Any, text: Any, size: int) -> int:
    """Count queries, keys and values as attention takes them, its result, and what norms and gates keep."""
    attention = layer.self_attn
    heads, key_heads, head = text.num_attention_heads, text.num_key_value_heads, attention.head_dim
    kept = 4 * size * heads * head
    if hasattr(attention, "q_norm"):
        kept += (4 if size == HALF.itemsize else 8) * (heads + key_heads) * head
    if attention.q_proj.out_features == 2 * heads * head:  # half of them are gates
        kept += (2 if size == HALF.itemsize else 4) * size * heads * head
    return int(kept)


def _by_linear_attention(text: Any, adapters: bool) -> int:
    """Count what the delta rule keeps: of each token, of pairs of tokens in a chunk, and the states between chunks.

    The factors are fitted to what torch keeps for heads of several sizes, to 2 %.
    """
    heads, head = text.linear_num_value_heads, text.linear_value_head_dim
    values, keys = heads * head, text.linear_num_key_heads * text.linear_key_head_dim
    by_token = 49 * values + 21 * keys if adapters else 63 * values + 29 * keys
    pairs = 43 * heads * _LARGEST_CHUNK
    return int(by_token + pairs + 5 * heads * head * text.linear_key_head_dim / _LARGEST_CHUNK)


def _has_experts(layer: Any) -> bool:
    return hasattr(layer.mlp, "experts")


@dataclass(frozen=True, slots=True)
class Training:
    """What training takes, in bytes.

    Attributes:
        weights: Of the model that trains, and of the start where that has weights of its own.
        states: Of what trains: adapters, gradients and AdamW's averages.
        passes: The most that one example takes beside these: kept for the backward pass and one layer at work. The
            optimiser's step, which is one kernel on GPUs, takes nothing more.
    """

    weights: int
    states: int
    passes: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.states + self.passes


def reading_bytes(model: Any, quantization: str | None = None, tokens: int = EXAMPLE) -> int:
    """Return what it takes to read features of one example."""
    return weight_bytes(model, quantization) + tokens * token_bytes(model.config, HALF) + _unpacked(model, quantization)


def adapter_bytes(
    model: Any, quantization: str | None = None, *, checkpointing: bool, rank: int = RANK, tokens: int = EXAMPLE
) -> Training:
    """Return what it takes to train adapters on one example after the other."""
    numbers = adapter_weights(model, rank)
    passes = _passes(model, kept_bytes(model, rank), HALF, tokens, checkpointing=checkpointing)
    return Training(
        weights=weight_bytes(model, quantization),
        states=(1 + _ADAM) * WHOLE.itemsize * numbers,
        passes=passes + _unpacked(model, quantization),
    )


def full_bytes(model: Any, *, checkpointing: bool, paged: bool = False, tokens: int = EXAMPLE) -> Training:
    """Return what it takes to train the decoder's weights on one example after the other.

    Args:
        model: Without language head.
        checkpointing: Whether layers keep their inputs alone.
        paged: Whether the optimiser's averages move to main memory, where the GPU has no room.
        tokens: Of an example.
    """
    trained = count(model.language_model) - count(model.language_model.embed_tokens)
    passes = _passes(model, kept_bytes(model, None), WHOLE, tokens, checkpointing=checkpointing)
    return Training(
        weights=weight_bytes(model, dtype=WHOLE) + weight_bytes(model),
        states=(1 if paged else _ADAM) * WHOLE.itemsize * trained,
        passes=passes,
    )


def _passes(model: Any, kept: list[int], dtype: torch.dtype, tokens: int, *, checkpointing: bool) -> int:
    hidden = model.config.get_text_config().hidden_size
    by_token = len(kept) * hidden * dtype.itemsize + max(kept) if checkpointing else sum(kept)
    return int(tokens * (by_token + token_bytes(model.config, dtype)))


def _unpacked(model: nn.Module, quantization: str | None) -> int:
    """Return the memory of a layer's quantised weights while they are whole for a product."""
    if quantization is None:
        return 0
    sizes: Counter[str] = Counter()
    for layer, weight in quantised_weights(model):
        sizes[layer] += weight.numel()
    return max(sizes.values()) * HALF.itemsize
