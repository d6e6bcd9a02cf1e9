"""Which rows train together, in which order: the same for every run with one seed, whatever machine or resumption."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_vl_classifier.backbone.pixels import Pictures
from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.backbone.windows import prepare
from qwen_vl_classifier.classifier.head import row_losses
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.images.identity import picture_identities
from qwen_vl_classifier.images.opening import image_size
from qwen_vl_classifier.training.finetuning.augmentation import Augmentation, augment_example

_WINDOW = 32  # batches within which rows are sorted by length
_FEWEST_PICTURES = 4  # in a full batch: rows about one picture fill at most a quarter of it
_CHARACTERS = 4  # of a text, for one token, roughly


Slot: TypeAlias = tuple[int, bool]
"""The number of a row, and whether it counts: a row that only fills up the batch of a process does not."""


class EpochBatches(torch.utils.data.Sampler[list[Slot]]):
    """Yield batches of row numbers, in an order that depends on the seed and on `epoch` alone.

    Rows about one picture come together, so that they can share its prefix, but never fill a batch, because a
    gradient over one picture says little; rows of like length come together, so that padding is small.

    Args:
        pictures: For each row, equal for two of them if they are about the same picture.
        lengths: For each row, its length in tokens, roughly.
        batch_size: Rows in one step, over all processes.
        seed: Of the order.
        rank: Which of the processes this is; it gets its part of each batch.
        world: Number of processes. All get equally many rows of a batch: where it does not divide evenly, the
            last ones get its first row once more, which does not count.

    Attributes:
        epoch: The pass over the rows, from 0; set it before iterating.
    """

    def __init__(
        self,
        pictures: Sequence[Hashable],
        lengths: Sequence[float],
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.pictures = pictures
        self.lengths = np.asarray(lengths, dtype=np.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(len(self.pictures) / self.batch_size)

    def __iter__(self) -> Iterator[list[Slot]]:
        for batch in self.batches():
            each = math.ceil(len(batch) / self.world)
            slots = [(row, True) for row in batch] + [(batch[0], False)] * (each * self.world - len(batch))
            yield slots[self.rank * each : (self.rank + 1) * each]

    def batches(self) -> list[list[int]]:
        """Return the batches of this epoch: every row in exactly one."""
        order = np.random.default_rng((self.seed, self.epoch))
        groups: dict[Hashable, list[int]] = {}
        for row in order.permutation(len(self.pictures)):
            groups.setdefault(self.pictures[row], []).append(int(row))
        most = max(1, self.batch_size // _FEWEST_PICTURES)
        units = [rows[start : start + most] for rows in groups.values() for start in range(0, len(rows), most)]
        units = [units[number] for number in order.permutation(len(units))]
        in_order: list[int] = []
        for window in _windows(units, _WINDOW * self.batch_size):
            window.sort(key=lambda unit: max(self.lengths[row] for row in unit))  # stable: equals stay shuffled
            in_order += [row for unit in window for row in unit]
        batches = [in_order[start : start + self.batch_size] for start in range(0, len(in_order), self.batch_size)]
        return [batches[number] for number in order.permutation(len(batches))]


def _windows(units: Sequence[list[int]], rows: int) -> Iterator[list[list[int]]]:
    """Cut a list of units into windows of about this many rows."""
    window: list[list[int]] = []
    held = 0
    for unit in units:
        window.append(unit)
        held += len(unit)
        if held >= rows:
            yield window
            window, held = [], 0
    if window:
        yield window


def rough_lengths(examples: Sequence[Example], processor: Processor) -> list[float]:
    """Estimate the number of tokens of each example from headers and characters, without decoding a picture.

    Raises:
        ImageError: A picture is not there, or its header is refused.
    """
    smallest, largest = processor.pixel_limits
    side = processor.token_side
    lengths = []
    for example in examples:
        pixels = [math.prod(image_size(source)) for source in example.images]
        tokens = sum(min(max(count, smallest), largest) for count in pixels) / side**2
        lengths.append(tokens + len(example.text) / _CHARACTERS)
    return lengths


class LabelledRows(torch.utils.data.Dataset[Slot]):
    """Labelled examples as the loop reads them.

    Args:
        examples: What to learn from.
        targets: float32, shape (n,): probability of class 1.
        weights: float32, shape (n,).

    Attributes:
        pictures: For each row the identities of its pictures, which rows about the same pictures share.
    """

    def __init__(
        self, examples: Sequence[Example], targets: npt.NDArray[np.float32], weights: npt.NDArray[np.float32]
    ) -> None:
        self.examples = examples
        self.targets = targets
        self.weights = weights
        self.pictures = picture_identities([example.images for example in examples], lenient=True)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, slot: Slot) -> Slot:
        return slot

    def mean_loss(self, logits: npt.NDArray[np.float32]) -> float:
        """Return the weighted mean of the cross-entropy of logits of shape (n, 2)."""
        losses = row_losses(torch.tensor(logits, dtype=torch.float64), torch.from_numpy(self.targets))
        return float(np.average(losses.numpy(), weights=self.weights))

    def accuracy(self, logits: npt.NDArray[np.floating[Any]]) -> float:
        """Return the weighted share of rows whose likelier class is that of their label.

        Args:
            logits: Shape (n, 2); probabilities do as well.
        """
        right = (logits[:, 1] >= logits[:, 0]) == (self.targets >= 0.5)
        return float(np.average(right, weights=self.weights))

    def name(self, row: int) -> str:
        """Name a row in a message: by its id, or else by its number."""
        return self.examples[row].id or f"row {row + 1}"


class TrainingBatch(TypedDict):
    """What one process trains on in one step."""

    names: list[str]
    encoded: list[EncodedExample]
    targets: Tensor
    weights: Tensor


class Collator:
    """Turn slots into a batch: pictures are opened, changed at random where that is set, and cut into patches.

    Args:
        rows: What the slots number.
        processor: Of the backbone.
        augmentation: What happens to pictures.
        seed: Of the random changes; with the epoch and the row's number it fixes them.

    Attributes:
        read: Reads the pictures of an example, in several threads at a time; `None` opens them.
        epoch: The pass over the rows, from 0.
    """

    def __init__(self, rows: LabelledRows, processor: Processor, augmentation: Augmentation, seed: int) -> None:
        self.read: Callable[[Example], Pictures] | None = None
        self.rows = rows
        self.processor = processor
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0

    def __call__(self, slots: Sequence[Slot]) -> TrainingBatch:
        """Make the batch of some slots."""
        numbers = [row for row, _ in slots]
        examples = [self.rows.examples[row] for row in numbers]
        if self.augmentation.level != "none":
            examples = self._augmented(numbers)
        encoded = prepare(self.processor, examples, read=self.read)
        counts = np.array([float(counts) for _, counts in slots], dtype=np.float32)
        return {
            "names": [self.rows.name(row) for row in numbers],
            "encoded": encoded,
            "targets": torch.from_numpy(self.rows.targets[numbers]),
            "weights": torch.from_numpy(self.rows.weights[numbers] * counts),
        }

    def _augmented(self, numbers: Sequence[int]) -> list[Example]:
        """Change the pictures of some rows, those that several share in the same way."""
        changed: dict[Hashable, Example] = {}
        examples = []
        for row in numbers:
            example, key = self.rows.examples[row], self.rows.pictures[row]
            if key not in changed:
                changed[key] = augment_example(example, self.augmentation, (self.seed, self.epoch, row))
            examples.append(replace(example, image=changed[key].image))
        return examples
