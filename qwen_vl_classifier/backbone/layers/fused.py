"""The fast path of the layers of both towers: fewer passes over memory.

Matrix products are fast, and the operations between them are slow: each norm of transformers reads and writes the
hidden states six times, each gate three times, each residual twice, and the 3-D convolution that embeds patches is far
slower than the equivalent matrix product. Here the same formulas take fewer passes, by the operators of the device
(`operators.py`).

With gradients, or if a layer is not a plain one (it has an adapter, for example), transformers' own forward runs.
Patches are embedded by a product in every case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.layers.attention import attend_in_decoder, attend_within_windows
from qwen_vl_classifier.backbone.layers.chosen_operators import operators_for
from qwen_vl_classifier.backbone.layers.joined import joined_layers
from qwen_vl_classifier.backbone.layers.operators import Operators, is_centred_norm, is_rms_norm, multiply
from qwen_vl_classifier.backbone.layers.rotary import Rotary
from qwen_vl_classifier.backbone.layers.sequences import Sequences

_GATED_NORMS = ("Qwen3_5RMSNormGated", "Qwen3_5MoeRMSNormGated")


def fuse_layers(model: nn.Module) -> None:
    """Replace the forward of a transformers Qwen-VL model's layers by the fast path.

    Results are the same to rounding. Where the fast path does not apply, the layer's own forward runs.

    Args:
        model: A model without language head; changed in place.
    """
    for module in model.modules():
        if is_rms_norm(module):
            _replace(module, _normalise)
        elif is_centred_norm(module):
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


def _operators(states: Tensor) -> Operators | None:
    """Return how to compute on these states; `None` with gradients, where transformers' own forward runs."""
    return None if torch.is_grad_enabled() else operators_for(states.device, states.dtype)


def _operators_of(module: nn.Module, states: Tensor) -> Operators | None:
    """Return likewise for a layer, whose linear layers have to be plain ones of one type."""
    operators = _operators(states)
    plain = operators is not None and all(
        type(child) is nn.Linear and child.weight.dtype == states.dtype
        for child in module.modules()
        if "in_features" in vars(child)  # `hasattr` would cost more than a launch
    )
    device = states.device.type
    if plain and (not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == states.dtype):
        return operators
    for part in module.children():
        joined_layers(part)  # forgets what takes memory for nothing
    return None


def _normalise(self: Any, hidden_states: Tensor) -> Tensor:
    """Normalise as most layers do."""
    operators = _operators(hidden_states)
    if operators is None:
        return self.own_forward(hidden_states)  # type: ignore[no-any-return]
    return operators.normalise(hidden_states, self.weight, self.variance_epsilon)


def _normalise_centred(self: Any, hidden_states: Tensor) -> Tensor:
    """Normalise as Qwen3.5 does."""
    operators = _operators(hidden_states)
    if operators is None:
        return self.own_forward(hidden_states)  # type: ignore[no-any-return]
    return operators.normalise(hidden_states, self.weight, self.eps, centred=True)


def _normalise_with_gate(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """Normalise as Qwen3.5 does after linear attention."""
    operators = _operators(hidden_states)
    if operators is None:
        return self.own_forward(hidden_states, gate)  # type: ignore[no-any-return]
    return operators.normalise_with_gate(hidden_states, gate, self.weight, self.variance_epsilon)


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
    operators = _operators_of(self, hidden_states)
    if operators is None:
        return self.own_forward(  # type: ignore[no-any-return]
            hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **options
        )
    attention = self.attn
    heads = (len(hidden_states), 3, attention.num_heads, -1)
    normed = self.norm1(hidden_states).to(hidden_states.dtype)  # autocast lets torch's own norm return float32
    query, key, value = multiply(normed, attention.qkv).view(heads).unbind(1)
    query, key = operators.rotate(query, key, position_embeddings)
    attended = attend_within_windows(query, key, value, cu_seqlens, attention.scaling)
    hidden_states, normed = operators.add_and_normalise(attended, attention.proj, hidden_states, self.norm2)
    return _mlp_plus(operators, normed, self.mlp, hidden_states)


def _decoder_layer(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Run one decoder layer, shape (rows, length, hidden), without a cache."""
    # Positional arguments may be anything, a mask for example: the layer's own forward takes them.
    known = not arguments and "position_embeddings" in options and options.get("past_key_values") is None
    operators = _operators_of(self, hidden_states) if known else None
    if operators is None:
        return self.own_forward(hidden_states, *arguments, **options)  # type: ignore[no-any-return]
    normed = self.input_layernorm(hidden_states)
    if hasattr(self, "linear_attn"):
        mixed, projection = self.linear_attn(hidden_states=normed, attention_mask=options.get("attention_mask")), None
    else:
        mixed, projection = _attend(operators, normed, self.self_attn, options), self.self_attn.o_proj
    hidden_states, normed = operators.add_and_normalise(mixed, projection, hidden_states, self.post_attention_layernorm)
    return _mlp_plus(operators, normed, self.mlp, hidden_states)


def _attend(operators: Operators, normed: Tensor, attention: Any, options: Mapping[str, Any]) -> Tensor:
    """Run full attention on normalised states, with or without a gate, but not its last product."""
    heads = (*normed.shape[:2], -1, attention.head_dim)
    joined = joined_layers(attention)
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    parts = joined.multiply(normed) if joined is not None else [multiply(normed, layer) for layer in layers]
    query, key, value = (part.view(heads) for part in parts)
    gate = None
    if attention.q_proj.out_features == 2 * attention.o_proj.in_features:  # Qwen3.5: each head's query, then its gate
        query, gate = query.view(*heads[:2], -1, 2, attention.head_dim).unbind(3)
    if hasattr(attention, "q_norm"):  # Qwen3-VL and later
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = operators.rotate(query, key, options["position_embeddings"])
    attended, _ = attend_in_decoder(
        attention,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        options.get("attention_mask"),
        scaling=attention.scaling,
    )
    if gate is not None:
        attended = attended.mul_(gate.sigmoid())
    return attended.flatten(2)


def _mlp_plus(operators: Operators, states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    """Run an MLP of any kind and add its input's residual."""
    run = next(run for name, run in _MLPS.items() if hasattr(mlp, name))
    return run(operators, states, mlp, residual)


def _experts_plus(_: Operators, states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    """Send each token to its experts."""
    output: Tensor = mlp(states)
    return output.add_(residual)


def _gated_plus(operators: Operators, states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    joined = joined_layers(mlp)
    if joined is None:
        inner = operators.activate_and_multiply(states, mlp.gate_proj, mlp.up_proj, mlp.act_fn)
        return operators.add(inner, mlp.down_proj, residual)
    gate, up = joined.multiply(states)
    return operators.add(operators.multiply_gate(gate, up, mlp.act_fn), joined.last or mlp.down_proj, residual)


def _plain_plus(operators: Operators, states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    return operators.add(operators.activate(states, mlp.linear_fc1, mlp.act_fn), mlp.linear_fc2, residual)


def _plain_plus_of_qwen2(operators: Operators, states: Tensor, mlp: Any, residual: Tensor) -> Tensor:
    return operators.add(operators.activate(states, mlp.fc1, mlp.act), mlp.fc2, residual)


_MLPS: dict[str, Callable[[Operators, Tensor, Any, Tensor], Tensor]] = {  # by what a module of the kind has
    "experts": _experts_plus,
    "gate_proj": _gated_plus,
    "linear_fc1": _plain_plus,
    "fc1": _plain_plus_of_qwen2,
}
