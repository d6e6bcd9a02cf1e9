"""Record and replace what enters the decoder in a pass, and which experts its tokens have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def recorded_entries(layers: Any) -> Iterator[dict[int, Tensor]]:
    """Record what enters the decoder from outside.

    Embeddings enter before the first layer; Qwen3-VL adds picture features between later layers too, which shows
    in that a layer's input is not the output of the one before.

    Yields:
        A dictionary that fills up during a pass: the number of a layer, from 0, and what entered before it, shape
        (rows, tokens, hidden).
    """
    entries: dict[int, Tensor] = {}
    last_output: list[Tensor] = []

    def before(layer: Any, arguments: tuple[Any, ...]) -> None:
        hidden = arguments[0]
        if not last_output:
            entries[numbers[layer]] = hidden.detach().clone()  # a layer may write over its input
        elif hidden is not last_output[0]:
            entries[numbers[layer]] = (hidden - last_output[0]).detach()

    def after(_: Any, __: tuple[Any, ...], output: Tensor) -> None:
        last_output[:] = [output]

    numbers = {layer: number for number, layer in enumerate(layers)}
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield entries
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced_entries(layers: Any, entries: Mapping[int, Tensor]) -> Iterator[None]:
    """Let something else enter the decoder in a pass without pixels: what `recorded_entries` recorded, or like it."""

    def entering(number: int, entry: Tensor) -> Any:
        def before(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (entry if number == 0 else arguments[0] + entry, *arguments[1:])

        return before

    hooks = [layers[number].register_forward_pre_hook(entering(number, entry)) for number, entry in entries.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recorded_experts(layers: Any) -> Iterator[dict[int, Tensor]]:
    """Record which experts the tokens of a pass have.

    Yields:
        A dictionary that fills up during a pass: the number of a layer with experts, from 0, and the numbers of the
        experts of each token, shape (tokens, experts per token).
    """
    chosen: dict[int, Tensor] = {}

    def recording(number: int) -> Any:
        def after(_: Any, __: Any, output: tuple[Tensor, ...]) -> None:
            chosen[number] = output[-1]

        return after

    hooks = [router.register_forward_hook(recording(number)) for number, router in _routers(layers).items()]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def kept_experts(layers: Any, chosen: Mapping[int, Tensor]) -> Iterator[None]:
    """Let tokens have the experts that `recorded_experts` recorded, weighted as the router weighs these now."""

    def keeping(experts: Tensor) -> Any:
        def after(router: Any, arguments: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            logits = torch.nn.functional.linear(arguments[0].flatten(end_dim=-2), router.weight)
            weights = logits.gather(-1, experts).softmax(-1, dtype=torch.float32)  # what the best have of all, as 1
            return (*output[:-2], weights.to(logits.dtype), experts)

        return after

    routers = _routers(layers)
    hooks = [routers[number].register_forward_hook(keeping(experts)) for number, experts in chosen.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _routers(layers: Any) -> dict[int, Any]:
    """Return the router of each layer with experts, by the layer's number from 0."""
    return {number: layer.mlp.gate for number, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}
