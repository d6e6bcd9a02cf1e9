"""Extend transformers' quantisers for bitsandbytes to the arrays of experts, which they skip.

The arrays hold nearly all weights of a mixture of experts. Each is quantised while it is loaded, so that only one is
there in whole: in 8 bits as one matrix, with the rows of all experts below one another; in 4 bits by blocks of weights
that follow one another, as any matrix.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from qwen_vl_classifier.backbone.checkpoint.weight_names import experts_of_array
from qwen_vl_classifier.extras import require


class _WithExperts:
    """Quantises the arrays of experts beside what a quantiser of transformers does."""

    def param_needs_quantization(self, model: nn.Module, param_name: str, **options: Any) -> bool:
        needed: bool = super().param_needs_quantization(model, param_name, **options)  # type: ignore[misc]
        return needed or experts_of_array(param_name) is not None

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self.quantization_config, super().get_quantize_ops())  # type: ignore[attr-defined,misc]


class _Quantiser4bit(_WithExperts, Bnb4BitHfQuantizer):  # type: ignore[misc]  # transformers carries no types
    pass


class _Quantiser8bit(_WithExperts, Bnb8BitHfQuantizer):  # type: ignore[misc]
    pass


class _Quantise(ConversionOps):  # type: ignore[misc]
    """Quantises a weight on the device where it is: an array of experts here, any other as transformers does."""

    def __init__(self, config: transformers.BitsAndBytesConfig, others: ConversionOps) -> None:
        self.config = config
        self.others = others

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
        if not all(experts_of_array(name) for name in input_dict):
            converted: dict[str, Any] = self.others.convert(input_dict, **options)
            return converted
        quantise = _in_4_bits if self.config.load_in_4bit else _in_8_bits
        arrays = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        return {name: quantise(array.contiguous(), self.config) for name, array in arrays.items()}


@cache
def quantiser_of(quantization: str) -> str:
    """Make the quantiser of "8bit" or "4bit" known to transformers, and return the name by which it knows it."""
    name = f"qwen_vl_classifier_{quantization}"
    register_quantizer(name)({"8bit": _Quantiser8bit, "4bit": _Quantiser4bit}[quantization])
    return name


def _in_4_bits(array: Tensor, config: transformers.BitsAndBytesConfig) -> nn.Parameter:
    """Quantise an array of any shape by blocks of 64; the result carries shape and scales as `quant_state`."""
    layers = require("bitsandbytes.nn", extra="finetune")
    quantised: nn.Parameter = layers.Params4bit(
        array,
        quant_type=config.bnb_4bit_quant_type,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_storage=config.bnb_4bit_quant_storage,
    ).to(array.device)
    return quantised


def _in_8_bits(array: Tensor, config: transformers.BitsAndBytesConfig) -> nn.Parameter:
    """Quantise each row of an array; the result carries the rows' largest magnitudes as `SCB`."""
    functional = require("bitsandbytes.functional", extra="finetune")
    # By way of float16, as bitsandbytes does with linear layers.
    quantised, largest, _ = functional.int8_vectorwise_quant(array.flatten(0, 1).half())
    parameter: Any = nn.Parameter(quantised.view(array.shape), requires_grad=False)
    parameter.SCB = largest.view(array.shape[:2])
    return parameter  # type: ignore[no-any-return]
