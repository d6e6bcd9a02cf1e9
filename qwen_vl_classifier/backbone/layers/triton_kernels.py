"""The operators of GPUs: kernels in Triton. Imported only where Triton is installed.

Each kernel reads its inputs once and writes its results once. It rounds where transformers rounds: statistics and
rotations are float32, and what transformers keeps in the type of the states in between is rounded to it here.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from qwen_vl_classifier.backbone.layers.operators import (
    Operators,
    Product,
    is_centred_norm,
    is_quick_gelu,
    is_rms_norm,
    is_silu,
    multiply,
)
from qwen_vl_classifier.backbone.layers.rotary import Rotary

# Rows are numbered in 64 bits: 400,000 tokens of 6,912 features pass 2^31.


@triton.jit
def _rms_norm(
    states,
    residual,
    gate,
    weight,
    total,
    result,
    rows,
    heads,
    token_stride,
    head_stride,
    width,
    epsilon,
    adds: tl.constexpr,
    gated: tl.constexpr,
    centred: tl.constexpr,
    together: tl.constexpr,
    block: tl.constexpr,
):
    kind = states.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * together + tl.arange(0, together))[:, None]
    column = tl.arange(0, block)[None, :]
    inside = (row < rows) & (column < width)
    there, here = row // heads * token_stride + row % heads * head_stride + column, row * width + column
    value = tl.load(states + there, mask=inside, other=0.0).to(tl.float32)
    if adds:
        value = (value + tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(total + here, value, mask=inside)
        value = value.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 1)[:, None] / width + epsilon)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    value = value * (factor + 1) if centred else value.to(kind).to(tl.float32) * factor
    if gated:
        gates = tl.load(gate + here, mask=inside, other=0.0).to(tl.float32)
        value = value.to(kind).to(tl.float32) * (gates / (1 + tl.exp(-gates)))
    tl.store(result + here, value.to(kind), mask=inside)


@triton.jit
def _layer_norm(
    states, residual, weight, bias, total, result, rows, width, epsilon, together: tl.constexpr, block: tl.constexpr
):
    kind = states.dtype.element_ty
    row = (tl.program_id(0).to(tl.int64) * together + tl.arange(0, together))[:, None]
    column = tl.arange(0, block)[None, :]
    inside, here = (row < rows) & (column < width), row * width + column
    value = tl.load(states + here, mask=inside, other=0.0).to(tl.float32)
    value = (value + tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)).to(kind)
    tl.store(total + here, value, mask=inside)
    value = value.to(tl.float32)
    value = tl.where(inside, value - tl.sum(value, 1)[:, None] / width, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 1)[:, None] / width + epsilon)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    addend = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(result + here, (value * factor + addend).to(kind), mask=inside)


@triton.jit
def _silu_and_multiply(gate, up, result, stride, width, block: tl.constexpr):
    kind = result.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gates = tl.load(gate + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    value = (gates / (1 + tl.exp(-gates))).to(kind).to(tl.float32)
    value = value * tl.load(up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + row * width + column, value.to(kind), mask=inside)


@triton.jit
def _quick_gelu(states, result, size, block: tl.constexpr):
    kind = result.dtype.element_ty
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    value = tl.load(states + place, mask=place < size, other=0.0).to(tl.float32)
    scaled = (1.702 * value).to(kind).to(tl.float32)
    gates = (1 / (1 + tl.exp(-scaled))).to(kind).to(tl.float32)
    tl.store(result + place, (value * gates).to(kind), mask=place < size)


@triton.jit
def _rotate(
    query,
    key,
    cosine,
    sine,
    query_result,
    key_result,
    query_heads,
    key_heads,
    query_token,
    query_head,
    key_token,
    key_head,
    half: tl.constexpr,
    width: tl.constexpr,
    query_block: tl.constexpr,
    key_block: tl.constexpr,
    half_block: tl.constexpr,
    rest_block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _rotate_heads(
            query + row * query_token,
            query_result + row * query_heads * width,
            cosine + row * 2 * half,
            sine + row * 2 * half,
            query_heads,
            query_head,
            half,
            width,
            query_block,
            half_block,
            rest_block,
        )
    else:
        _rotate_heads(
            key + row * key_token,
            key_result + row * key_heads * width,
            cosine + row * 2 * half,
            sine + row * 2 * half,
            key_heads,
            key_head,
            half,
            width,
            key_block,
            half_block,
            rest_block,
        )


@triton.jit
def _rotate_heads(
    states,
    result,
    cosine,
    sine,
    heads,
    stride,
    half: tl.constexpr,
    width: tl.constexpr,
    head_block: tl.constexpr,
    half_block: tl.constexpr,
    rest_block: tl.constexpr,
):
    kind = result.dtype.element_ty
    between = cosine.dtype.element_ty
    head, angle = tl.arange(0, head_block)[:, None], tl.arange(0, half_block)[None, :]
    inside = (head < heads) & (angle < half)
    there, here = states + head * stride + angle, result + head * width + angle
    first = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(there + half, mask=inside, other=0.0).to(tl.float32)
    cosines = tl.load(cosine + angle, mask=angle < half, other=0.0).to(tl.float32)
    sines = tl.load(sine + angle, mask=angle < half, other=0.0).to(tl.float32)
    turned = (first * cosines).to(between).to(tl.float32) - (second * sines).to(between).to(tl.float32)
    tl.store(here, turned.to(kind), mask=inside)
    turned = (second * cosines).to(between).to(tl.float32) + (first * sines).to(between).to(tl.float32)
    tl.store(here + half, turned.to(kind), mask=inside)
    if rest_block > 0:  # features without angles stay as they are
        column = 2 * half + tl.arange(0, rest_block)[None, :]
        inside = (head < heads) & (column < width)
        value = tl.load(states + head * stride + column, mask=inside, other=0.0)
        tl.store(result + head * width + column, value, mask=inside)


class TritonOperators(Operators):
    """Operators that take one pass each."""

    def normalise(self, states: Tensor, weight: Tensor, epsilon: float, *, centred: bool = False) -> Tensor:
        """Normalise; heads within a wider strip are read where they lie."""
        return _rms_normalise(states, weight, epsilon, centred=centred)[1]

    def normalise_with_gate(self, states: Tensor, gate: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Normalise, and multiply by the SiLU of a gate in float32."""
        return _rms_normalise(states, weight, epsilon, gate=gate.contiguous())[1]

    def add_and_normalise(
        self, states: Tensor, product: Product | None, residual: Tensor, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Apply a linear layer, if one is given, and add the residual and normalise in one pass."""
        output = states if product is None else multiply(states, product)
        settings: Any = norm
        if is_rms_norm(norm):
            return _rms_normalise(output, settings.weight, settings.variance_epsilon, residual=residual)
        if is_centred_norm(norm):
            return _rms_normalise(output, settings.weight, settings.eps, residual=residual, centred=True)
        if type(norm) is nn.LayerNorm:
            return _layer_normalise(output, residual, norm)
        return super().add_and_normalise(output, None, residual, norm)

    def activate(self, states: Tensor, product: Product, activation: Any) -> Tensor:
        """Apply a linear layer and an activation; torch has a kernel for each but that of Qwen2-VL's vision tower."""
        if not is_quick_gelu(activation):
            return super().activate(states, product, activation)
        output = multiply(states, product).contiguous()
        result = torch.empty_like(output)
        with torch.cuda.device_of(output):
            _quick_gelu[(triton.cdiv(output.numel(), _BLOCK),)](
                output, result, output.numel(), block=_BLOCK, **_OPTIONS
            )
        return result

    def multiply_gate(self, gate: Tensor, up: Tensor, activation: Any) -> Tensor:
        """Multiply the activation of one tensor by another; both may be halves of one product."""
        if not is_silu(activation):
            return super().multiply_gate(gate, up, activation)
        width = gate.shape[-1]
        rows = [part.flatten(0, -2) for part in (gate, up)]
        if any(part.stride() != (rows[0].stride(0), 1) for part in rows):
            rows = [part.contiguous() for part in rows]
        result = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        block = min(_BLOCK, triton.next_power_of_2(width))
        grid = (len(rows[0]), triton.cdiv(width, block))
        with torch.cuda.device_of(gate):
            _silu_and_multiply[grid](*rows, result, rows[0].stride(0), width, block=block, **_OPTIONS)
        return result

    def rotate(self, query: Tensor, key: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys in one launch, read where they lie in a wider strip."""
        width, angles = query.shape[-1], rotary[0].shape[-1]
        tokens = [part.flatten(0, -3) for part in (query, key)]
        tokens = [part if part.stride(2) == 1 else part.contiguous() for part in tokens]
        cosine, sine = (part.expand(*query.shape[:-2], angles).reshape(-1, angles) for part in rotary)
        results = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (query, key)]
        heads = [part.shape[1] for part in tokens]
        with torch.cuda.device_of(query):
            _rotate[(len(cosine), 2)](
                *tokens,
                cosine,
                sine,
                *results,
                *heads,
                *tokens[0].stride()[:2],
                *tokens[1].stride()[:2],
                half=angles // 2,
                width=width,
                query_block=triton.next_power_of_2(heads[0]),
                key_block=triton.next_power_of_2(heads[1]),
                half_block=triton.next_power_of_2(angles // 2),
                rest_block=triton.next_power_of_2(width - angles) if width > angles else 0,
                **_OPTIONS,
            )
        return results[0], results[1]


_BLOCK = 1024  # features of one program
_OPTIONS = {"enable_fp_fusion": False}  # a product and a sum round separately, as torch's operators do


def _rms_normalise(
    states: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the sum with the residual, or the states without one, and the sum normalised and multiplied by a gate."""
    width = states.shape[-1]
    rows = states.contiguous().view(-1, 1, width) if residual is not None or states.dim() < 3 else states.flatten(0, -3)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    result = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    total = states if residual is None else torch.empty_like(result)
    number, heads, _ = rows.shape
    together, tile = _tile(width)
    with torch.cuda.device_of(states):
        _rms_norm[(triton.cdiv(number * heads, together),)](
            rows,
            rows if residual is None else residual.contiguous(),
            rows if gate is None else gate,
            weight,
            total,
            result,
            number * heads,
            heads,
            rows.stride(0),
            rows.stride(1),
            width,
            epsilon,
            adds=residual is not None,
            gated=gate is not None,
            centred=centred,
            together=together,
            **tile,
        )
    return total, result


def _layer_normalise(states: Tensor, residual: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return the sum with the residual, and the sum normalised by mean and variance (Ba et al., arXiv:1607.06450)."""
    states, width = states.contiguous(), states.shape[-1]
    rows = states.numel() // width
    total, result = torch.empty_like(states), torch.empty_like(states)
    together, tile = _tile(width)
    with torch.cuda.device_of(states):
        _layer_norm[(triton.cdiv(rows, together),)](
            states,
            residual.contiguous(),
            norm.weight,
            norm.bias,
            total,
            result,
            rows,
            width,
            norm.eps,
            together=together,
            **tile,
        )
    return total, result


def _tile(width: int) -> tuple[int, dict[str, Any]]:
    """Return how many rows one program takes, and how it is compiled."""
    block = int(triton.next_power_of_2(width))
    return max(1, _BLOCK // block), {"block": block, "num_warps": 4 if block <= 2048 else 8, **_OPTIONS}
