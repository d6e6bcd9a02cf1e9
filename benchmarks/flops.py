"""How many floating-point operations a pass of Qwen2.5-VL takes, and how fast its matrix products run alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from checkpoints import CHANNELS, MERGE, PATCH, TEMPORAL_PATCH, WINDOW, Shape, Tower
from torch import nn

Product = tuple[int, int, int, int]
"""Rows, inner size and columns of a matrix product, and how often it comes."""


def products(shape: Shape, patches: int, tokens: int) -> list[Product]:
    """List the linear layers of one pass.

    The patch embedding, the layers of the vision tower, the merger that makes one token of 2 x 2 patches, and the
    layers of the decoder. A layer has queries, keys and values, the output projection, and a gated MLP of three
    matrices. The language head is not part of the pass.

    Args:
        shape: Of the model.
        patches: Of all pictures.
        tokens: Of all sequences, image tokens included.
    """
    vision, merged = shape.vision, shape.vision.hidden * MERGE**2
    return [
        (patches, CHANNELS * TEMPORAL_PATCH * PATCH**2, vision.hidden, 1),
        (patches, vision.hidden, 3 * vision.hidden, vision.layers),
        *_rest_of_layer(patches, vision),
        (patches // MERGE**2, merged, merged, 1),
        (patches // MERGE**2, merged, shape.text.hidden, 1),
        (tokens, shape.text.hidden, shape.text.hidden, shape.text.layers),
        (
            tokens,
            shape.text.hidden,
            shape.text.hidden // shape.text.heads * shape.text.key_heads,
            2 * shape.text.layers,
        ),
        *_rest_of_layer(tokens, shape.text),
    ]


def _rest_of_layer(rows: int, tower: Tower) -> list[Product]:
    return [
        (rows, tower.hidden, tower.hidden, tower.layers),
        (rows, tower.hidden, tower.intermediate, 2 * tower.layers),
        (rows, tower.intermediate, tower.hidden, tower.layers),
    ]


def linear_flops(listed: Sequence[Product]) -> int:
    """Count the operations of linear layers: a multiplication and an addition for each triple of indices."""
    return sum(2 * rows * inner * columns * times for rows, inner, columns, times in listed)


def attention_flops(shape: Shape, grids: Sequence[tuple[int, int]], lengths: Sequence[int]) -> int:
    """Count the operations of attention: 4 x width for each pair of a query and a key that it may see.

    Two for the score and two for the weighted sum. Softmax is not counted. Pairs are those that must be looked at: in
    the vision tower, those within a window, or within the picture in layers of full attention; in the decoder, half of
    a sequence's square, since it looks back only.

    Args:
        shape: Of the model.
        grids: Height and width of each picture, in patches.
        lengths: Of the sequences, in tokens.
    """
    side = WINDOW // PATCH
    full = windowed = 0
    for height, width in grids:
        full += (height * width) ** 2
        windowed += sum((a * b) ** 2 for a, b in itertools.product(_cut(height, side), _cut(width, side)))
    wide = len(shape.full_attention)
    vision = 4 * shape.vision.hidden * (wide * full + (shape.vision.layers - wide) * windowed)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return vision + 4 * shape.text.hidden * shape.text.layers * pairs


def _cut(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


def runner(listed: Sequence[Product], dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Return a function that runs linear layers one after the other, and nothing else."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    operands = [(random(rows, inner), random(columns, inner), times) for rows, inner, columns, times in listed]

    @torch.inference_mode()
    def run() -> None:
        for left, right, times in operands:
            for _ in range(times):
                nn.functional.linear(left, right)

    return run
