"""Lessons -> packed rows with the tokens to predict."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from qwen_vl_classifier.backbone.packing import PackedBatch, pack
from qwen_vl_classifier.backbone.pixels import Pictures
from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.scenes.statements import scene_rng
from tools.tiny.lessons import (
    LESSON_KINDS,
    Phrase,
    Question,
    give_lesson,
    is_small,
    patch_labels,
    patch_places,
)

_NOWHERE = (float("nan"), float("nan"))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the built-in backbone is trained.

    Attributes:
        seed: Of weights and lessons.
        batch_size: Lessons in a batch; half as many where pictures are large or several.
        questions: Questions in a lesson, beside the caption.
        looking: Share of the time at the start in which the vision tower trains alone, on what is in each patch; left
            out where weights are given.
        easy_steps: Steps with easier relations at the start (see `plain_lesson`); left out where weights are given.
        learning_rate: The highest.
        weight_decay: Of matrices inside the blocks.
        warmup_steps: Steps in which the learning rate rises, at the start of each stage.
        patch_weight: Weight of the loss of reading patches.
        phrase_weight: Weight of the loss of reading what words stand for.
        caption_weight: Weight of the loss of captions.
        question_weight: Weight of the loss of all other answers. It has to be well above that of captions: with equal
            weights, captions were learned to 84 % while yes and no stayed at chance.
    """

    seed: int = 0
    batch_size: int = 32
    questions: int = 8
    looking: float = 0.05
    easy_steps: int = 4200
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 60
    patch_weight: float = 0.5
    phrase_weight: float = 1.0
    caption_weight: float = 1.0
    question_weight: float = 3.0


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Packed rows with the places where a token is to be predicted, and what is in each patch.

    Attributes:
        packed: The rows.
        rows: Row of each predicted token.
        columns: Column of the token before it.
        targets: The token.
        kinds: What it answers: an index into `LESSON_KINDS`.
        labels: What is in each patch, as `patch_labels` says.
        places: Where each image token lies, as `patch_places` says.
        phrase_rows: Row of each phrase that names something.
        phrase_columns: Column of its last token.
        phrase_counts: How many of these there are in each part of the pictures, shape (phrases, `MOST_PARTS`); -1
            where there is no such part.
        phrase_places: Where the only one is, shape (phrases, 2); NaN where there is not exactly one.
        phrase_offsets: How far that is from the one that the phrase before names, likewise.
    """

    packed: PackedBatch
    rows: Tensor
    columns: Tensor
    targets: Tensor
    kinds: Tensor
    labels: Tensor
    places: Tensor
    phrase_rows: Tensor
    phrase_columns: Tensor
    phrase_counts: Tensor
    phrase_places: Tensor
    phrase_offsets: Tensor


@dataclass(frozen=True, slots=True)
class _Answer:
    """The tokens of an answer and where they are predicted: from column `end - len(ids)` on."""

    row: int
    end: int
    ids: list[int]
    kind: int


@dataclass(frozen=True, slots=True)
class _Named:
    """A phrase and the column of its last token."""

    row: int
    column: int
    phrase: Phrase


class LessonBatches(IterableDataset[TrainingBatch]):
    """Endless batches of lessons, always the same for the same recipe.

    Args:
        processor: Of the backbone that is trained.
        recipe: Seed, batch size and questions; without questions, only pictures are shown.
        first: Number of the first batch.
    """

    def __init__(self, processor: Processor, recipe: Recipe, first: int) -> None:
        self.processor = processor
        self.recipe = recipe
        self.first = first

    def __iter__(self) -> Iterator[TrainingBatch]:
        worker = get_worker_info()
        # Workers take turns, and so does the loader: together they give the batches in order.
        start, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in itertools.count(self.first + start, stride):
            yield self.make(number)

    def make(self, number: int) -> TrainingBatch:
        """Build one batch."""
        merge_size = self.processor.merge_size
        encoded: list[EncodedExample] = []
        answers: list[_Answer] = []
        named: list[_Named] = []
        batch, labels, places = [], [], []
        size = self.recipe.batch_size if is_small(number) else max(1, self.recipe.batch_size // 2)
        for row in range(size):
            rng = scene_rng("pretraining", self.recipe.seed, number * self.recipe.batch_size + row)
            lesson = give_lesson(number, rng, self.recipe.questions, easy=number < self.recipe.easy_steps)
            pictures = self.processor.read_pictures(Example(lesson.pictures, ""))
            for picture, content, grid in zip(lesson.pictures, lesson.contents, pictures.grids, strict=True):
                labels.append(patch_labels(content, picture.size, grid, merge_size))
                places.append(patch_places(grid, merge_size))
            examples, given, phrases = self._lay_out(row, lesson.questions, pictures)
            batch.append(tuple(range(len(encoded), len(encoded) + len(examples))))
            encoded += examples
            answers += given
            named += phrases
        packed = pack(self.processor, encoded, tuple(batch), torch.device("cpu"))
        tokens = [(answer, place) for answer in answers for place in range(len(answer.ids))]
        return TrainingBatch(
            packed=packed,
            rows=torch.tensor([answer.row for answer, _ in tokens]),
            columns=torch.tensor([answer.end - len(answer.ids) + place for answer, place in tokens]),
            targets=torch.tensor([answer.ids[place] for answer, place in tokens]),
            kinds=torch.tensor([answer.kind for answer, _ in tokens]),
            labels=torch.from_numpy(np.concatenate(labels)),
            places=torch.from_numpy(np.concatenate(places)),
            phrase_rows=torch.tensor([each.row for each in named]),
            phrase_columns=torch.tensor([each.column for each in named]),
            phrase_counts=torch.tensor([each.phrase.counts for each in named]),
            phrase_places=torch.tensor([each.phrase.place or _NOWHERE for each in named]),
            phrase_offsets=torch.tensor([each.phrase.offset or _NOWHERE for each in named]),
        )

    def _lay_out(
        self, row: int, asked: tuple[Question, ...], pictures: Pictures
    ) -> tuple[list[EncodedExample], list[_Answer], list[_Named]]:
        """Return the examples of one row, and its answers and phrases; without questions, the pictures alone."""
        tokenizer = self.processor.tokenizer
        if not asked:
            return [self.processor.encode(Example(None, ""), pictures)], [], []
        examples, answers, named = [], [], []
        end = 0
        for each in asked:
            example = self.processor.encode(Example(None, each.text), pictures)
            answer = list(tokenizer(each.answer, add_special_tokens=False)["input_ids"])
            if each.kind == "caption":
                answer.append(tokenizer.eos_token_id)
            # The last answer token is only predicted, never read.
            example = replace(example, ids=[*example.ids, *answer[:-1]])
            start = end or example.prefix_length
            for phrase in each.phrases:
                words = tokenizer(each.text[: phrase.end], add_special_tokens=False)["input_ids"]
                named.append(_Named(row, start + len(words) - 1, phrase))
            end = start + len(example.ids) - example.prefix_length
            examples.append(example)
            answers.append(_Answer(row, end, answer, LESSON_KINDS.index(each.kind)))
        return examples, answers, named
