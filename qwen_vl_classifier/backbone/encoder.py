"""Run packed batches through the model, and pool hidden states at every tap on the way.

The decoder runs layer by layer, no further than the highest tap.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.devices import aligned, memory_advice, release_memory, state_tokens
from qwen_vl_classifier.backbone.layers.kinds import kind_of, masked_part, masks_for, need_rows
from qwen_vl_classifier.backbone.layers.row_plan import Strip, strip_of
from qwen_vl_classifier.backbone.layers.sequences import PADDING, PREFIX
from qwen_vl_classifier.backbone.layers.transfer import to_device
from qwen_vl_classifier.backbone.layers.vision_plan import Grid, plan_vision
from qwen_vl_classifier.backbone.packing import PackedBatch, pack
from qwen_vl_classifier.backbone.pixels import PictureTokens
from qwen_vl_classifier.backbone.planning import plan
from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.backbone.taps import LAST_NORM, Depth, Pooling, Tap, pooling_weights
from qwen_vl_classifier.errors import OutOfMemoryError

TokensOf: TypeAlias = Callable[[PackedBatch, Sequence[EncodedExample]], PictureTokens | None]
"""Gives the tokens of the distinct pictures of a batch, in their order, from its examples; `None` without pictures."""

_PATCHES_AT_ONCE = 1408  # in the vision tower on CPUs, in float32: what a layer reads and writes stays in caches


@dataclass(frozen=True, slots=True)
class _BesideStates:
    """What layers take beside the hidden states, on the same device.

    Attributes:
        masks: By kind of layer.
        rotary: Cosine and sine of the positions.
        image_places: Where image tokens lie in the flattened hidden states, int64 of shape (image tokens,).
        levels: As in `PictureTokens`.
        strip: The rows without padding, if that is what the layers take.
    """

    masks: dict[str, Any]
    rotary: tuple[Tensor, Tensor]
    image_places: Tensor
    levels: tuple[Tensor, ...]
    strip: Strip | None


def hidden_states(
    model: nn.Module, batch: PackedBatch, depths: Collection[Depth], pictures: PictureTokens | None = None
) -> Iterator[tuple[Depth, Tensor]]:
    """Run the model up to the highest of some layers, and yield the hidden states after each of them.

    The host reads nothing back on the way, so it can prepare what follows while a GPU computes.

    Args:
        model: A transformers Qwen-VL model without language head.
        batch: The packed examples.
        depths: Where to read.
        pictures: What `picture_tokens` gave for this batch, or for the same pictures before; `None` runs the tower.

    Yields:
        (depth, hidden states of shape (rows, length, hidden)), layer by layer, -1 last. After the norm they include
        what the vision tower adds behind that layer, since a model that ended there would add it too.
    """
    decoder: Any = model.language_model
    embeddings = decoder.embed_tokens(batch.input_ids)
    if pictures is None and batch.pixel_values is not None:
        pictures = picture_tokens(model, batch.pixel_values, batch.grids)
    levels: tuple[Tensor, ...] = ()
    if pictures is not None:
        pictures = _in_order_of_rows(pictures, batch, _merge_size(model))
        flat = embeddings.flatten(0, 1).index_copy(0, batch.image_places, pictures.tokens.to(embeddings.dtype))
        embeddings = flat.view(embeddings.shape)
        levels = pictures.levels
    hidden, positions, places, segments = embeddings, batch.position_ids, batch.image_places, batch.segments
    layers = [layer for layer, _ in depths]
    deepest = len(decoder.layers) if LAST_NORM in layers else max(layers)
    strip = to_device(_strip_of(decoder.layers[:deepest], batch, hidden), hidden.device)
    if strip is not None:
        hidden, segments = strip.take(hidden), strip.segments
        positions = strip.take(positions.permute(1, 2, 0)).permute(2, 0, 1)
        places = strip.order.index_select(0, places)
    rotary = decoder.rotary_emb(hidden, positions)
    beside = _BesideStates(masks_for(decoder.layers[:deepest], segments, hidden), rotary, places, levels, strip)
    for number, layer in enumerate(decoder.layers[:deepest], start=1):
        device = next(layer.parameters()).device
        if device != hidden.device:  # layers may be spread over several
            hidden, beside = to_device((hidden, beside), device)
        mask = beside.masks[kind_of(layer)]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=beside.rotary, use_cache=False)
        if (number, False) in depths:
            yield (number, False), _in_rows(hidden, beside.strip)
        if number <= len(levels):
            level = beside.levels[number - 1].to(hidden.dtype)
            hidden = hidden.flatten(0, 1).index_add(0, beside.image_places, level).view(hidden.shape)
        if (number, True) in depths:
            states, strip = to_device((hidden, beside.strip), decoder.norm.weight.device)
            yield (number, True), _in_rows(decoder.norm(states), strip)
    if LAST_NORM in layers:
        yield (LAST_NORM, False), _in_rows(decoder.norm(hidden), beside.strip)


def _strip_of(layers: Sequence[nn.Module], batch: PackedBatch, states: Tensor) -> Strip | None:
    """Leave padding out of a batch where no layer needs rows."""
    if need_rows(layers, states):
        return None
    if batch.segments is not None:
        return strip_of(np.array(batch.segments))
    ends = [max(end for _, end in (*spans.tokens, *spans.image, spans.text)) for (spans,) in batch.spans]
    columns = np.arange(batch.input_ids.shape[1])
    return strip_of(np.where(columns < np.array(ends)[:, None], PREFIX, PADDING))


def _in_rows(hidden: Tensor, strip: Strip | None) -> Tensor:
    return hidden if strip is None else strip.put(hidden)


def picture_tokens(model: nn.Module, patches: Tensor, grids: Sequence[Grid]) -> PictureTokens:
    """Run the vision tower on pictures, in their order.

    Args:
        model: A transformers Qwen-VL model without language head.
        patches: Their patches, one picture after the other, on the model's device.
        grids: Time, height and width of each in patches.
    """
    # A tower that does not train needs no graph, which under gradient checkpointing would be built all the same.
    with torch.set_grad_enabled(torch.is_grad_enabled() and vision_trains(model)):
        visual: Any = model.visual
        sizes = [math.prod(grid) for grid in grids]
        parts: list[PictureTokens] = []
        number, start = 0, 0
        for count in _picture_groups(sizes, _patches_at_once(model, patches)):
            end = start + sum(sizes[number : number + count])
            plan = plan_vision(visual, grids[number : number + count]).to(patches.device)
            seen = visual(patches[start:end].to(visual.dtype), **plan.arguments(), return_dict=True)
            parts.append(PictureTokens(seen.pooler_output, tuple(getattr(seen, "deepstack_features", None) or ())))
            number, start = number + count, end
        return PictureTokens.joined(parts)


def _merge_size(model: Any) -> int:
    return int(model.visual.spatial_merge_size)


def _in_order_of_rows(pictures: PictureTokens, batch: PackedBatch, merge_size: int) -> PictureTokens:
    """Repeat and reorder the tokens of distinct pictures as the rows need them."""
    if batch.image_order == tuple(range(len(batch.grids))):
        return pictures
    ends = np.cumsum([0, *(math.prod(grid) // merge_size**2 for grid in batch.grids)])
    places = np.concatenate([np.arange(ends[picture], ends[picture + 1]) for picture in batch.image_order])
    return pictures.select(to_device(torch.from_numpy(places), pictures.tokens.device))


def vision_trains(model: nn.Module) -> bool:
    """Tell whether any weight of the vision tower trains."""
    return any(parameter.requires_grad for parameter in model.visual.parameters())  # type: ignore[union-attr]


def _patches_at_once(model: nn.Module, patches: Tensor) -> int:
    """Return how many patches to run through the vision tower together: all, but on CPUs what stays in their caches."""
    if patches.device.type != "cpu":
        return len(patches)
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
    tokens_of: TokensOf | None = None,
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
        tokens_of: Gives the tokens of pictures; `None` runs the vision tower in each pass.

    Returns:
        float32 of shape (examples, taps, hidden), and the budget that fitted in the end.

    Raises:
        OutOfMemoryError: A single example does not fit.
    """
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    config: Any = model.config
    hidden_size: int = config.get_text_config().hidden_size
    layers: Any = model.language_model.layers  # type: ignore[union-attr]
    embeddings: Any = model.language_model.embed_tokens.weight  # type: ignore[union-attr]
    planned = partial(
        plan,
        share_prefixes=share_prefixes,
        hidden_size=hidden_size,
        attention=masked_part(layers, embeddings),
        padded=need_rows(layers, embeddings),
        state_tokens=state_tokens(config, dtype),
    )
    rows: dict[bytes, list[int]] = {}
    for number, example in enumerate(prepared):
        rows.setdefault(example.key, []).append(number)
    left = [(prepared[numbers[0]], numbers) for numbers in rows.values()]
    features = np.empty((len(prepared), len(taps), hidden_size), dtype=np.float32)
    running: deque[tuple[list[list[int]], _ReadBack]] = deque()  # batches that the device may still compute
    while left:
        examples = [example for example, _ in left]
        done: set[int] = set()
        for batch in planned(examples, token_budget=token_budget):
            indices = [index for row in batch for index in row]
            try:
                with memory_advice(f"encoding {len(indices)} examples"):
                    packed = pack(processor, examples, batch, device, dtype, with_pixels=tokens_of is None)
                    pictures = tokens_of and tokens_of(packed, [examples[index] for index in indices])
                    pooled = pooled_states(model, packed, taps, pictures)
                    running.append(([left[index][1] for index in indices], _ReadBack(pooled)))
            except OutOfMemoryError:
                if len(indices) == 1:
                    raise
            else:
                if len(running) > 1:
                    _keep(features, *running.popleft())
                done.update(indices)
                continue
            # Outside of the handler: the error keeps what was computed so far alive.
            release_memory(device)
            # The tokens of this batch with a row for each example: at least as many as it had.
            tokens = max(sum(len(examples[index].ids) for index in row) for row in batch) * len(batch)
            token_budget = max(1, min(token_budget, tokens) // 2)
            break
        left = [entry for index, entry in enumerate(left) if index not in done]
    while running:
        _keep(features, *running.popleft())
    return features, token_budget


def _keep(features: npt.NDArray[np.float32], rows: Sequence[list[int]], pooled: _ReadBack) -> None:
    """Write the features of a batch into the rows of its examples."""
    for numbers, feature in zip(rows, pooled.wait(), strict=True):
        features[numbers] = feature


class _ReadBack:
    """A result on its way to the host, while a GPU computes the next batch.

    Args:
        result: On any device.
    """

    def __init__(self, result: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if result.device.type == "cuda":
            self._host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            self._host.copy_(result, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(result.device))
        else:
            self._host = result.cpu()

    def wait(self) -> npt.NDArray[np.float32]:
        """Wait for the result and return it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.numpy()


def pooled_states(
    model: nn.Module, batch: PackedBatch, taps: Sequence[Tap], pictures: PictureTokens | None = None
) -> Tensor:
    """Run one batch and pool it at every tap; arguments are those of `hidden_states`.

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
        weights[pooling] = aligned(stacked)
    present = torch.from_numpy(np.flatnonzero(np.arange(max(counts)) < np.array(counts)[:, None]))
    first = batch.input_ids.device
    weights, present = to_device((weights, present), first)
    pooled: dict[Tap, Tensor] = {}
    for depth, hidden in hidden_states(model, batch, {tap.depth for tap in taps}, pictures):
        weights, present = to_device((weights, present), hidden.device)
        hidden = hidden.float()
        for tap in taps:
            if tap.depth == depth:
                with torch.autocast(hidden.device.type, enabled=False):
                    mean = torch.bmm(weights[tap.pooling], hidden).flatten(0, 1).index_select(0, present)
                pooled[tap] = mean.to(first)
    return torch.stack([pooled[tap] for tap in taps], dim=1)
