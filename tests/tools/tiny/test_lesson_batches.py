"""Batches of lessons: what is predicted where, what is seen by whom."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.backbone.layers.attention import packed_mask
from qwen_vl_classifier.scenes.drawing import SHAPES
from tools.tiny.lesson_batches import LessonBatches, Recipe
from tools.tiny.lessons import LESSON_KINDS
from tools.tiny.pretrain import initialise

RECIPE = Recipe(batch_size=4, questions=4)
CAPTION = LESSON_KINDS.index("caption")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    initialise(folder, seed=0)
    return Backbone.load(folder, device="cpu", dtype="float32").processor


@pytest.mark.parametrize("number", [0, 1, 6, 16])
def test_every_answer_follows_its_question(processor, number):
    """What is predicted next, read back from the row itself, is a whole answer after an assistant's turn began."""
    batch = LessonBatches(processor, RECIPE, 0).make(number)
    tokenizer = processor.tokenizer
    ids = batch.packed.input_ids
    begins = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    first = torch.ones(len(batch.rows), dtype=torch.bool)
    first[1:] = (batch.columns[1:] != batch.columns[:-1] + 1) | (batch.rows[1:] != batch.rows[:-1])
    assert first.sum() >= 8
    for index in range(len(batch.rows)):
        row, column = int(batch.rows[index]), int(batch.columns[index])
        if first[index]:
            assert ids[row, column + 1 - len(begins) : column + 1].tolist() == begins
        else:  # the token before is the one that was to be predicted
            assert ids[row, column] == batch.targets[index - 1]
    assert int((batch.targets == tokenizer.eos_token_id).sum()) == int(first[batch.kinds == CAPTION].sum())
    yes_or_no = [LESSON_KINDS.index(kind) for kind in ("existence", "relation", "items", "towers", "several")]
    asked = [t for t, k in zip(batch.targets.tolist(), batch.kinds.tolist(), strict=True) if k in yes_or_no]
    assert set(tokenizer.convert_ids_to_tokens(asked)) <= {"Yes", "No"}


def test_questions_do_not_see_the_caption(processor):
    """Under the mask, no question sees a token of the caption: it is answered by looking, not by reading."""
    batch = LessonBatches(processor, RECIPE, 0).make(0)
    assert batch.packed.segments is not None
    mask = packed_mask(batch.packed.segments, torch.device("cpu"))
    for row in range(RECIPE.batch_size):
        captions = batch.columns[(batch.rows == row) & (batch.kinds == CAPTION)]
        questions = batch.columns[(batch.rows == row) & (batch.kinds != CAPTION)]
        assert len(captions) > 1
        assert len(questions) >= RECIPE.questions
        assert not mask[row, 0][questions][:, captions].any()


def test_labels_go_with_the_patches(processor):
    for number in (0, 1, 6, 16):
        batch = LessonBatches(processor, RECIPE, 0).make(number)
        assert batch.labels.shape == (len(batch.packed.pixel_values), 4)
        assert batch.places.shape == (len(batch.packed.pixel_values) // 4, 2)
        assert int((batch.packed.input_ids == processor.image_token_id).sum()) == len(batch.places)


@pytest.mark.parametrize("number", [0, 1, 6])
def test_phrases_end_where_their_words_do(processor, number):
    batch = LessonBatches(processor, RECIPE, 0).make(number)
    assert len(batch.phrase_rows) == len(batch.phrase_counts) == len(batch.phrase_places) > 5
    nouns = {*SHAPES, "shape", "item", "object", "block"}
    for token in batch.packed.input_ids[batch.phrase_rows, batch.phrase_columns].tolist():
        word = processor.tokenizer.decode([token]).strip()
        assert word in nouns or word.removesuffix("s") in nouns or word.removesuffix("es") in nouns


def test_large_pictures_come_in_half_batches(processor):
    batches = LessonBatches(processor, RECIPE, 0)
    assert [len(batches.make(number).packed.input_ids) for number in (0, 1, 6, 16)] == [4, 2, 2, 2]


def test_without_questions_nothing_is_predicted(processor):
    batch = LessonBatches(processor, replace(RECIPE, questions=0), 0).make(0)
    assert len(batch.rows) == 0
    assert len(batch.packed.input_ids) == RECIPE.batch_size
    assert batch.packed.segments is None


def test_batches_are_the_same_every_time_and_differ_from_each_other(processor):
    batches = LessonBatches(processor, RECIPE, 0)
    first, again, second = batches.make(5), batches.make(5), next(iter(LessonBatches(processor, RECIPE, 105)))
    assert torch.equal(first.packed.input_ids, again.packed.input_ids)
    assert torch.equal(first.packed.pixel_values, again.packed.pixel_values)
    assert first.packed.pixel_values.shape == second.packed.pixel_values.shape
    assert not torch.equal(first.packed.pixel_values, second.packed.pixel_values)


def test_workers_give_the_batches_in_order(processor):
    alone = iter(LessonBatches(processor, RECIPE, 3))
    together = iter(DataLoader(LessonBatches(processor, RECIPE, 3), batch_size=None, num_workers=2))
    for _ in range(4):
        assert torch.equal(next(alone).packed.input_ids, next(together).packed.input_ids)
