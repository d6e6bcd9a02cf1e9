"""Quantise a decoder to 8 or 4 bits with bitsandbytes (extra "finetune"), so that a large one fits a small GPU.

The linear layers of the decoder and its arrays of experts are quantised, which hold nearly all weights of a large
checkpoint. The vision tower, norms, embeddings, gates and routers are not: they are small, no later layer can restore
what the vision tower loses, and a router that is off sends tokens to other experts.

Weights are dequantised for each product, which is computed in the type of the hidden states; those of all experts of a
layer together, and again for gradients. bitsandbytes' own products are not used. In 8 bits they also round the inputs
through float16, which overflows in these models, and make a feature depend on the rest of the batch. In 4 bits they
compute in bfloat16 on some CPUs whatever type is set, and give other results with gradients than without.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal, TypeAlias, get_args

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwen_vl_classifier.backbone.checkpoint.quantisers import quantiser_of
from qwen_vl_classifier.backbone.checkpoint.weight_names import GATES, experts_of_array
from qwen_vl_classifier.errors import CheckpointError, ConfigError
from qwen_vl_classifier.extras import require

Quantization: TypeAlias = Literal["8bit", "4bit"]

QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
_BYTES = {"8bit": 1.0, "4bit": 0.52}  # of a quantised weight, with its share of the scales
_WHOLE = ["visual", *GATES]  # parts of the model that are not quantised

WHOLE_INSTEAD = "load the unquantised checkpoint, with --quantization 4bit if memory is short"
"""Advice about a checkpoint that is quantised already."""


def refuse_quantised(config: Mapping[str, Any], name: str) -> None:
    """Refuse a checkpoint whose configuration says that its weights are quantised.

    Args:
        config: The content of its `config.json`.
        name: Its name.

    Raises:
        CheckpointError: They are quantised; the message says by which method.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if settings := part.get(key):
                raise CheckpointError(f"{name}: is already quantised ({_method(settings)}); {WHOLE_INSTEAD}")


def _method(settings: Any) -> str:
    """Return the quantisation method that a configuration names."""
    if not isinstance(settings, Mapping):
        return "by an unknown method"
    method = " ".join(str(settings.get("quant_method") or settings.get("quant_algo") or "").split())[:40]
    bits = "8" if settings.get("load_in_8bit") else "4" if settings.get("load_in_4bit") else ""
    if bits:
        return f"{method or 'bitsandbytes'}, {bits} bit"
    return method or "by an unknown method"


def check_quantization(quantization: str | None, device: torch.device) -> None:
    """Check that a quantisation exists and runs on a device.

    Raises:
        ConfigError: The quantisation is unknown, or bitsandbytes does not run on the device.
        MissingExtraError: bitsandbytes, or accelerate, which transformers needs for it, is not installed.
    """
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization {quantization!r}: expected {', '.join(QUANTIZATIONS)} or None")
    with without_advice():
        bitsandbytes = require("bitsandbytes", extra="finetune")
    require("accelerate", extra="finetune")
    try:
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4").to(device)
        whole_weight(layer.weight, torch.float32)
    except (RuntimeError, NotImplementedError, OSError, AttributeError) as error:
        raise ConfigError(
            f"quantization {quantization!r}: bitsandbytes does not run on {device} here ({type(error).__name__}); "
            "use a GPU that it supports, or load without quantization"
        ) from error


def loading_options(quantization: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options of transformers' `from_pretrained` for a quantisation.

    Args:
        quantization: "8bit", "4bit", or `None`.
        dtype: Type in which products are computed.
    """
    if quantization is None:
        return {}
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        # NormalFloat and double quantisation: Dettmers et al., arXiv:2305.14314, section 3.
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    config: Any = transformers.BitsAndBytesConfig(llm_int8_skip_modules=_WHOLE, **settings)
    config.quant_method = quantiser_of(quantization)
    return {"quantization_config": config}


def weight_bytes(name: str, shape: Sequence[int], dtype: torch.dtype, quantization: str | None) -> int:
    """Return about how many bytes a weight takes once it is loaded.

    Args:
        name: Its name in the model.
        shape: Its shape.
        dtype: Type of weights that are not quantised.
        quantization: "8bit", "4bit", or `None`.
    """
    quantised = name.startswith("language_model.layers.") and len(shape) > 1
    size = _BYTES[quantization] if quantization and quantised else dtype.itemsize
    return math.ceil(math.prod(shape) * size)


def use_whole_products(model: nn.Module) -> None:
    """Replace the products of quantised layers as described at the top of this file; the model is changed in place."""
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for name, layer in layers:
        if any(experts_of_array(f"{name}.{part}") for part, _ in layer.named_parameters(recurse=False)):
            layer.forward = MethodType(_multiply_by_experts, layer)
        elif isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
            layer.forward = MethodType(_multiply, layer)  # type: ignore[method-assign]


def _multiply(self: Any, states: Tensor) -> Tensor:
    product: Tensor = _Product.apply(states, self)  # type: ignore[no-untyped-call]
    return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """A product with a quantised weight that stores only the layer for its gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(states, whole_weight(layer.weight, states.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ whole_weight(ctx.layer.weight, gradient.dtype), None


class _WholeExperts:
    """Experts as transformers knows them, with dequantised weights; the module itself never changes.

    Args:
        experts: A module whose parameters are quantised.
        dtype: Type of the dequantised weights.
    """

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts = experts
        for name, weight in experts.named_parameters(recurse=False):
            setattr(self, name, whole_weight(weight, dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def _multiply_by_experts(self: Any, states: Tensor, *routing: Tensor) -> Tensor:
    """Run quantised experts as transformers runs whole ones, shape (tokens, hidden)."""

    def run(states: Tensor, *routing: Tensor) -> Tensor:
        return type(self).forward(_WholeExperts(self, states.dtype), states, *routing)  # type: ignore[no-any-return]

    if not torch.is_grad_enabled():
        return run(states, *routing)
    # Gradients need the dequantised weights, which would take more memory than they do without quantisation.
    output: Tensor = checkpoint(run, states, *routing, use_reentrant=False, preserve_rng_state=False)
    return output


def whole_weight(weight: Any, dtype: torch.dtype) -> Tensor:
    """Dequantise a weight to a floating-point type, in its own shape (outputs, inputs)."""
    if hasattr(weight, "quant_state"):
        functional = require("bitsandbytes.functional", extra="finetune")
        state = copy.copy(weight.quant_state)
        # On CPUs bitsandbytes takes each row of a matrix to begin a block, which is wrong for rows of 96, for example.
        count, block = state.shape.numel(), state.blocksize
        state.shape = (count // block, block) if count % block == 0 else (1, count)
        whole: Tensor = functional.dequantize_4bit(weight.data, state)
        return whole.view(weight.quant_state.shape).to(dtype)
    # The largest magnitude of each row is kept beside it, and stands for 127. Multiplied in float32, rounded once.
    whole = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return torch.mul(weight.data, (weight.SCB / 127).unsqueeze(-1), out=whole)


@contextmanager
def without_advice() -> Iterator[None]:
    """Silence bitsandbytes' advice, on import, to install a package that downloads code."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
