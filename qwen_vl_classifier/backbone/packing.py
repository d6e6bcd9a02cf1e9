"""Pack examples into one batch of rows: token ids, rotary positions, segments and the distinct pictures.

A row is a prefix followed by the suffixes that share it. Positions follow the multimodal rotary scheme of the Qwen-VL
papers (arXiv:2409.12191, section 2.1). Nothing here depends on state that transformers caches on the module, such as
`rope_deltas`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_vl_classifier.backbone.layers.sequences import PADDING, PREFIX
from qwen_vl_classifier.backbone.layers.transfer import to_device
from qwen_vl_classifier.backbone.layers.vision_plan import Grid
from qwen_vl_classifier.backbone.pixels import Pictures, Pixels
from qwen_vl_classifier.backbone.planning import PlannedBatch, plan
from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.backbone.taps import Spans

_AXES = 3  # of a position: time, height, width


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows ready for the model.

    Attributes:
        input_ids: int64, shape (rows, length).
        position_ids: int64, shape (3, rows, length): time, height and width.
        segments: For each row, the segment of each token: 0 for the prefix, 1, 2, ... for the suffixes, -1 for
            padding. `None` if every row is one sequence, padded on the right at most.
        pixel_values: Patches of the distinct pictures, one after the other, or `None`.
        grids: Time, height and width in patches of each distinct picture.
        digests: The digest of each distinct picture, where it is known.
        image_order: For each picture in the rows, in order, its index among the distinct ones.
        image_places: int64, shape (image tokens,): where they lie in the flattened rows.
        spans: For each row, the spans of its examples.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: list[list[int]] | None
    pixel_values: Tensor | None
    grids: tuple[Grid, ...]
    image_order: tuple[int, ...]
    image_places: Tensor
    spans: tuple[tuple[Spans, ...], ...]
    digests: tuple[bytes, ...] = ()


def positions(
    image_flags: Sequence[bool], grids: Sequence[Grid], merge_size: int, start: int = 0
) -> tuple[npt.NDArray[np.int64], int]:
    """Compute rotary positions of one sequence of tokens.

    Text advances along all three axes. A picture's tokens share one time and add their row and column. After a
    picture, counting continues behind its longer side.

    Args:
        image_flags: For each token, whether it is an image token.
        grids: (time, height, width) in patches for each picture, in order.
        merge_size: Side of the square of patches that makes one token.
        start: Position of the first token.

    Returns:
        Positions of shape (3, tokens), and the position of a token that would follow.
    """
    parts = []
    position, index, pictures = start, 0, iter(grids)
    while index < len(image_flags):
        if image_flags[index]:
            time, height, width = next(pictures)
            height, width = height // merge_size, width // merge_size
            parts.append(np.indices((time, height, width)).reshape(_AXES, -1) + position)
            index += time * height * width
            position += max(height, width)
        else:
            end = index
            while end < len(image_flags) and not image_flags[end]:
                end += 1
            parts.append(np.tile(np.arange(position, position + end - index), (_AXES, 1)))
            position += end - index
            index = end
    joined = np.concatenate(parts, axis=1) if parts else np.zeros((_AXES, 0))
    return joined.astype(np.int64), position


def pack(
    processor: Processor,
    examples: Sequence[EncodedExample],
    batch: PlannedBatch,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    with_pixels: bool = True,
) -> PackedBatch:
    """Lay the examples of a planned batch out in rows, padded on the right.

    Args:
        processor: The checkpoint's processor.
        examples: The examples that the plan's indices refer to.
        batch: The plan.
        device: The device of the result.
        dtype: Type of the patches: that of the vision tower saves a copy.
        with_pixels: Whether to make patches; false where the tokens of pictures come from elsewhere.
    """
    rows = [_lay_out([examples[index] for index in row], processor) for row in batch]
    length = max(len(row.ids) for row in rows)
    input_ids = np.full((len(rows), length), processor.pad_token_id, dtype=np.int64)
    position_ids = np.zeros((_AXES, len(rows), length), dtype=np.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.ids)] = row.ids
        position_ids[:, number, : len(row.ids)] = row.positions
    segments = None
    # Without sharing, no token sees padding on the right, which comes later: no layer needs a mask.
    if any(len(row) > 1 for row in batch):
        segments = [row.segments + [PADDING] * (length - len(row.ids)) for row in rows]
    pixels, grids, digests, order = _distinct_pictures([examples[row[0]].pictures for row in batch], with_pixels)
    places = np.flatnonzero(input_ids == processor.image_token_id)
    arrays = map(torch.from_numpy, (input_ids, position_ids, places, *pixels))
    ids_there, positions_there, places_there, *pixels_there = to_device(tuple(arrays), device)
    return PackedBatch(
        input_ids=ids_there,
        position_ids=positions_there,
        segments=segments,
        pixel_values=processor.patches(pixels_there, dtype) if pixels else None,
        grids=grids,
        image_order=order,
        image_places=places_there,
        spans=tuple(row.spans for row in rows),
        digests=digests,
    )


def pack_together(
    processor: Processor,
    examples: Sequence[EncodedExample],
    device: torch.device,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    with_pixels: bool = True,
) -> tuple[PackedBatch, list[int]]:
    """Lay all examples out as one batch, those of the same picture sharing rows: for training.

    Args:
        processor: The checkpoint's processor.
        examples: The examples.
        device: The device of the result.
        hidden_size: Width of the decoder.
        dtype: As in `pack`.
        with_pixels: As in `pack`.

    Returns:
        The batch, and for each example in it, in order, its index in `examples`.
    """
    (batch,) = plan(examples, token_budget=sys.maxsize, hidden_size=hidden_size)
    packed = pack(processor, examples, batch, device, dtype, with_pixels=with_pixels)
    return packed, [index for row in batch for index in row]


@dataclass(frozen=True, slots=True)
class _PackedRow:
    ids: list[int]
    segments: list[int]
    positions: npt.NDArray[np.int64]
    spans: tuple[Spans, ...]


def _lay_out(examples: Sequence[EncodedExample], processor: Processor) -> _PackedRow:
    """Lay out one row: the prefix that all its examples share, then the suffix of each."""
    prefix = examples[0].prefix_length
    ids = examples[0].ids[:prefix]
    segments = [PREFIX] * prefix
    flags = [token == processor.image_token_id for token in ids]
    prefix_positions, after = positions(flags, examples[0].pictures.grids, processor.merge_size)
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
        parts.append(positions([False] * len(suffix), (), processor.merge_size, start=after)[0])
    return _PackedRow(ids, segments, np.concatenate(parts, axis=1), tuple(spans))


def _distinct_pictures(
    rows: Sequence[Pictures], with_pixels: bool
) -> tuple[list[Pixels], tuple[Grid, ...], tuple[bytes, ...], tuple[int, ...]]:
    """Gather the pictures of several rows, each once: pixels, grids, digests, and which one comes where."""
    numbers: dict[bytes, int] = {}
    pixels: list[Pixels] = []
    grids: list[Grid] = []
    order = []
    for pictures in rows:
        for place, (grid, digest) in enumerate(zip(pictures.grids, pictures.digests, strict=True)):
            number = numbers.setdefault(digest, len(grids))
            if number == len(grids):
                grids.append(grid)
                if with_pixels:
                    pixels.append(pictures.pixels[place])
            order.append(number)
    return pixels, tuple(grids), tuple(numbers), tuple(order)


def pack_tensors(processor: Processor, inputs: Mapping[str, Tensor]) -> PackedBatch:
    """Take a batch as transformers has it, padded on either side, one example in a row.

    Args:
        processor: The checkpoint's processor.
        inputs: `input_ids`, `attention_mask`, and `pixel_values` with `image_grid_thw` where there are pictures,
            all on the model's device.
    """
    input_ids = inputs["input_ids"]
    token_ids = input_ids.cpu().numpy()
    attended = inputs["attention_mask"].bool().cpu().numpy()
    grid_tensor = inputs.get("image_grid_thw")
    grids: list[Grid] = [tuple(grid) for grid in grid_tensor.tolist()] if grid_tensor is not None else []
    position_ids = torch.zeros(_AXES, *input_ids.shape, dtype=torch.long)
    spans, used = [], 0
    for row, kept in enumerate(attended):
        columns = np.flatnonzero(kept)
        ids = token_ids[row, columns]
        flags = ids == processor.image_token_id
        runs = _runs(flags)
        text_start, text_end = processor.text_span(ids.tolist())
        row_grids = _take_grids(grids, used, int(flags.sum()), processor.merge_size)
        used += len(row_grids)
        row_positions, _ = positions(flags.tolist(), row_grids, processor.merge_size)
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
    segments = None
    if not attended[:, 0].all():  # later tokens would see padding on the left
        segments = np.where(attended, PREFIX, PADDING).tolist()
    return PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids.to(input_ids.device),
        segments=segments,
        pixel_values=inputs.get("pixel_values"),
        grids=tuple(grids),
        image_order=tuple(range(len(grids))),
        image_places=torch.from_numpy(np.flatnonzero(token_ids == processor.image_token_id)).to(input_ids.device),
        spans=tuple(spans),
    )


def _runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the half-open ranges in which flags are true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _take_grids(grids: Sequence[Grid], start: int, tokens: int, merge_size: int) -> list[Grid]:
    """Return the next grids that together have this many tokens."""
    taken: list[Grid] = []
    while tokens > 0:
        grid = grids[start + len(taken)]
        taken.append(grid)
        tokens -= math.prod(grid) // merge_size**2
    return taken
