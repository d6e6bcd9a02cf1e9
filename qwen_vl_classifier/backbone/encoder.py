"""Run packed batches through the model, and pool hidden states at every tap on the way.

The decoder runs layer by layer, no further than the highest tap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.devices import aligned, memory_advice, release_memory, state_tokens
from qwen_vl_classifier.backbone.layers.kinds import FULL, kind_of, masks_for
from qwen_vl_classifier.backbone.packing import PackedBatch, pack
from qwen_vl_classifier.backbone.planning import plan
from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.backbone.taps import LAST_NORM, Pooling, Tap, pooling_weights
from qwen_vl_classifier.errors import OutOfMemoryError

_PATCHES_AT_ONCE = 1408  # in the vision tower on CPUs, in float32: what a layer reads and writes stays in caches


def hidden_states(model: nn.Module, batch: PackedBatch, layers: set[int]) -> Iterator[tuple[int, Tensor]]:
    """Run the model up to the highest of some layers, and yield the hidden states after each of them.

    Args:
        model: A transformers Qwen-VL model without language head.
        batch: The packed examples.
        layers: The layers to read, numbered as in `Tap`.

    Yields:
        (layer, hidden states of shape (rows, length, hidden)), in order of depth, -1 last.
    """
    decoder: Any = model.language_model
    embeddings = decoder.embed_tokens(batch.input_ids)
    deepstack: Sequence[Tensor] = ()
    image_mask = None
    if batch.pixel_values is not None:
        # A tower that does not train needs no graph, which under gradient checkpointing would be built all the same.
        with torch.set_grad_enabled(torch.is_grad_enabled() and _vision_trains(model)):
            pictures, levels = _picture_features(model, batch)
        image_mask = batch.input_ids.eq(model.config.image_token_id)  # type: ignore[union-attr,arg-type]
        tokens = torch.cat([pictures[index] for index in batch.image_order])
        embeddings = embeddings.masked_scatter(image_mask.unsqueeze(-1), tokens.to(embeddings.dtype))
        # Qwen3-VL adds features of earlier vision layers to its first decoder layers (arXiv:2406.04334).
        deepstack = [torch.cat([level[index] for index in batch.image_order]) for level in levels]
    rotary = decoder.rotary_emb(embeddings, batch.position_ids)
    hidden = embeddings
    depth = len(decoder.layers) if LAST_NORM in layers else max(layers)
    masks = masks_for(decoder.layers[:depth], batch.segments, hidden)
    for number, layer in enumerate(decoder.layers[:depth], start=1):
        mask = masks[kind_of(layer)]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, use_cache=False)
        if number in layers:
            yield number, hidden
        if number <= len(deepstack):
            assert image_mask is not None
            addition = torch.zeros_like(hidden)
            addition[image_mask] = deepstack[number - 1].to(hidden.dtype)
            hidden = hidden + addition
    if LAST_NORM in layers:
        yield LAST_NORM, decoder.norm(hidden)


def _vision_trains(model: nn.Module) -> bool:
    """Tell whether any weight of the vision tower trains."""
    return any(parameter.requires_grad for parameter in model.visual.parameters())  # type: ignore[union-attr]


def _picture_features(model: nn.Module, batch: PackedBatch) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Run the vision tower: image tokens of each picture, and features of earlier layers by layer and picture."""
    assert batch.pixel_values is not None
    assert batch.image_grid_thw is not None
    sizes = batch.image_grid_thw.prod(dim=1).tolist()
    pictures: list[Tensor] = []
    levels: list[list[Tensor]] = []
    number, patch = 0, 0
    for count in _picture_groups(sizes, _patches_at_once(model, batch.pixel_values)):
        patches = sum(sizes[number : number + count])
        vision = model.get_image_features(  # type: ignore[operator]
            batch.pixel_values[patch : patch + patches],
            batch.image_grid_thw[number : number + count],
            return_dict=True,
        )
        pictures += vision.pooler_output
        features = getattr(vision, "deepstack_features", None) or ()
        tokens = [len(picture) for picture in vision.pooler_output]  # transformers 5.17 leaves these features in one
        features = [torch.split(level, tokens) if isinstance(level, Tensor) else level for level in features]
        levels = [[*before, *new] for before, new in zip(levels or [[] for _ in features], features, strict=True)]
        number, patch = number + count, patch + patches
    return pictures, levels


def _patches_at_once(model: nn.Module, pixel_values: Tensor) -> int:
    """Return how many patches to run through the vision tower together: all, but on CPUs what stays in their caches."""
    if pixel_values.device.type != "cpu":
        return len(pixel_values)
    return _PATCHES_AT_ONCE * torch.float32.itemsize // next(model.parameters()).dtype.itemsize


