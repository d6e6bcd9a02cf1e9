"""One pass through the model, every wanted tap pooled on the way.

Rows are packed (prefix, then suffixes), positions follow the multimodal rotary scheme of the Qwen-VL papers
(arXiv:2409.12191, section 2.1), and the decoder runs layer by layer no further than the highest tap. Nothing here
depends on state that transformers caches on the module, such as `rope_deltas`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.attention import PADDING, PREFIX, packed_mask
from qwen_vl_classifier.backbone.devices import aligned
from qwen_vl_classifier.backbone.planning import Batch
from qwen_vl_classifier.backbone.processor import EncodedExample, Pictures
from qwen_vl_classifier.backbone.taps import LAST_NORM, Pooling, Spans, Tap, pooling_weights

IMAGE_POSITION_AXES = 3  # time, height, width
_PATCHES_AT_ONCE = 1408  # in the vision tower on CPUs, in float32: what a layer reads and writes stays in caches


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows ready for the model.

    Attributes:
        input_ids: int64, shape (rows, length).
        position_ids: int64, shape (3, rows, length): time, height and width.
        mask: Boolean, shape (rows, 1, length, length), or `None` where plain causal attention is the same.
        pixel_values: Patches of the distinct pictures, one after the other, or `None`.
        image_grid_thw: int64, shape (distinct pictures, 3), or `None`.
        image_order: For each picture in the rows, in order, its index among the distinct ones.
        spans: For each row, the spans of its examples.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor | None
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    image_order: tuple[int, ...]
    spans: tuple[tuple[Spans, ...], ...]


def positions(
    image_flags: Sequence[bool], grids: Sequence[tuple[int, int, int]], merge_size: int, start: int = 0
) -> tuple[npt.NDArray[np.int64], int]:
    """Compute rotary positions of one sequence of tokens.

    Text counts on along all three axes; a picture's tokens keep the count as their time and add their row and
    column; after a picture the count goes on behind its longer side.

    Args:
        image_flags: For each token, whether it is an image token.
        grids: (time, height, width) in patches for each picture, in order.
        merge_size: Side of the square of patches that makes one token.
        start: Position of the first token.

    Returns:
        Positions of shape (3, tokens), and the position at which a following token would go on.
    """
    parts = []
    position, index, pictures = start, 0, iter(grids)
    while index < len(image_flags):
        if image_flags[index]:
            time, height, width = next(pictures)
            height, width = height // merge_size, width // merge_size
            parts.append(np.indices((time, height, width)).reshape(IMAGE_POSITION_AXES, -1) + position)
            index += time * height * width
            position += max(height, width)
        else:
            end = index
            while end < len(image_flags) and not image_flags[end]:
                end += 1
            parts.append(np.tile(np.arange(position, position + end - index), (IMAGE_POSITION_AXES, 1)))
            position += end - index
            index = end
    joined = np.concatenate(parts, axis=1) if parts else np.zeros((IMAGE_POSITION_AXES, 0))
    return joined.astype(np.int64), position


def pack(
    encoded: Sequence[EncodedExample],
    batch: Batch,
    *,
    image_token_id: int,
    pad_token_id: int,
    merge_size: int,
    device: torch.device,
) -> PackedBatch:
    """Lay the examples of one batch out in rows, padded on the right."""
    rows = [_lay_out([encoded[index] for index in row], image_token_id, merge_size) for row in batch]
    length = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    position_ids = torch.zeros(IMAGE_POSITION_AXES, len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.ids)] = torch.tensor(row.ids)
        position_ids[:, number, : len(row.ids)] = torch.from_numpy(row.positions)
    mask = None
    # Without sharing, padding on the right is never seen under plain causal attention: no mask is needed.
    if any(len(row) > 1 for row in batch):
        mask = packed_mask([row.segments + [PADDING] * (length - len(row.ids)) for row in rows], device)
    pixel_values, grids, order = _distinct_pictures([encoded[row[0]].pictures for row in batch])
    return PackedBatch(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        mask=mask,
        pixel_values=None if pixel_values is None else aligned(pixel_values).to(device),
        image_grid_thw=torch.tensor(grids, device=device) if grids else None,
        image_order=order,
        spans=tuple(row.spans for row in rows),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    ids: list[int]
    segments: list[int]
    positions: npt.NDArray[np.int64]
    spans: tuple[Spans, ...]


def _lay_out(examples: Sequence[EncodedExample], image_token_id: int, merge_size: int) -> _Row:
    """Lay out one row: the prefix that all its examples share, then the suffix of each."""
    prefix = examples[0].prefix_length
    ids = examples[0].ids[:prefix]
    segments = [PREFIX] * prefix
    flags = [token == image_token_id for token in ids]
    prefix_positions, after = positions(flags, examples[0].pictures.grids, merge_size)
    parts = [prefix_positions]
    spans = []
    for segment, example in enumerate(examples, start=1):
        suffix = example.ids[prefix:]
        shift = len(ids) - prefix
        start, end = example.spans.text
        tokens = ((0, prefix), (len(ids), len(ids) + len(suffix)))
        spans.append(replace(example.spans, tokens=tokens, text=(start + shift, end + shift)))
        ids = ids + suffix
        segments += [segment] * len(suffix)
        parts.append(positions([False] * len(suffix), (), merge_size, start=after)[0])
    return _Row(ids, segments, np.concatenate(parts, axis=1), tuple(spans))


def _distinct_pictures(
    rows: Sequence[Pictures],
) -> tuple[npt.NDArray[np.float32] | None, list[tuple[int, int, int]], tuple[int, ...]]:
    """Gather the pictures of several rows, each once: their patches, their grids, and which one comes where."""
    numbers: dict[tuple[bytes, int], int] = {}
    patches: list[npt.NDArray[np.float32]] = []
    grids: list[tuple[int, int, int]] = []
    order = []
    for pictures in rows:
        start = 0
        for position, grid in enumerate(pictures.grids):
            end = start + math.prod(grid)
            number = numbers.setdefault((pictures.key, position), len(grids))
            if number == len(grids):
                patches.append(pictures.pixel_values[start:end])
                grids.append(grid)
            order.append(number)
            start = end
    return (np.concatenate(patches) if patches else None), grids, tuple(order)


def pack_tensors(
    inputs: Mapping[str, Tensor],
    text_spans: Sequence[tuple[int, int]],
    *,
    image_token_id: int,
    merge_size: int,
) -> PackedBatch:
    """Take a batch as transformers has it, padded on either side, one example in a row.

    Args:
        inputs: `input_ids`, `attention_mask`, and `pixel_values` with `image_grid_thw` where there are pictures,
            all on the model's device.
        text_spans: For each row, where the user's text lies among the unpadded tokens.
        image_token_id: The id of an image token.
        merge_size: Side of the square of patches that makes one token.
    """
    input_ids = inputs["input_ids"]
    attended = inputs["attention_mask"].bool().cpu().numpy()
    flags = (input_ids == image_token_id).cpu().numpy()
    grid_tensor = inputs.get("image_grid_thw")
    grids: list[tuple[int, int, int]] = grid_tensor.tolist() if grid_tensor is not None else []
    position_ids = torch.zeros(IMAGE_POSITION_AXES, *input_ids.shape, dtype=torch.long)
    spans, used = [], 0
    for row, (text_start, text_end) in enumerate(text_spans):
        columns = np.flatnonzero(attended[row])
        row_flags = flags[row, columns]
        runs = _runs(row_flags)
        row_grids = _take_grids(grids, used, int(row_flags.sum()), merge_size)
        used += len(row_grids)
        row_positions, _ = positions(row_flags.tolist(), row_grids, merge_size)
        position_ids[:, row, torch.from_numpy(columns)] = torch.from_numpy(row_positions)
        offset = int(columns[0])
        spans.append(
            (
                Spans(
                    tokens=((offset, offset + len(columns)),),
                    image=tuple((start + offset, end + offset) for start, end in runs),
                    text=(text_start + offset, text_end + offset),
                ),
            )
        )
    mask = None
    if not attended[:, 0].all():  # padding on the left is seen under plain causal attention
        mask = packed_mask(np.where(attended, PREFIX, PADDING).tolist(), input_ids.device)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids.to(input_ids.device),
        mask=mask,
        pixel_values=inputs.get("pixel_values"),
        image_grid_thw=grid_tensor,
        image_order=tuple(range(len(grids))),
        spans=tuple(spans),
    )


def hidden_states(model: nn.Module, batch: PackedBatch, layers: set[int]) -> Iterator[tuple[int, Tensor]]:
    """Run the model no further than the highest wanted layer and yield hidden states on the way.

    Args:
        model: A transformers Qwen-VL model without language head.
        batch: What to run.
        layers: Wanted layers, numbered as in `Tap`.

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
    for number, layer in enumerate(decoder.layers[:depth], start=1):
        hidden = layer(hidden, attention_mask=batch.mask, position_embeddings=rotary, use_cache=False)
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
    """Part pictures, in order, into groups of at most so many patches; a larger picture is a group of its own.

    Args:
        sizes: Patches of each picture.
        most: In a group.

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


def _runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the half-open ranges in which flags are true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _take_grids(
    grids: Sequence[tuple[int, int, int]], start: int, tokens: int, merge_size: int
) -> list[tuple[int, int, int]]:
    """Return the next grids that together have this many tokens."""
    taken: list[tuple[int, int, int]] = []
    while tokens > 0:
        grid = grids[start + len(taken)]
        taken.append(grid)
        tokens -= math.prod(grid) // merge_size**2
    return taken
