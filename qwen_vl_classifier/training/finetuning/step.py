"""One training step, shared by the original API and by `finetune`: check a batch, run it, update the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.devices import memory_advice
from qwen_vl_classifier.backbone.encoder import pooled_states
from qwen_vl_classifier.backbone.packing import PackedBatch
from qwen_vl_classifier.backbone.pixels import PictureTokens
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.classifier.head import row_losses
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.rows import plain_value
from qwen_vl_classifier.errors import BatchError, TrainingError

Tensors: TypeAlias = Mapping[str, Tensor]
"""A batch as the processor makes it: tensors by name."""

MOST_GRADIENT_NORM = 1.0
"""Longer gradients are scaled down to this."""


class TrainableClassifier(nn.Module):
    """Backbone, tap and head as one differentiable module.

    Args:
        backbone: Its model becomes the submodule `base_model`.
        tap: Where features are read.
        head: Becomes the submodule `classifier`.
    """

    def __init__(self, backbone: Backbone, tap: Tap, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.tap = tap
        self.base_model = backbone.model
        self.classifier = head
        if len(backbone.devices) > 1:  # by this, Trainer and accelerate know to leave it there
            self.hf_device_map = {str(device): device for device in backbone.devices}

    @property
    def base_is_trainable(self) -> bool:
        """Whether any weight of the base model trains."""
        return any(parameter.requires_grad for parameter in self.base_model.parameters())

    def logits(self, batch: Tensors) -> Tensor:
        """Return logits of shape (rows, 2), float32, of a batch on any device."""
        # A frozen backbone needs no graph, and without one a batch takes a fraction of the memory.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.base_is_trainable):
            features = self.backbone.encode_batch(batch, [self.tap])[:, 0]
        return self.classify(features)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits of shape (n, 2), float32, of features of shape (n, hidden)."""
        with torch.autocast(features.device.type, enabled=False):  # the head is small, and exact in float32
            logits: Tensor = self.classifier(features)
        return logits


