"""How a layer computes the operations between its matrix products: norms, gates, residuals, rotary positions.

`Operators` is torch's own way, on any device, and the definition that others are compared with. `OneDnnOperators` is
the way of CPUs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.layers.rotary import Rotary, rotate

_CENTRED_NORMS = ("Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm")  # their weights are kept as the distance from one


def is_rms_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm of transformers that divides by the root of the mean square."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def is_centred_norm(module: nn.Module) -> bool:
    """Tell whether it does so and has a weight that is kept as the distance from one."""
    return type(module).__name__ in _CENTRED_NORMS


def is_silu(activation: Any) -> bool:
    """Tell whether an activation, a module of transformers or torch, is the SiLU."""
    return type(activation).__name__ in ("SiLUActivation", "SiLU")


def is_quick_gelu(activation: Any) -> bool:
    """Tell whether an activation is transformers' approximation of the GELU by a sigmoid."""
    return type(activation).__name__ == "QuickGELUActivation"


class Product(Protocol):
    """What a matrix product needs; a linear layer has it."""

    @property
    def weight(self) -> Tensor:
        """Shape (features of the result, features of the input)."""

    @property
    def bias(self) -> Tensor | None:
        """Shape (features of the result,)."""


def multiply(states: Tensor, product: Product) -> Tensor:
    """Apply a linear layer, shape (..., features)."""
    return nn.functional.linear(states, product.weight, product.bias)


class Operators:
    """Torch's own operators. Without gradients: results are written in place where that saves memory."""

    def normalise(self, states: Tensor, weight: Tensor, epsilon: float, *, centred: bool = False) -> Tensor:
        """Divide by the root of the mean square (Zhang and Sennrich, arXiv:1910.07467) in float32.

        Args:
            states: Shape (..., features).
            weight: Shape (features,).
            epsilon: Added to the mean square.
            centred: The weight is one more than what is kept, and multiplies in float32; else it multiplies what was
                rounded to the type of the states.
        """
        scaled = _scaled(states, epsilon)
        if centred:
            return scaled.mul_(weight.float() + 1).to(states.dtype)
        return scaled.to(states.dtype).mul_(weight)

    def normalise_with_gate(self, states: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Normalise, and multiply by the SiLU of a gate in float32."""
        normed = self.normalise(states, weight, epsilon)
        return nn.functional.silu(gate.float()).mul_(normed).to(states.dtype)

    def add(self, states: Tensor, product: Product, residual: Tensor) -> Tensor:
        """Apply a linear layer and add the residual."""
        return multiply(states, product).add_(residual)

    def add_and_normalise(
        self, states: Tensor, product: Product | None, residual: Tensor, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Apply a linear layer, if one is given, and add the residual; return the sum, and the sum after a norm."""
        total = states.add_(residual) if product is None else self.add(states, product, residual)
        return total, norm(total).to(total.dtype)  # autocast lets torch's own norm return float32

    def activate(self, states: Tensor, product: Product, activation: Any) -> Tensor:
        """Apply a linear layer and an activation."""
        return activation(multiply(states, product))  # type: ignore[no-any-return]

    def activate_and_multiply(self, states: Tensor, gate: Product, up: Product, activation: Any) -> Tensor:
        """Apply two linear layers, and multiply the activation of the first result by the second."""
        return self.multiply_gate(multiply(states, gate), multiply(states, up), activation)

    def multiply_gate(self, gate: Tensor, up: Tensor, activation: Any) -> Tensor:
        """Multiply the activation of one tensor by another."""
        return activation(gate).mul_(up)  # type: ignore[no-any-return]

    def rotate(self, query: Tensor, key: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys, shape (..., heads, head)."""
        return rotate(query, rotary), rotate(key, rotary)


def _scaled(states: Tensor, epsilon: float) -> Tensor:
    """Return a new float32 tensor: states over the root of their mean square."""
    copy = states.to(torch.float32)
    mean_square = torch.linalg.vector_norm(copy, dim=-1, keepdim=True).square_().div_(copy.shape[-1])
    scale = mean_square.add_(epsilon).rsqrt_()
    return copy.mul(scale) if copy is states else copy.mul_(scale)


class OneDnnOperators(Operators):
    """The operators of CPUs: oneDNN computes activation, gate and residual while a product is in the cache."""

    def add(self, states: Tensor, product: Product, residual: Tensor) -> Tensor:
        """Apply a linear layer and add the residual."""
        return _linear_with(states, product, residual, "add")

    def activate(self, states: Tensor, product: Product, activation: Any) -> Tensor:
        """Apply a linear layer and an activation."""
        if not is_silu(activation):
            return super().activate(states, product, activation)
        rows = states.reshape(-1, states.shape[-1])
        output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, product.weight, product.bias, "swish", [], "none")
        return output.view(*states.shape[:-1], -1)

    def activate_and_multiply(self, states: Tensor, gate: Product, up: Product, activation: Any) -> Tensor:
        """Apply two linear layers, and multiply the activation of the first result by the second."""
        return _linear_with(states, up, self.activate(states, gate, activation), "mul")


def _linear_with(states: Tensor, product: Product, other: Tensor, operation: str) -> Tensor:
    """Apply a linear layer and multiply with, or add, another tensor of the result's shape."""
    rows, others = states.reshape(-1, states.shape[-1]), other.reshape(-1, other.shape[-1])
    fused: Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, others, product.weight, product.bias, operation)
    return fused.view(other.shape)


@cache
def has_fused_linear(dtype: torch.dtype) -> bool:
    """Tell whether this torch has the fused operators, which are not part of its public API, and they work.

    oneDNN refuses bfloat16 on processors that cannot compute with it: those before AVX-512, which most laptops have.
    This is not done on import: a process that has computed cannot be forked safely.

    Args:
        dtype: The type of the states.
    """
    ones = torch.ones(2, 2, dtype=dtype)
    try:
        gated = torch.ops.mkldnn._linear_pointwise(ones, ones, None, "swish", [], "none")
        added = torch.ops.mkldnn._linear_pointwise.binary(ones, ones, ones, None, "add")
    except (AttributeError, RuntimeError, TypeError):
        return False
    rounding = 2 * torch.finfo(dtype).eps
    near = torch.allclose(gated, nn.functional.silu(2 * ones), rtol=rounding)
    return bool(near and torch.equal(added, 3 * ones))
