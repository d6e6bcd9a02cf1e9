"""Linear layers with the same input as one product, for GPUs.

One large product is faster than several small ones. The weights move into one strip, and each layer's own weight
becomes a view of its part: names, shapes and values stay those of the checkpoint, nothing is held twice, and what
changes a weight in place changes the strip. Where a weight has been replaced since, each layer computes by itself.

The inner size of a vision MLP may be padded with zeros: where the bytes of a row are no multiple of 16, GPUs since
Hopper take kernels of the generation before (3420 of Qwen2.5-VL in bfloat16). Zeros stay zeros through a gate, and add
nothing to the last product, whose weight is padded by columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.layers.operators import multiply

View: TypeAlias = tuple[str, Tensor, Tensor | None]

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_LAST = "down_proj"
_MLP = ("gate_proj", "up_proj", _LAST)
_ALIGNED_BYTES = 16
_TILE = 128


@dataclass(frozen=True, slots=True)
class Strip:
    """The weights of one product, as `multiply` takes them."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class JoinedLayers:
    """Some linear layers of a module, joined.

    Attributes:
        views: For each layer, with its name in the module, its weight and its bias as they lie in the strips.
        together: The strip of the layers that share their input.
        sizes: How many features of its product belong to each of them, padding included.
        last: The padded strip of the layer that takes their result; `None` where that layer is not padded.
    """

    views: tuple[View, ...]
    together: Strip
    sizes: tuple[int, ...]
    last: Strip | None = None

    def multiply(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return the results of the layers that share their input, views of one tensor of shape (..., all features)."""
        return torch.split(multiply(states, self.together), list(self.sizes), dim=-1)

    def are_of(self, module: nn.Module) -> bool:
        """Tell whether the module's weights still lie in the strips."""
        for name, weight, bias in self.views:
            layer = getattr(module, name)
            if not (_same(layer.weight, weight) and _same(layer.bias, bias)):
                return False
        return True


def _same(seen: Tensor | None, view: Tensor | None) -> bool:
    if seen is None or view is None:
        return seen is view
    # The strip is alive, so nothing else can lie at its address.
    return seen.data_ptr() == view.data_ptr() and seen.shape == view.shape and seen.stride() == view.stride()


def join_layers(model: nn.Module) -> None:
    """Join queries, keys and values of full attention, and gates and inner layers of MLPs, where they are plain.

    Args:
        model: A model without language head, on its device; changed in place.
    """
    for layer in (*model.visual.blocks, *model.language_model.layers):  # type: ignore[union-attr,misc]
        for part, names in (("self_attn", _ATTENTION), ("mlp", _MLP)):
            module: Any = getattr(layer, part, None)
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if _are_alike(layers):
                module.joined = _join(dict(zip(names, layers, strict=True)))


def part_layers(model: nn.Module) -> None:
    """Separate joined layers: each gets its own weights again, as training expects.

    Args:
        model: The model, or a part of it; changed in place.
    """
    for module in model.modules():
        joined = joined_layers(module)
        if joined is None:
            continue
        for name, _, _ in joined.views:
            for parameter in getattr(module, name).parameters():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        del module.joined


def joined_layers(module: Any) -> JoinedLayers | None:
    """Return the joined layers of a module; forget them where a weight has been replaced."""
    joined: JoinedLayers | None = module.__dict__.get("joined")
    if joined is not None and not joined.are_of(module):
        del module.joined
        return None
    return joined


def _are_alike(layers: Sequence[Any]) -> bool:
    """Tell whether all are plain linear layers of one type on one device, and all or none of them have a bias."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    kinds = {(layer.weight.dtype, layer.weight.device, layer.bias is None) for layer in layers}
    return len(kinds) == 1 and not layers[0].weight.is_meta


@torch.no_grad()
def _join(layers: Mapping[str, nn.Linear]) -> JoinedLayers:
    """Move the weights of layers into strips; of an MLP the last layer takes the result of the others."""
    together = {name: layer for name, layer in layers.items() if name != _LAST}
    sizes = tuple(layer.out_features for layer in together.values())
    views: list[View] = []
    last = None
    if _LAST in layers and (padded := _padded(sizes[0], layers[_LAST].weight.dtype)) != sizes[0]:
        layer = layers[_LAST]
        sizes = (padded,) * len(sizes)
        weight = nn.functional.pad(layer.weight, (0, padded - layer.in_features))
        last = Strip(weight, layer.bias)
        views.append((_LAST, weight[:, : layer.in_features], layer.bias))
    first = next(iter(together.values()))
    strip = Strip(
        first.weight.new_zeros(sum(sizes), first.in_features),
        None if first.bias is None else first.bias.new_zeros(sum(sizes)),
    )
    start = 0
    for size, (name, layer) in zip(sizes, together.items(), strict=True):
        part = slice(start, start + layer.out_features)
        views.append((name, strip.weight[part], None if strip.bias is None else strip.bias[part]))
        start += size
    for name, weight, bias in views:
        for parameter, view in ((layers[name].weight, weight), (layers[name].bias, bias)):
            if view is not None and view is not parameter:
                view.copy_(parameter)
                parameter.data = view
    return JoinedLayers(tuple(views), strip, sizes, last)


def _padded(size: int, dtype: torch.dtype) -> int:
    """Return the inner size of an MLP as it is computed: rows that are not aligned are padded to whole tiles."""
    return size if size * dtype.itemsize % _ALIGNED_BYTES == 0 else -(-size // _TILE) * _TILE
