"""transformers' own forward pass, one example at a time, pooled by hand: what features are held to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qwen_vl_classifier import Example, Tap
from qwen_vl_classifier.backbone.processor import Processor
from tests import nano

TOLERANCE = 1e-5  # of the largest entry of a feature, in float32
# Sums of linear attention in float32 go chunk by chunk, and tokens of a packed row lie on another grid of chunks.
HYBRID_TOLERANCE = 5e-5
NEARLY_TIED = 2e-4  # logits of two experts; those of two computations were seen to differ by 3e-5


def load_reference(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load transformers' own model, without its language head."""
    return nano.reference_class(family).from_pretrained(folder, dtype=dtype).eval().model


def by_hand(model: nn.Module, processor: Processor, examples: Sequence[Example], taps: Sequence[Tap]) -> np.ndarray:
    """Run transformers' own model on one example at a time and pool token by token, in double precision."""
    return np.stack([_pooled(model, processor, example, taps) for example in examples])


def by_hand_where_routing_is_clear(
    model: nn.Module, processor: Processor, examples: Sequence[Example], taps: Sequence[Tap]
) -> tuple[np.ndarray, np.ndarray]:
    """Do as `by_hand`, and tell for which examples no token is nearly tied between two experts.

    Where the last expert that a token is sent to and the first that it is not differ by no more than rounding, any two
    computations may send it to different ones, transformers' own of one example and of several too.
    """
    margins: list[float] = []

    def record(router: nn.Module, _: tuple, output: tuple) -> None:
        best = output[0].topk(router.top_k + 1, dim=-1).values
        margins.append(float((best[:, -2] - best[:, -1]).min()))

    layers = model.language_model.layers
    routers = [layer.mlp.gate for layer in layers if hasattr(layer.mlp, "experts")]
    hooks = [router.register_forward_hook(record) for router in routers]
    features = by_hand(model, processor, examples, taps)
    for hook in hooks:
        hook.remove()
    clear = np.array(margins).reshape(len(examples), len(routers)) > NEARLY_TIED
    return features, clear.all(axis=1)


def _pooled(model: nn.Module, processor: Processor, example: Example, taps: Sequence[Tap]) -> np.ndarray:
    inputs = processor([example])
    last_layer: list[torch.Tensor] = []  # transformers keeps it after the final norm only
    entries: list[torch.Tensor] = []  # of each layer, what was added behind the one before included
    layers = model.language_model.layers
    hooks = [layers[-1].register_forward_hook(lambda *call: last_layer.append(call[-1]))]
    hooks += [layer.register_forward_pre_hook(lambda _, given: entries.append(given[0])) for layer in layers]
    with torch.no_grad():
        result = model(**inputs, output_hidden_states=True)
        ends = [*map(model.language_model.norm, entries[1:]), result.last_hidden_state]  # of models that end earlier
    for hook in hooks:
        hook.remove()
    outputs = [*result.hidden_states[:-1], *last_layer, result.last_hidden_state]  # -1 is the last one
    ids = inputs["input_ids"][0].tolist()
    start, end = processor.text_span(ids)
    chosen = {
        "mean": range(len(ids)),
        "image": [i for i, token in enumerate(ids) if token == processor.image_token_id],
        "text": range(start, end),
        "last": [len(ids) - 1],
    }
    row = []
    for tap in taps:
        states = (ends[tap.layer - 1] if tap.normed else outputs[tap.layer])[0].double()
        picked = [states[i] for i in chosen[tap.pooling]]
        row.append(torch.stack(picked).mean(dim=0) if picked else torch.zeros(states.shape[-1]).double())
    return torch.stack(row).numpy()


def tolerance_of(family: str) -> float:
    """Return how near features of a family in float32 must be to transformers' own."""
    return HYBRID_TOLERANCE if family in nano.HYBRID else TOLERANCE


def assert_close(seen: np.ndarray, wanted: np.ndarray, *, tolerance: float = TOLERANCE) -> None:
    """Hold every feature, along the last axis, to a tolerance, as a fraction of its own largest entry."""
    assert seen.shape == wanted.shape
    difference = np.abs(seen - wanted).max(axis=-1)
    scale = np.abs(wanted).max(axis=-1)
    assert (difference <= tolerance * scale).all(), f"{(difference / np.maximum(scale, 1e-30)).max():.1e} of the scale"


def cosine_distance(seen: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return 1 - cosine of every pair of features, and 0 where both are zeros."""
    lengths = np.linalg.norm(seen, axis=-1) * np.linalg.norm(wanted, axis=-1)
    both_empty = ~seen.any(axis=-1) & ~wanted.any(axis=-1)
    products = (seen.astype(np.float64) * wanted).sum(axis=-1)
    return np.where(both_empty, 0.0, 1.0 - products / np.maximum(lengths, 1e-30))
