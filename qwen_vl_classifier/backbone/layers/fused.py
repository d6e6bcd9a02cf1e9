"""The fast path of CPUs: layers of both towers with fewer passes over memory.

Matrix products are fast, and the operations between them are slow: each norm of transformers reads and writes the
hidden states six times, each gate three times, each residual twice, and the 3-D convolution that embeds patches is far
slower than the equivalent matrix product. Here the same formulas take fewer passes: oneDNN computes activation, gate
and residual on the output of the product while it is in the cache, if torch offers that.

Weights are not copied, merged or reordered. With gradients, on a GPU, or if a layer is not a plain one (it has an
adapter, for example), transformers' own forward runs. Patches are embedded by a product in every case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import MethodType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.layers.attention import attend_in_decoder, attend_within_windows, rotate
from qwen_vl_classifier.backbone.layers.sequences import Sequences

Rotary: TypeAlias = tuple[Tensor, Tensor]

_ACTIVATIONS = {"SiLUActivation": "swish", "SiLU": "swish"}  # classes of transformers and torch: oneDNN's names
_CENTRED_NORMS = ("Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm")  # their weights are kept as the distance from one
_GATED_NORMS = ("Qwen3_5RMSNormGated", "Qwen3_5MoeRMSNormGated")


def fuse_layers(model: nn.Module) -> None:
    """Replace the forward of a transformers Qwen-VL model's layers by the fast path for CPUs.

    Results are the same to rounding. Where the fast path does not apply, the layer's own forward runs.

    Args:
        model: A model without language head; changed in place.
    """
    for module in model.modules():
        if _is_rms_norm(module):
            _replace(module, _normalise)
        elif type(module).__name__ in _CENTRED_NORMS:
            _replace(module, _normalise_centred)
        elif type(module).__name__ in _GATED_NORMS:
            _replace(module, _normalise_with_gate)
        elif isinstance(getattr(module, "proj", None), nn.Conv3d):
            _replace(module, _embed_patches)
        elif hasattr(module, "attn") and hasattr(module, "norm2"):
            _replace(module, _vision_block)
        elif hasattr(module, "input_layernorm") and hasattr(module, "mlp"):
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
    return _scaled(hidden_states, self.variance_epsilon).to(hidden_states.dtype).mul_(self.weight)


def _normalise_centred(self: Any, hidden_states: Tensor) -> Tensor:
    """Normalise likewise where the weight is one more than what is kept, and multiplies in float32 (Qwen3.5)."""
    if torch.is_grad_enabled() or hidden_states.device.type != "cpu":
        return self.own_forward(hidden_states)  # type: ignore[no-any-return]
    return _scaled(hidden_states, self.eps).mul_(self.weight.float() + 1).to(hidden_states.dtype)


def _normalise_with_gate(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """Normalise as most layers do, and multiply by the SiLU of a gate in float32 (Qwen3.5, after linear attention)."""
    if torch.is_grad_enabled() or hidden_states.device.type != "cpu":
        return self.own_forward(hidden_states, gate)  # type: ignore[no-any-return]
    normed = _scaled(hidden_states, self.variance_epsilon).to(hidden_states.dtype).mul_(self.weight)
    return nn.functional.silu(gate.float()).mul_(normed).to(hidden_states.dtype)


def _scaled(states: Tensor, epsilon: float) -> Tensor:
    """Return a new float32 tensor: states over the root of their mean square."""
    copy = states.to(torch.float32)
    mean_square = torch.linalg.vector_norm(copy, dim=-1, keepdim=True).square_().div_(copy.shape[-1])
    scale = mean_square.add_(epsilon).rsqrt_()
    return copy.mul(scale) if copy is states else copy.mul_(scale)


def _embed_patches(self: Any, hidden_states: Tensor) -> Tensor:
    """Embed patches: a convolution whose stride is its kernel is a matrix product, and so are its gradients."""
    weight: Tensor = self.proj.weight
    return nn.functional.linear(hidden_states.to(weight.dtype), weight.flatten(1), self.proj.bias)


def _vision_block(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor | Sequences,
    position_embeddings: Rotary,
    **options: Any,
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
    mix = _mix_linearly if hasattr(self, "linear_attn") else _attend
    hidden_states = mix(self, self.input_layernorm(hidden_states), hidden_states, options)
    return _mlp_plus(self.post_attention_layernorm(hidden_states), self.mlp, hidden_states)


def _attend(layer: Any, normed: Tensor, residual: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Run full attention on normalised states, with or without a gate, and add the residual."""
    attention = layer.self_attn
    heads = (*normed.shape[:2], -1, attention.head_dim)
    query, key, value = (part(normed).view(heads) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    gate = None
    if attention.q_proj.out_features == 2 * attention.o_proj.in_features:  # Qwen3.5: each head's query, then its gate
        query, gate = query.unflatten(2, (-1, 2)).unbind(3)
    if hasattr(attention, "q_norm"):  # Qwen3-VL and later
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
    if gate is not None:
        attended = attended.mul_(gate.sigmoid())
    return _linear_plus(attended.flatten(2), attention.o_proj, residual)


def _mix_linearly(layer: Any, normed: Tensor, residual: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Run linear attention on normalised states, and add the residual."""
    mixed: Tensor = layer.linear_attn(hidden_states=normed, attention_mask=options.get("attention_mask"))
    return mixed.add_(residual)


def _mlp_plus(states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    """Run an MLP of any kind and add its input's residual."""
    run = next(run for name, run in _MLPS.items() if hasattr(mlp, name))
    return run(states, mlp, residual)


def _experts_plus(states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    """Send each token to its experts."""
    output: Tensor = mlp(states)
    return output.add_(residual)


def _gated_plus(states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    gate = _linear_then(states, mlp.gate_proj, mlp.act_fn)
    return _linear_plus(_linear_with(states, mlp.up_proj, gate, "mul"), mlp.down_proj, residual)


def _plain_plus(states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    return _linear_plus(_linear_then(states, mlp.linear_fc1, mlp.act_fn), mlp.linear_fc2, residual)


def _plain_plus_of_qwen2(states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    return _linear_plus(_linear_then(states, mlp.fc1, mlp.act), mlp.fc2, residual)


_MLPS: dict[str, Callable[[Tensor, Any, Tensor], Tensor]] = {  # by what a module of the kind has
    "experts": _experts_plus,
    "gate_proj": _gated_plus,
    "linear_fc1": _plain_plus,
    "fc1": _plain_plus_of_qwen2,
}


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
