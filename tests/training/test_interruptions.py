"""Runs survive: whatever ends one, going on gives the weights that it would have had, bit by bit.

Not covered: a machine that loses power (files are not flushed to disk one by one), and GPUs, where sums have no fixed
order.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Backbone, Classifier, Example, FinetuneConfig, Tap, finetune
from qwen_vl_classifier.errors import ConfigError, StoppedError, TrainingError
from qwen_vl_classifier.training import finetune as module
from qwen_vl_classifier.training.trainer import FinetuneTrainer
from tests import nano
from tests.shades import pictures
from tests.tuning import assert_same, snapshot, start_at

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]

# Three epochs of three steps; a checkpoint after every second step, validation after every third. Dropout in head and
# adapters, so that random numbers matter.
CONFIG = FinetuneConfig(
    learning_rate=1e-3, head_learning_rate=1e-2, epochs=3, batch_size=8, rank=2, save_steps=2, seed=5, patience=0
)
STEPS = 9

FRESH = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from dataclasses import replace
from tests.training import test_interruptions as here

here.die_at(int(sys.argv[3]), sys.argv[4])
result = here.finetune(
    here.Classifier.load(sys.argv[1], device="cpu"), *here.rows(), config=here.CONFIG, run=sys.argv[2], resume=True,
    progress=False,
)
torch.save(here.snapshot(result.classifier), sys.argv[5])
"""


def rows() -> tuple[list[Example], list[Example]]:
    return pictures(22, seed=1), pictures(12, seed=2)


def die_at(step: int, where: str) -> None:
    """Let this process be killed in the middle of a step, or in the middle of writing after it."""
    if where == "step":
        inner = FinetuneTrainer.training_step

        def training_step(self, *arguments):
            loss = inner(self, *arguments)
            if self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss

        FinetuneTrainer.training_step = training_step
    elif where == "checkpoint":
        save_rng_state = FinetuneTrainer._save_rng_state

        def dying(self, folder):
            if self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            save_rng_state(self, folder)

        FinetuneTrainer._save_rng_state = dying


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Classifier:
    folder = tmp_path_factory.mktemp("interruptions")
    checkpoint = nano.make_checkpoint("qwen2_5_vl", folder / "checkpoint")
    backbone = Backbone.load(checkpoint, device="cpu", dtype="float32")
    return start_at(backbone, Tap(3, "mean"))


@pytest.fixture(scope="module")
def whole(start):
    """The run that nothing interrupts."""
    return finetune(start, *rows(), config=CONFIG, progress=False)


def test_a_run_of_its_own_is_as_one_without_a_folder(start, whole, tmp_path):
    kept = finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    assert kept.history == whole.history
    assert [row["step"] for row in whole.history] == [0, 3, 6, 9]
    assert_same(snapshot(kept.classifier), snapshot(whole.classifier))
    assert not [*(tmp_path / "run").glob("checkpoint-*")]


@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_goes_on_after_an_error_in_any_step(start, whole, tmp_path, monkeypatch, step):
    inner = FinetuneTrainer.training_step

    def failing(self, *arguments):
        if self.state.global_step == step:
            raise RuntimeError("the disk, the net, the dog")
        return inner(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", failing)
        with pytest.raises(RuntimeError, match="the dog"):
            finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    result = finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", resume=True, progress=False)
    losses = [row["validation_log_loss"] for row in result.history]
    assert losses == [row["validation_log_loss"] for row in whole.history]
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))


def test_kill_nine_in_a_step_and_while_writing(start, whole, tmp_path):
    saved, run, weights = start.save(tmp_path / "start"), tmp_path / "run", tmp_path / "weights.pt"
    for step, where in ((3, "step"), (8, "checkpoint"), (-1, "")):
        command = [sys.executable, "-c", FRESH, str(saved), str(run), str(step), where, str(weights)]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        assert status == (0 if step < 0 else -signal.SIGKILL)
    assert_same(torch.load(weights, weights_only=True), snapshot(whole.classifier))


def test_sigterm_saves_after_the_step_and_stops(start, whole, tmp_path, monkeypatch):
    inner = FinetuneTrainer.training_step

    def training_step(self, *arguments):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", training_step)
        with pytest.raises(StoppedError, match=r"after step 5 of 9, saved in .*; go on with --resume"):
            finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ConfigError, match="holds a run stopped after step 5; go on with --resume"):
        finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    result = finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", resume=True, progress=False)
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))


def killed(*_arguments: object) -> None:
    raise RuntimeError("killed")


def test_a_run_that_ended_before_its_result_was_saved_gives_it(start, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_best", killed)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    result = finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", resume=True, progress=False)
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))


def test_nan_stops_with_the_rows_named_and_the_last_good_state_kept(start, whole, tmp_path, monkeypatch):
    forward = FinetuneTrainer._accumulate

    def poisoned(self, model, batch, *arguments):
        if self.state.global_step == 5:
            batch["encoded"][0].pictures.pixel_values[:] = np.nan
        return forward(self, model, batch, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "_accumulate", poisoned)
        with pytest.raises(TrainingError, match=r"the loss is nan in the batch of r\d+, r\d+.*lower the learning rate"):
            finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run/checkpoint-4/trainer_state.json").read_text())["global_step"] == 4
    assert not (tmp_path / "run/checkpoint-6").exists()
    result = finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", resume=True, progress=False)
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))