class PackedClassifier(TrainableClassifier):
    """A trainable classifier of rows in which examples share pictures."""

    def forward(self, rows: PackedBatch, pictures: PictureTokens | None = None) -> Tensor:
        """Return logits of shape (examples in the order of the rows, 2), float32; arguments as of `pooled_states`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.base_is_trainable):
            features = pooled_states(self.base_model, rows, [self.tap], pictures)[:, 0]
        return self.classify(features)


def collate(examples: Sequence[Example | Mapping[str, Any]], processor: Processor) -> dict[str, Tensor]:
    """Turn labelled examples into a batch for a training step.

    Args:
        examples: Examples, or mappings with `image`, `text` and `label`.
        processor: That of the backbone.

    Returns:
        What the processor returns, and `labels`: int64, shape (examples,).

    Raises:
        BatchError: No examples, a key is missing, or a label is not 0 or 1.
        ImageError: A picture cannot be opened.
    """
    rows = [_as_example(row, number) for number, row in enumerate(examples)]
    labels = []
    for number, row in enumerate(rows):
        label = plain_value(row.label)  # also of an array with one element
        if not isinstance(label, (int, float)) or label not in (0, 1):
            raise BatchError(f"example {number}: label {' '.join(repr(row.label).split())[:80]}; give 0 or 1")
        labels.append(int(label))
    return {**processor(rows), "labels": torch.tensor(labels)}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train.

    Raises:
        TrainingError: All are frozen.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError(
            "all weights of the model are frozen, so that nothing can be trained; unfreeze the classifier "
            "(model.classifier.requires_grad_(True)) or all weights (model.requires_grad_(True))"
        )
    return trained


def train_step(
    model: TrainableClassifier,
    optimizer: torch.optim.Optimizer,
    batch: Tensors,
    *,
    autocast: bool = False,
) -> float:
    """Run one step of training; weights of the base model that train are made float32 first.

    Args:
        model: What to train.
        optimizer: Over its trainable parameters.
        batch: `input_ids`, `attention_mask`, `labels`, and `pixel_values` with `image_grid_thw` where there are
            pictures; on any device.
        autocast: Run matrix products in bfloat16.

    Returns:
        The cross-entropy before the step.

    Raises:
        BatchError: The batch does not fit together; nothing is changed.
        TrainingError: The loss or its gradient is not finite, or all weights are frozen; nothing is changed.
        OutOfMemoryError: The batch does not fit into memory.
    """
    check_batch(batch, model.backbone)
    trained_parameters(model)
    device = model.backbone.device
    model.train()
    model.zero_grad(set_to_none=True)
    with memory_advice(f"training on {len(batch['labels'])} examples"):
        if model.base_is_trainable and model.backbone.dtype != torch.float32 and model.backbone.adapter is None:
            model.base_model.float()  # bfloat16 weights cannot take steps as small as theirs
            model.backbone.mark_changed()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = model.logits(batch)
        value = add_gradients(logits, batch["labels"].to(device))
        norm = nn.utils.clip_grad_norm_(model.parameters(), MOST_GRADIENT_NORM).item()
        check_gradient_norm(model, norm)
        optimizer.step()
    if model.base_is_trainable:
        model.backbone.mark_changed()
    return value


def add_gradients(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    total: float | None = None,
    focal_gamma: float = 0.0,
    backward: Callable[[Tensor], None] = Tensor.backward,
    rows: Sequence[str] = (),
) -> float:
    """Add the gradient of a batch, or of a part of one, to what the parameters hold already.

    Args:
        logits: Shape (n, 2), with a graph.
        targets: Shape (n,): labels, or probabilities of class 1.
        weights: Shape (n,); `None` weighs all rows alike.
        total: Weight of the whole batch where this is a part of it; `None` takes that of these rows.
        focal_gamma: As in `losses.row_losses`.
        backward: What runs the backward pass of a scalar.
        rows: Names of the rows, for messages.

    Returns:
        sum(weight * loss) / total.

    Raises:
        TrainingError: The loss is NaN or infinite; the message names the rows, and no gradient was added.
    """
    if weights is None:
        weights = torch.ones_like(targets, dtype=torch.float32)
    if total is None:
        total = float(weights.sum())
    loss = (weights * row_losses(logits, targets, focal_gamma=focal_gamma)).sum() / total
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss is {value}{_in_rows(rows)}; lower the learning rate, or look for broken weights: nothing was "
            "changed"
        )
    backward(loss)
    return value


def check_gradient_norm(model: nn.Module, norm: float, *, rows: Sequence[str] = ()) -> None:
    """Make sure that a step with this gradient leaves the weights finite.

    Args:
        model: Its gradients are dropped where there is an error.
        norm: Of its gradients.
        rows: Names of the rows that they come from, for messages.

    Raises:
        TrainingError: The norm is NaN or infinite; the message names the rows.
    """
    if not math.isfinite(norm):
        model.zero_grad(set_to_none=True)
        raise TrainingError(
            f"the gradient's norm is {norm}{_in_rows(rows)}; lower the learning rate, or look for broken weights: "
            "nothing was changed"
        )


def _in_rows(rows: Sequence[str]) -> str:
    return f" in the batch of {', '.join(rows)}" if rows else ""


def check_batch(batch: Tensors, backbone: Backbone, *, labels: bool = True) -> None:
    """Make sure that the tensors of a batch fit together.

    Args:
        batch: See `train_step`.
        backbone: Which is to read it.
        labels: Whether `labels` must be there.

    Raises:
        BatchError: They do not; the message names the key, what was seen and what to pass.
    """
    for key in ("input_ids", "attention_mask", *(["labels"] if labels else [])):
        if not isinstance(batch.get(key), Tensor):
            raise BatchError(f"batch has no tensor {key!r}, only {sorted(batch)}; pass what collate returns")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if ids.ndim != 2 or 0 in ids.shape or ids.dtype not in (torch.int32, torch.int64):
        raise BatchError(
            f"input_ids: {ids.dtype} of shape {tuple(ids.shape)}; pass whole numbers (torch.long) of shape "
            "(rows, tokens)"
        )
    if mask.shape != ids.shape:
        raise BatchError(
            f"attention_mask: shape {tuple(mask.shape)}, input_ids has {tuple(ids.shape)}; pass the same shape"
        )
    _check_mask(mask)
    if labels:
        _check_labels(batch["labels"], len(ids))
    vocabulary = int(backbone.model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise BatchError(
            f"input_ids: {int(ids.min())} to {int(ids.max())}, this checkpoint has 0 to {vocabulary - 1}; "
            "pass ids of its own tokeniser"
        )
    _check_images(batch, backbone.processor)


def _check_mask(mask: Tensor) -> None:
    attended = mask.bool()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise BatchError("attention_mask: values other than 0 and 1; pass 1 for tokens and 0 for padding")
    starts = attended.long().diff(dim=1, prepend=torch.zeros_like(mask[:, :1]).long()).eq(1).sum(dim=1)
    for row, count in enumerate(starts.tolist()):
        if count != 1:
            seen = "no token at all" if count == 0 else "gaps between tokens"
            raise BatchError(f"attention_mask: {seen} in row {row}; pad on the left or on the right only")


def _check_labels(labels: Tensor, rows: int) -> None:
    if labels.shape != (rows,):
        raise BatchError(f"labels: shape {tuple(labels.shape)}, input_ids has {rows} rows; pass shape ({rows},)")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise BatchError(f"labels: {labels.dtype}; pass whole numbers, 0 or 1 (torch.long)")
    wrong = labels[(labels != 0) & (labels != 1)]
    if len(wrong):
        raise BatchError(f"labels: {int(wrong[0])} among them; pass 0 or 1")


def _check_images(batch: Tensors, processor: Processor) -> None:
    flags = batch["input_ids"] == processor.image_token_id
    if bool((flags & ~batch["attention_mask"].bool()).any()):
        raise BatchError("input_ids: image tokens where attention_mask is 0; pad with the tokeniser's pad token")
    tokens = int(flags.sum())
    pixels, grids = batch.get("pixel_values"), batch.get("image_grid_thw")
    if pixels is None and grids is None and not tokens:
        return
    if not isinstance(pixels, Tensor) or not isinstance(grids, Tensor):
        missing = "image_grid_thw" if isinstance(pixels, Tensor) else "pixel_values"
        raise BatchError(
            f"{missing}: missing, though the batch has {tokens} image tokens; "
            f"pass the {missing} that the processor or collate returned with the other tensors"
        )
    if grids.ndim != 2 or grids.shape[1] != 3 or not len(grids) or grids.dtype not in (torch.int32, torch.int64):
        raise BatchError(
            f"image_grid_thw: {grids.dtype} of shape {tuple(grids.shape)}; "
            "pass whole numbers of shape (pictures, 3): time, height, width; or leave it out without pictures"
        )
    merge = processor.merge_size
    sizes: list[list[int]] = grids.tolist()
    if any(min(size) < 1 or size[1] % merge or size[2] % merge for size in sizes):
        raise BatchError(f"image_grid_thw: {sizes[:3]}...; heights and widths are multiples of {merge}, above 0")
    patches = sum(math.prod(size) for size in sizes)
    patch_dim = processor.patches.patch_dim
    if pixels.shape != (patches, patch_dim) or not pixels.is_floating_point():
        raise BatchError(
            f"pixel_values: {pixels.dtype} of shape {tuple(pixels.shape)}, image_grid_thw has {patches} patches "
            f"of {patch_dim} floating-point values; pass pixels and grid of the same pictures"
        )
    expected = [math.prod(size) // merge**2 for size in sizes]
    # One run of image tokens for each picture, in order; runs never touch, the template sees to that.
    padded = nn.functional.pad(flags.long(), (1, 1)).flatten()
    edges = padded.diff()
    seen = ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().tolist()
    if seen != expected:
        raise BatchError(
            f"input_ids: image tokens in runs of {seen[:5]}, image_grid_thw has {expected[:5]}; "
            "pass ids, pixels and grid of the same pictures, in the same order"
        )


def _as_example(row: Example | Mapping[str, Any], number: int) -> Example:
    if isinstance(row, Example):
        return row
    missing = [key for key in ("image", "text", "label") if key not in row]
    if missing:
        raise BatchError(f"example {number}: no {missing[0]!r}, only {sorted(row)}; give image, text and label")
    return Example(row["image"], row["text"], row["label"])