def _picture_groups(sizes: Sequence[int], most: int) -> list[int]:
    """Split pictures, in order, into groups of a bounded number of patches; a larger picture is its own group.

    Args:
        sizes: Patches of each picture.
        most: Most patches in a group.

    Returns:
        The number of pictures in each group.
    """
    groups: list[int] = []
    held = most
    for size in sizes:
        if held + size > most:
            groups.append(0)
            held = 0
        groups[-1] += 1
        held += size
    return groups


def encode_in_batches(
    model: nn.Module,
    processor: Processor,
    prepared: Sequence[EncodedExample],
    taps: Sequence[Tap],
    *,
    token_budget: int,
    share_prefixes: bool,
) -> tuple[npt.NDArray[np.float32], int]:
    """Read features of examples, in as many passes as memory requires.

    A batch that does not fit halves the budget for the examples that are left. Finished batches are kept.

    Args:
        model: A model without language head.
        processor: Its processor.
        prepared: The examples; the same example given twice is encoded once.
        taps: Where to read.
        token_budget: Most tokens in one batch, padding included.
        share_prefixes: Encode a picture once for all examples of the same picture.

    Returns:
        float32 of shape (examples, taps, hidden), and the budget that fitted in the end.

    Raises:
        OutOfMemoryError: A single example does not fit.
    """
    device = next(model.parameters()).device
    config: Any = model.config
    hidden_size: int = config.get_text_config().hidden_size
    layers: Any = model.language_model.layers  # type: ignore[union-attr]
    with_attention = sum(kind_of(layer) == FULL for layer in layers)
    planned = partial(
        plan,
        share_prefixes=share_prefixes,
        hidden_size=hidden_size,
        attention=max(1, with_attention) / len(layers),
        state_tokens=state_tokens(config, next(model.parameters()).dtype),
    )
    rows: dict[bytes, list[int]] = {}
    for number, example in enumerate(prepared):
        rows.setdefault(example.key, []).append(number)
    left = [(prepared[numbers[0]], numbers) for numbers in rows.values()]
    features = np.empty((len(prepared), len(taps), hidden_size), dtype=np.float32)
    while left:
        examples = [example for example, _ in left]
        done: set[int] = set()
        for batch in planned(examples, token_budget=token_budget):
            indices = [index for row in batch for index in row]
            try:
                with memory_advice(f"encoding {len(indices)} examples"):
                    pooled = pooled_states(model, pack(processor, examples, batch, device), taps).cpu().numpy()
            except OutOfMemoryError:
                if len(indices) == 1:
                    raise
            else:
                for index, feature in zip(indices, pooled, strict=True):
                    features[left[index][1]] = feature
                done.update(indices)
                continue
            # Outside of the handler: the error keeps what was computed so far alive.
            release_memory(device)
            # The tokens of this batch with a row for each example: at least as many as it had.
            tokens = max(sum(len(examples[index].ids) for index in row) for row in batch) * len(batch)
            token_budget = max(1, min(token_budget, tokens) // 2)
            break
        left = [entry for index, entry in enumerate(left) if index not in done]
    return features, token_budget


def pooled_states(model: nn.Module, batch: PackedBatch, taps: Sequence[Tap]) -> Tensor:
    """Run one batch and pool it at every tap.

    Returns:
        float32, shape (examples in the order of the rows, taps, hidden); differentiable where gradients are on.
    """
    length = batch.input_ids.shape[1]
    # One block-diagonal matrix would waste most of its products on zeros; rows are padded to the most examples.
    counts = [len(row) for row in batch.spans]
    weights: dict[Pooling, Tensor] = {}
    for pooling in {tap.pooling for tap in taps}:
        stacked = np.zeros((len(counts), max(counts), length), dtype=np.float32)
        for row, spans in enumerate(batch.spans):
            stacked[row, : len(spans)] = pooling_weights(spans, pooling, length)
        weights[pooling] = aligned(stacked).to(batch.input_ids.device)
    present = torch.zeros(len(counts), max(counts), dtype=torch.bool)
    for row, count in enumerate(counts):
        present[row, :count] = True
    pooled: dict[Tap, Tensor] = {}
    for layer, hidden in hidden_states(model, batch, {tap.layer for tap in taps}):
        hidden = hidden.float()
        for tap in taps:
            if tap.layer == layer:
                with torch.autocast(hidden.device.type, enabled=False):
                    pooled[tap] = torch.bmm(weights[tap.pooling], hidden)[present.to(hidden.device)]
    return torch.stack([pooled[tap] for tap in taps], dim=1)
