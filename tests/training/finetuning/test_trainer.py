"""The loop of fine-tuning: which state is kept, what memory changes, and the steps of the original recipe."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2_5_vl_classifier import Qwen2_5_VLForBinaryClassification, Qwen2_5_VLTrainer
from qwen_vl_classifier import (
    Backbone,
    Classifier,
    Example,
    Tap,
    finetune,
)
from qwen_vl_classifier.errors import ConfigError, ImageError, OutOfMemoryError, TrainingError
from qwen_vl_classifier.training.finetuning.step import PackedClassifier
from qwen_vl_classifier.training.finetuning.trainer import FinetuneTrainer
from qwen_vl_classifier.training.finetuning.training_batches import Collator, LabelledRows
from tests.backbone.layers import varlen_definition
from tests.tuning import FULL, LORA, ROWS, VALIDATION, assert_same, snapshot, start_at
from tests.waiting import LIMIT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def still(checkpoint) -> Classifier:
    """A start without dropout: random numbers do not depend on how a batch is cut."""
    return start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(3, "mean"), dropout=0.0)


def course(monkeypatch, losses: list[float]) -> list[dict[str, torch.Tensor]]:
    """Let validation give these losses, and return what the weights were at each."""
    given = iter(losses)
    states: list[dict[str, torch.Tensor]] = []

    def mean_loss(*_):
        return next(given)

    def validation_logits(self):
        states.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return np.zeros((len(VALIDATION), 2), np.float32)

    monkeypatch.setattr(LabelledRows, "mean_loss", mean_loss)
    monkeypatch.setattr(FinetuneTrainer, "validation_logits", validation_logits)
    return states


def test_the_last_state_is_not_kept_for_being_last(start, monkeypatch):
    states = course(monkeypatch, [0.9, 0.5, 0.7, 0.6])
    result = finetune(start, ROWS, VALIDATION, config=replace(FULL, epochs=3), progress=False)
    assert [row["validation_log_loss"] for row in result.history][1:] == [0.5, 0.7, 0.6]
    seen = result.classifier.head.state_dict()
    for name, tensor in seen.items():
        assert torch.equal(tensor, states[1][f"classifier.{name}"])
        assert not torch.equal(tensor, states[3][f"classifier.{name}"])


@pytest.mark.parametrize(("patience", "looks"), [(1, 3), (2, 5), (0, 7)])
def test_it_stops_when_validation_gets_no_better(start, monkeypatch, patience, looks):
    course(monkeypatch, [0.9, 0.5, 0.7, 0.5, 0.8, 0.4, 0.9])
    config = replace(FULL, epochs=6, patience=patience)
    losses = [
        row["validation_log_loss"] for row in finetune(start, ROWS, VALIDATION, config=config, progress=False).history
    ]
    if patience == 2:
        assert losses[1:] == [0.5, 0.7, 0.5]  # no better than 0.5, twice
    else:
        assert len(losses) == looks


def test_it_looks_at_validation_as_often_as_asked(start):
    config = replace(FULL, epochs=1, batch_size=4, evaluations_per_epoch=2)
    history = finetune(start, ROWS, VALIDATION, config=config, progress=False).history
    assert [row["step"] for row in history] == [0, 2, 4]


def test_gradient_checkpointing_changes_nothing_but_memory(start, result, monkeypatch):
    ran = []
    attention = type(start.backbone.model.language_model.layers[0].self_attn)
    forward = attention.forward

    def counting(self, *arguments, **options):
        ran.append(torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(attention, "forward", counting)
    config = replace(FULL, gradient_checkpointing=True)
    seen = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    # 2 epochs of 2 steps through 3 layers, each layer once more on the way back.
    assert sum(ran) == 2 * 2 * 3 * 2
    for one, other in zip(seen.history, result.history, strict=True):
        assert one["validation_log_loss"] == pytest.approx(other["validation_log_loss"], rel=1e-3)


def test_bfloat16_products_run(start, result):
    config = replace(FULL, epochs=1, bf16=True)
    seen = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert seen.classifier.backbone.dtype == torch.float32
    assert seen.history[1]["training_loss"] == pytest.approx(result.history[1]["training_loss"], rel=0.1)
    assert seen.history[1] != result.history[1]


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_learning_rate_beyond_reason_is_an_error_and_changes_nothing(start, batch_size):
    """In the next step, or, where one step is an epoch, in validation."""
    before = snapshot(start)
    config = replace(FULL, learning_rate=1e30, head_learning_rate=1e30, batch_size=batch_size)
    with pytest.raises(TrainingError, match="lower the learning rate") as caught:
        finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert "\n" not in str(caught.value)
    assert_same(snapshot(start), before)


def assert_same_course(seen, wanted, rel: float) -> None:
    for one, other in zip(seen.history, wanted.history, strict=True):
        assert {**one, "training_loss": one["training_loss"] or 0} == pytest.approx(
            {**other, "training_loss": other["training_loss"] or 0}, rel=rel
        )


def limit(monkeypatch, most: int) -> list[int]:
    """Let memory run out in the backward pass of more than so many examples; return what was tried."""
    forward = PackedClassifier.forward
    tried = []

    def limited(self, rows, *more):
        logits = forward(self, rows, *more)
        if self.training:
            tried.append(len(logits))
            if len(logits) > most:
                logits.register_hook(lambda _: torch.empty(2**60))
        return logits

    monkeypatch.setattr(PackedClassifier, "forward", limited)
    return tried


def test_lack_of_memory_takes_smaller_pieces_and_the_same_steps(still, monkeypatch):
    """Gradients that were added before memory ran out are not added twice."""
    wanted = finetune(still, ROWS, VALIDATION, config=replace(FULL, epochs=1), progress=False)
    tried = limit(monkeypatch, most=2)
    seen = finetune(still, ROWS, VALIDATION, config=replace(FULL, epochs=1), progress=False)
    assert tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert_same_course(seen, wanted, rel=1e-3)


def test_a_single_example_that_does_not_fit_ends_in_advice(start, monkeypatch):
    limit(monkeypatch, most=0)
    with pytest.raises(OutOfMemoryError, match="training on 1 examples"):
        finetune(start, ROWS, VALIDATION, config=FULL, progress=False)


def test_a_micro_batch_changes_nothing_but_memory(still, monkeypatch):
    wanted = finetune(still, ROWS, VALIDATION, config=FULL, progress=False)
    tried = limit(monkeypatch, most=99)
    seen = finetune(still, ROWS, VALIDATION, config=replace(FULL, micro_batch_size=3), progress=False)
    assert tried == [3, 3, 2] * 4
    assert_same_course(seen, wanted, rel=1e-2)


def recipe(start: Classifier, steps: int, rate: float) -> list[float]:
    """Train the same classifier by the original API, all rows in each step; the losses before each."""
    model = Qwen2_5_VLForBinaryClassification(start.backbone.folder, device="cpu", dtype="float32")
    model.tap, model.classifier = start.tap, copy.deepcopy(start.head).requires_grad_(True)
    trainer = Qwen2_5_VLTrainer(model, learning_rate=rate)
    batch = model.collate(ROWS)
    return [trainer.train_step(batch) for _ in range(steps)]


def test_the_original_recipe_takes_the_same_steps(checkpoint):
    """Stage 2 by `Qwen2_5_VLTrainer.train_step` and by `finetune`: one step function, the same course."""
    start = start_at(Backbone.load(checkpoint, device="cpu", dtype="float32"), Tap(-1, "mean"), dropout=0.0)
    config = replace(FULL, learning_rate=1e-3, head_learning_rate=1e-3, schedule="constant", epochs=5, batch_size=16)
    history = finetune(start, ROWS, VALIDATION, config=replace(config, patience=0), progress=False).history
    seen = [row["training_loss"] for row in history[1:]]
    assert seen == pytest.approx(recipe(start, 5, 1e-3), rel=1e-3)
    assert seen[-1] < seen[0] - 0.05


def test_soft_labels_and_weights_count(still):
    """A row of weight 2 is a row given twice; a soft label is the row given with both labels."""
    config = replace(FULL, batch_size=64, weight_column="weight", head_learning_rate=1e-3, learning_rate=1e-4)
    validation = [replace(row, fields={"weight": 1}) for row in VALIDATION]

    def losses(rows: list[Example]) -> list[float]:
        history = finetune(still, rows, validation, config=config, progress=False).history
        return [row["training_loss"] for row in history[1:]]

    weighted = [replace(row, fields={"weight": 1 + number % 3}) for number, row in enumerate(ROWS)]
    repeated = [replace(row, fields={"weight": 1}) for row in weighted for _ in range(row.fields["weight"])]
    assert losses(weighted) == pytest.approx(losses(repeated), rel=1e-3)
    soft = [replace(row, label=0.5, fields={"weight": 2}) for row in weighted[:4]]
    both = [replace(row, label=label, fields={"weight": 1}) for row in weighted[:4] for label in (0, 1)]
    assert losses(soft + weighted[4:]) == pytest.approx(losses(both + weighted[4:]), rel=1e-3)


def test_the_folder_of_a_run_shows_its_course(start, tmp_path):
    config = replace(LORA, epochs=1, augment="light", report_to="tensorboard")
    finetune(start, ROWS, VALIDATION, config=config, run=tmp_path / "run", progress=False)
    assert "It is red." in (tmp_path / "run/augmentation.html").read_text(encoding="utf-8")
    assert [*(tmp_path / "run/runs").rglob("events.out.tfevents.*")]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"augmentation.html", "run.json", "runs"}


def test_unknown_places_to_report_to_are_refused(start):
    with pytest.raises(ConfigError, match="report_to 'blackboard'"):
        finetune(start, ROWS, VALIDATION, config=replace(LORA, report_to="blackboard"), progress=False)


def test_a_malformed_objective_is_refused_before_any_training():
    with pytest.raises(ConfigError, match="objective 'nonsense'"):
        replace(FULL, objective="nonsense")


def test_a_batch_is_prepared_while_the_model_is_at_the_one_before(start, monkeypatch):
    """The batches and what is learned from them stay those of one after the other."""
    config = replace(FULL, epochs=2, batch_size=4)
    prepare_batch, training_step = Collator.__call__, FinetuneTrainer.training_step
    begun: list[tuple[int, list[int]]] = []
    following = threading.Semaphore(0)

    def noting(self, slots):
        begun.append((self.epoch, [row for row, _ in slots]))
        following.release()
        return prepare_batch(self, slots)

    def waiting(self, *arguments):
        step = self.state.global_step % self.steps_per_epoch
        for _ in range(2 if step == 0 else int(step < self.steps_per_epoch - 1)):  # its own, and the next one
            assert following.acquire(timeout=LIMIT)
        return training_step(self, *arguments)

    expected = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    monkeypatch.setattr(Collator, "__call__", noting)
    monkeypatch.setattr(FinetuneTrainer, "training_step", waiting)
    found = finetune(start, ROWS, VALIDATION, config=config, progress=False)
    assert found.history == expected.history
    for epoch in (0, 1):
        assert sorted(row for there, rows in begun if there == epoch for row in rows) == list(range(len(ROWS)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read-ahead", "read-picture"))]


def test_a_picture_that_is_gone_is_an_error_and_ends_the_threads(start, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (56, 56)).save(path)
    rows = [*ROWS, replace(ROWS[0], image=str(path))]
    training_step = FinetuneTrainer.training_step

    def removing(self, *arguments):
        path.unlink(missing_ok=True)
        return training_step(self, *arguments)

    monkeypatch.setattr(FinetuneTrainer, "training_step", removing)
    with pytest.raises(ImageError, match=r"a\.png"):
        finetune(start, rows, VALIDATION, config=replace(FULL, epochs=3, batch_size=4), progress=False)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read-ahead", "read-picture"))]


def test_attention_of_many_lengths_takes_the_same_steps(still, request):
    """As it trains on GPUs: by its definition here. Rows share pictures, whose prefix comes once."""
    rows = [*ROWS, *(replace(row, text="Is it blue?", label=1 - row.label) for row in ROWS[:8])]
    config = replace(LORA, towers="llm", epochs=2)
    wanted = finetune(still, rows, VALIDATION, config=config, progress=False)
    request.getfixturevalue("varlen_anywhere")
    seen = finetune(still, rows, VALIDATION, config=config, progress=False)
    assert {causal for _, causal in varlen_definition.calls} == {False, True}
    assert_same_course(seen, wanted, rel=1e-3)
