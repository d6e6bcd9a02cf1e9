"""Batches of fine-tuning: every row once, pictures together, lengths alike, the same wherever they are made."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.training.finetuning.augmentation import Augmentation
from qwen_vl_classifier.training.finetuning.training_batches import Collator, EpochBatches, LabelledRows, rough_lengths


def sampler(count: int = 50, *, per_picture: int = 1, batch_size: int = 8, **options) -> EpochBatches:
    pictures = [number // per_picture for number in range(count)]
    return EpochBatches(pictures, [10.0] * count, batch_size, seed=3, **options)


def numbers(batches) -> list[int]:
    return [row for batch in batches for row, _ in batch]


@pytest.mark.parametrize("count", [1, 7, 8, 50])
def test_every_row_comes_once(count):
    batches = [*sampler(count)]
    assert sorted(numbers(batches)) == [*range(count)]
    assert all(counts for batch in batches for _, counts in batch)
    assert len(batches) == len(sampler(count))
    assert {len(batch) for batch in batches} <= {8, count % 8}


def test_the_order_depends_on_seed_and_epoch_alone():
    first, second = sampler(), sampler()
    np.random.seed(7)
    assert [*first] == [*second] == [*first]
    second.epoch = 1
    assert [*first] != [*second]
    assert [*first] != [*EpochBatches(first.pictures, first.lengths, 8, seed=4)]


def test_rows_about_one_picture_come_together_but_do_not_fill_a_batch():
    batches = [*sampler(64, per_picture=8)]
    shared = [max(Counter(row // 8 for row, _ in batch).values()) for batch in batches]
    assert max(shared) <= 4  # two units of a quarter, by chance
    neighbours = sum(
        a // 8 == b // 8 for batch in batches for (a, _), (b, _) in zip(batch[::2], batch[1::2], strict=True)
    )
    assert neighbours == 32


def test_rows_of_like_length_come_together():
    lengths = np.random.default_rng(0).integers(10, 1000, 256)
    batches = [*EpochBatches(range(256), lengths, 8, seed=0)]
    padding = sum(8 * max(lengths[row] for row, _ in batch) for batch in batches) / lengths.sum()
    assert padding < 1.1
    order = [np.mean([lengths[row] for row, _ in batch]) for batch in batches]
    assert order != sorted(order)  # but batches come in any order


@pytest.mark.parametrize("count", [16, 21, 17])
def test_processes_share_each_batch(count):
    alone = [*sampler(count)]
    shares = [[*sampler(count, rank=rank, world=2)] for rank in range(2)]
    for whole, first, second in zip(alone, *shares, strict=True):
        assert len(first) == len(second)
        assert [row for row, counts in first + second if counts] == [row for row, _ in whole]
        assert all(row == whole[0][0] for row, counts in first + second if not counts)


def picture(colour: int, size: int = 56) -> Image.Image:
    return Image.new("RGB", (size, size), (colour, 10, 10))


def test_rows_know_which_of_them_share_their_pictures(tmp_path):
    for name in ("a.png", "b.png"):
        picture(1).save(tmp_path / name)
    pictures = [tmp_path / "a.png", tmp_path / "b.png", picture(1), (picture(1),), picture(2), None]
    rows = LabelledRows([Example(one, "x", 1) for one in pictures], np.ones(6, np.float32), np.ones(6, np.float32))
    assert len(set(rows.pictures[:4])) == 1
    assert len(set(rows.pictures[3:])) == 3


def test_lengths_follow_pictures_and_texts(tiny_backbone):
    processor = tiny_backbone.processor
    rows = [
        Example(None, "word"),
        Example(picture(1, 56), "word"),
        Example(picture(1, 224), "word"),
        Example(None, "word " * 50),
    ]
    lengths = rough_lengths(rows, processor)
    actual = [len(processor.encode(row).ids) for row in rows]
    assert np.argsort(lengths).tolist() == np.argsort(actual).tolist()


@pytest.fixture
def rows() -> LabelledRows:
    shared = picture(200)
    examples = [
        Example(shared, "one", 1, id="first"),
        Example(shared, "two", 0),
        Example(picture(90), "three", 0.25),
    ]
    return LabelledRows(examples, np.array([1, 0, 0.25], np.float32), np.array([1, 2, 3], np.float32))


def test_a_batch_holds_what_the_step_needs(rows, tiny_backbone):
    batch = Collator(rows, tiny_backbone.processor, Augmentation("none"), seed=0)([(2, True), (0, True), (1, False)])
    assert batch["names"] == ["row 3", "first", "row 2"]
    assert batch["targets"].tolist() == [0.25, 1, 0]
    assert batch["weights"].tolist() == [3, 1, 0]
    for row, item in zip((2, 0, 1), batch["encoded"], strict=True):
        assert item.key == tiny_backbone.processor.encode(rows.examples[row]).key


def test_changed_pictures_depend_on_seed_epoch_and_row_alone(rows, tiny_backbone):
    collator = Collator(rows, tiny_backbone.processor, Augmentation("strong"), seed=0)

    def keys() -> list[bytes]:
        return [item.pictures.key for item in collator([(0, True), (1, True), (2, True)])["encoded"]]

    first = keys()
    torch.manual_seed(5)
    assert keys() == first
    assert first[0] == first[1]  # one picture is changed once for all its rows
    collator.epoch = 1
    assert not {*keys()} & {*first}


def test_validation_counts_weights_and_soft_labels(rows):
    logits = np.array([[0, 2], [0, -1], [0, 0]], np.float32)
    losses = [np.log1p(np.exp(-2)), np.log1p(np.exp(-1)), np.log(2)]
    assert rows.mean_loss(logits) == pytest.approx(np.dot(losses, [1, 2, 3]) / 6)
    assert rows.accuracy(logits) == pytest.approx(0.5)
