"""The fast path of CPUs: layers of both towers with fewer passes over memory.

Matrix products are fast, and the operations between them are slow: each norm of transformers reads and writes the
hidden states six times, each gate three times, each residual twice, and the 3-D convolution that embeds patches is far
slower than the equivalent matrix product. Here the same formulas take fewer passes: oneDNN computes activation, gate
and residual on the output of the product while it is in the cache, if torch offers that.

Weights are not copied, merged or reordered. With gradients, on a GPU, or if a layer is not a plain one (it has an
adapter, for example), transformers' own forward runs. Patches are embedded by a product in every case.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.layers.attention import attend_in_decoder, attend_within_windows, rotate

Rotary: TypeAlias = tuple[Tensor, Tensor]

_ACTIVATIONS = {"SiLUActivation": "swish", "SiLU": "swish"}  # classes of transformers and torch: oneDNN's names


def fuse_layers(model: nn.Module) -> None:
    """Replace the forward of a transformers Qwen-VL model's layers by the fast path for CPUs.

    Results are the same to rounding. Where the fast path does not apply, the layer's own forward runs.

    Args:
        model: A model without language head; changed in place.
    """
    for module in model.modules():
        if _is_rms_norm(module):
            _replace(module, _normalise)
        elif isinstance(getattr(module, "proj", None), nn.Conv3d):
            _replace(module, _embed_patches)
        elif hasattr(module, "attn") and hasattr(module, "norm2"):
            _replace(module, _vision_block)
        elif hasattr(module, "self_attn") and hasattr(module, "input_layernorm"):
            _replace(module, _decoder_layer)


def _replace(module: Any, forward: Any) -> None:
    module.own_forward = module.forward
    module.forward = MethodType(forward, module)


def _runs_fused(module: nn.Module, states: Tensor) -> bool:
    """Tell whether the fast path applies: no gradients, on the CPU, one type, plain linear layers only."""
    if torch.is_grad_enabled() or states.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return all(
        type(child) is nn.Linear and child.weight.dtype == states.dtype
        for child in module.modules()
        if hasattr(child, "in_features")
    )


def _is_rms_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _normalise(self: Any, hidden_states: Tensor) -> Tensor:
    """Divide by the root of the mean square (Zhang and Sennrich, arXiv:1910.07467) in float32, as transformers does."""
    if torch.is_grad_enabled() or hidden_states.device.type != "cpu":
        return self.own_forward(hidden_states)  # type: ignore[no-any-return]
    copy = hidden_states.to(torch.float32)
    mean_square = torch.linalg.vector_norm(copy, dim=-1, keepdim=True).square_().div_(copy.shape[-1])
    scale = mean_square.add_(self.variance_epsilon).rsqrt_()
    scaled = copy.mul(scale) if copy is hidden_states else copy.mul_(scale)
    return scaled.to(hidden_states.dtype).mul_(self.weight)


def _embed_patches(self: Any, hidden_states: Tensor) -> Tensor:
    """Embed patches: a convolution whose stride is its kernel is a matrix product, and so are its gradients."""
    weight: Tensor = self.proj.weight
    return nn.functional.linear(hidden_states.to(weight.dtype), weight.flatten(1), self.proj.bias)


def _vision_block(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Rotary, **options: Any
) -> Tensor:
    """Run one block of the vision tower on all windows, shape (patches, hidden)."""
    if not _runs_fused(self, hidden_states):
        return self.own_forward(  # type: ignore[no-any-return]
            hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **options
        )
    attention = self.attn
    states = attention.qkv(self.norm1(hidden_states)).view(len(hidden_states), 3, attention.num_heads, -1)
    attended = attend_within_windows(states, cu_seqlens, position_embeddings, attention.scaling)
    hidden_states = _linear_plus(attended, attention.proj, hidden_states)
    return _mlp_plus(self.norm2(hidden_states), self.mlp, hidden_states)


def _decoder_layer(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Run one decoder layer, shape (rows, length, hidden), without a cache."""
    # Positional arguments may be anything, a mask for example: the layer's own forward takes them.
    known = not arguments and "position_embeddings" in options and options.get("past_key_values") is None
    if not known or not _runs_fused(self, hidden_states):
        return self.own_forward(hidden_states, *arguments, **options)  # type: ignore[no-any-return]
    attention = self.self_attn
    normed = self.input_layernorm(hidden_states)
    heads = (*hidden_states.shape[:2], -1, attention.head_dim)
    query, key, value = (layer(normed).view(heads) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):  # Qwen3-VL
        query, key = attention.q_norm(query), attention.k_norm(key)
    cosine, sine = (part.unsqueeze(2) for part in options["position_embeddings"])
    attended, _ = attend_in_decoder(
        attention,
        rotate(query, cosine, sine).transpose(1, 2),
        rotate(key, cosine, sine).transpose(1, 2),
        value.transpose(1, 2),
        options.get("attention_mask"),
        scaling=attention.scaling,
    )
    hidden_states = _linear_plus(attended.flatten(2), attention.o_proj, hidden_states)
    return _mlp_plus(self.post_attention_layernorm(hidden_states), self.mlp, hidden_states)


def _mlp_plus(states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    """Run a gated or a plain MLP and add its input's residual."""
    if hasattr(mlp, "gate_proj"):
        gate = _linear_then(states, mlp.gate_proj, mlp.act_fn)
        return _linear_plus(_linear_with(states, mlp.up_proj, gate, "mul"), mlp.down_proj, residual)
    first, second, activation = (
        (mlp.fc1, mlp.fc2, mlp.act) if hasattr(mlp, "fc1") else (mlp.linear_fc1, mlp.linear_fc2, mlp.act_fn)
    )
    return _linear_plus(_linear_then(states, first, activation), second, residual)


def _linear_plus(states: Tensor, layer: nn.Linear, residual: Tensor) -> Tensor:
    return _linear_with(states, layer, residual, "add")


def _linear_then(states: Tensor, layer: nn.Linear, activation: Any) -> Tensor:
    """Apply a linear layer and an activation, shape (..., features)."""
    name = _ACTIVATIONS.get(type(activation).__name__)
    if name is None or not has_fused_linear():
        return activation(layer(states))  # type: ignore[no-any-return]
    rows = states.reshape(-1, states.shape[-1])
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, layer.weight, layer.bias, name, [], "none")
    return output.view(*states.shape[:-1], -1)


def _linear_with(states: Tensor, layer: nn.Linear, other: Tensor, operation: str) -> Tensor:
    """Apply a linear layer and multiply with, or add, another tensor of the result's shape."""
    if not has_fused_linear():
        output = layer(states)
        return output.mul_(other) if operation == "mul" else output.add_(other)  # type: ignore[no-any-return]
    rows, others = states.reshape(-1, states.shape[-1]), other.reshape(-1, other.shape[-1])
    fused: Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, others, layer.weight, layer.bias, operation)
    return fused.view(other.shape)


@cache
def has_fused_linear() -> bool:
    """Tell whether this torch has the fused operators, which are not part of its public API, and they work.

    This is not done on import: a process that has computed cannot be forked safely.
    """
    ones = torch.ones(2, 2)
    try:
        gated = torch.ops.mkldnn._linear_pointwise(ones, ones, None, "swish", [], "none")
        added = torch.ops.mkldnn._linear_pointwise.binary(ones, ones, ones, None, "add")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool(torch.allclose(gated, nn.functional.silu(2 * ones)) and torch.equal(added, 3 * ones))
