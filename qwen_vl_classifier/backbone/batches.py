"""Examples in batches that fit into memory: each distinct one once, and again in halves where one did not fit."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qwen_vl_classifier.backbone.devices import memory_advice, release_memory
from qwen_vl_classifier.backbone.encoder import PackedBatch, pack, pooled_states
from qwen_vl_classifier.backbone.planning import Batch, Item, plan
from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.errors import OutOfMemoryError

Features = npt.NDArray[np.float32]


def encode_in_batches(
    model: nn.Module,
    processor: Processor,
    prepared: Sequence[EncodedExample],
    taps: Sequence[Tap],
    *,
    token_budget: int,
    share_prefixes: bool,
) -> tuple[Features, int]:
    """Read features of examples, in as many passes as memory asks for.

    A batch that does not fit halves the budget for what is left. Nothing that is done is done again, and no row is
    lost.

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
    rows: dict[bytes, list[int]] = {}
    for number, item in enumerate(prepared):
        rows.setdefault(item.key, []).append(number)
    left = [numbers[0] for numbers in rows.values()]
    hidden_size: int = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    features = np.empty((len(prepared), len(taps), hidden_size), dtype=np.float32)
    while left:
        done: set[int] = set()
        for batch in _plan(prepared, left, token_budget, share_prefixes, hidden_size):
            numbers = [number for row in batch for number in row]
            try:
                pooled = _encode(model, processor, prepared, batch, taps)
            except OutOfMemoryError:
                if len(numbers) == 1:
                    raise
            else:
                for number, feature in zip(numbers, pooled, strict=True):
                    features[rows[prepared[number].key]] = feature
                done.update(numbers)
                continue
            # Outside of the handler: the error keeps what was computed so far alive.
            release_memory(next(model.parameters()).device)
            token_budget = max(1, min(token_budget, _tokens(prepared, batch)) // 2)
            break
        left = [number for number in left if number not in done]
    return features, token_budget


def _plan(
    prepared: Sequence[EncodedExample],
    chosen: Sequence[int],
    token_budget: int,
    share_prefixes: bool,
    hidden_size: int,
) -> list[Batch]:
    """Plan some of the examples, numbered as in `prepared`."""
    items = [
        Item(item.pictures.key, item.prefix_length, len(item.ids) - item.prefix_length)
        for item in (prepared[number] for number in chosen)
    ]
    return [
        tuple(tuple(chosen[index] for index in row) for row in batch)
        for batch in plan(items, token_budget=token_budget, share_prefixes=share_prefixes, hidden_size=hidden_size)
    ]


def _tokens(prepared: Sequence[EncodedExample], batch: Batch) -> int:
    """Count the tokens of a batch, had each example a row of its own: no fewer than the batch has."""
    return max(sum(len(prepared[number].ids) for number in row) for row in batch) * len(batch)


def _encode(
    model: nn.Module, processor: Processor, prepared: Sequence[EncodedExample], batch: Batch, taps: Sequence[Tap]
) -> Features:
    """Run one batch; features of its examples in the order of its rows."""
    with memory_advice(f"encoding {sum(map(len, batch))} examples"):
        packed = _pack(processor, prepared, batch, next(model.parameters()).device)
        pooled: Features = pooled_states(model, packed, taps).cpu().numpy()
    return pooled


def pack_together(
    processor: Processor, prepared: Sequence[EncodedExample], device: torch.device, hidden_size: int
) -> tuple[PackedBatch, list[int]]:
    """Lay examples out as one batch, those of the same picture sharing rows: for training, which chooses its batches.

    Args:
        processor: Of the checkpoint.
        prepared: The examples.
        device: Where the batch goes.
        hidden_size: Of the decoder.

    Returns:
        The batch, and for each example in it, in order, its number in `prepared`.
    """
    (batch,) = _plan(prepared, range(len(prepared)), sys.maxsize, True, hidden_size)
    return _pack(processor, prepared, batch, device), [number for row in batch for number in row]


def _pack(processor: Processor, prepared: Sequence[EncodedExample], batch: Batch, device: torch.device) -> PackedBatch:
    return pack(
        prepared,
        batch,
        image_token_id=processor.image_token_id,
        pad_token_id=processor.pad_token_id,
        merge_size=processor.merge_size,
        device=device,
    )
