"""Runs survive: whatever ends one, going on gives the weights that it would have had, bit by bit.

Not covered: a machine that loses power (files are not flushed to disk one by one), and GPUs, where sums have no fixed
order.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Backbone, Classifier, Example, FeatureStore, FinetuneConfig, Tap, finetune
from qwen_vl_classifier.errors import ArtifactError, ConfigError, StoppedError, TrainingError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.files import room
from qwen_vl_classifier.files.whole import is_partial, new_file
from qwen_vl_classifier.training.finetuning import finetuning, resuming
from qwen_vl_classifier.training.finetuning.callbacks import LoopCallback
from qwen_vl_classifier.training.finetuning.trainer import FinetuneTrainer
from tests import nano
from tests.coloured_pictures import pictures
from tests.tuning import assert_same, snapshot, start_at

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]

# Three epochs of three steps; a checkpoint after every second step, validation after every third. Dropout in head and
# adapters, so that random numbers matter.
CONFIG = FinetuneConfig(
    learning_rate=1e-3, head_learning_rate=1e-2, epochs=3, batch_size=8, rank=2, save_steps=2, seed=5, patience=0
)
STEPS = 9

PROGRAM = (
    "import sys; from tests.training.finetuning import test_interruptions as here; here.die_in_turn(*sys.argv[1:])"
)


def rows() -> tuple[list[Example], list[Example]]:
    return pictures(22, seed=1), pictures(12, seed=2)


def die(owner: Any, name: str, when: Callable[..., bool], *, after: bool = False) -> Callable[[], None]:
    """Return what lets this process be killed before or after a call, where its arguments are such."""

    def arm() -> None:
        inner = getattr(owner, name)

        def dying(*arguments: Any, **options: Any) -> Any:
            now = when(*arguments)
            if now and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = inner(*arguments, **options)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, dying)

    return arm


def half_a_record() -> None:
    """Let this process be killed in the middle of writing what the run was asked to do."""

    def write_half(place: Path, text: str) -> None:
        with new_file(place) as file:
            file.write(text[: len(text) // 2].encode())
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    resuming.write_file = write_half


def partial_of(name: str) -> Callable[..., bool]:
    return lambda path, *_: is_partial(path.name) and path.name.startswith(f".{name}.")


def weights_in(folder: str) -> Callable[..., bool]:
    return lambda path, *_: path.parent.name == folder and path.name.startswith(".weights")


# Each goes on where the one before it was killed.
DEATHS: dict[str, Callable[[], None]] = {
    "before the first byte of the record": die(resuming, "write_file", lambda *_: True),
    "in the middle of the record": half_a_record,
    "before the record has its name": die(Path, "replace", partial_of("run.json")),
    "after the record has its name": die(Path, "replace", partial_of("run.json"), after=True),
    "in the first step": die(FinetuneTrainer, "training_step", lambda loop, *_: loop.state.global_step == 0),
    "before the weights of a checkpoint have their name": die(Path, "replace", weights_in("checkpoint-2")),
    "before a checkpoint is marked": die(LoopCallback, "on_save", lambda *given: given[2].global_step == 2),
    "after a checkpoint is marked": die(LoopCallback, "on_save", lambda *given: given[2].global_step == 2, after=True),
    "in a step": die(FinetuneTrainer, "training_step", lambda loop, *_: loop.state.global_step == 3, after=True),
    "before the best weights have their name": die(Path, "replace", weights_in("best")),
    "in the middle of a checkpoint": die(
        FinetuneTrainer, "_save_rng_state", lambda loop, _: loop.state.global_step == 8
    ),
    "before the best weights are read": die(finetuning, "load_trained_weights", lambda *_: True),
    "before the result has its name": die(Path, "replace", partial_of("out")),
    "after the result has its name": die(Path, "replace", partial_of("out"), after=True),
    "when the run has ended": die(resuming, "_write", lambda _, record: "ended" in record, after=True),
    "when the next run has begun": die(FinetuneTrainer, "training_step", lambda *_: True),
}


def die_in_turn(saved: str, run: str, out: str, weights: str) -> None:
    """Run in a process of its own: let a child die each death, then one live; print how each ended."""
    torch.set_num_threads(1)
    require("peft", extra="finetune")  # once, not in each child
    gc.freeze()
    config = replace(CONFIG, report_to="none")
    ends = {}
    for name, arm in {**DEATHS, "": lambda: None}.items():
        child = os.fork()
        if child == 0:
            try:
                arm()
                start = Classifier.load(saved, device="cpu")
                options = {"config": config, "run": run, "out": out, "progress": False}
                try:
                    result = finetune(start, *rows(), resume=True, **options)
                except ConfigError:  # it has ended: there is nothing to go on with
                    result = finetune(start, *rows(), **options)
                torch.save(snapshot(result.classifier), weights)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ends[name] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), Path(out).is_dir()]
    print(json.dumps(ends))


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


@pytest.mark.parametrize(
    # Before there is a checkpoint, and in the last step; all others in the long run.
    "step",
    [pytest.param(step, marks=[] if step in (1, 8) else pytest.mark.soak) for step in range(STEPS)],
)
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


@pytest.mark.long
def test_kill_nine_at_every_moment(start, whole, tmp_path, fresh):
    run, out, weights = (tmp_path / name for name in ("run", "out", "weights.pt"))
    done = fresh.run(PROGRAM, start.save(tmp_path / "start"), run, out, weights)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    assert {name: end for name, (end, _) in ends.items()} == {**dict.fromkeys(DEATHS, -signal.SIGKILL), "": 0}
    assert [name for name, (_, is_saved) in ends.items() if is_saved] == [
        *("after the result has its name", "when the run has ended", "when the next run has begun", ""),
    ]
    assert_same(torch.load(weights, weights_only=True), snapshot(whole.classifier))
    examples = rows()[1]
    seen = Classifier.load(out, device="cpu").predict_proba(examples)
    np.testing.assert_array_equal(seen, whole.classifier.predict_proba(examples))
    assert [path.name for path in run.iterdir()] == ["run.json"]


def test_sigterm_saves_after_the_step_and_stops(start, whole, tmp_path, monkeypatch):
    inner = FinetuneTrainer.training_step

    def training_step(self, *arguments):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", training_step)
        with pytest.raises(StoppedError, match=r"after step 5 of 9, saved in .*; continue with resume=True"):
            finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ConfigError, match="holds a run stopped after step 5; continue with resume=True"):
        finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    result = finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", resume=True, progress=False)
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))


def test_a_request_that_reached_another_process_stops_this_one_too(start, tmp_path, monkeypatch):
    """The processes of a run decide together, and one that SIGTERM has not reached must not take the run for ended."""
    together = FinetuneTrainer._over_processes

    def over_processes(self, value):
        here = together(self, value)
        return here + (self.state.global_step == 5) if isinstance(value, bool) else here

    monkeypatch.setattr(FinetuneTrainer, "_over_processes", over_processes)
    with pytest.raises(StoppedError, match="after step 5 of 9"):
        finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "checkpoint-5" / "complete").is_file()


def killed(*_arguments: object) -> None:
    raise RuntimeError("killed")


def test_a_run_that_ended_before_its_result_was_saved_gives_it(start, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "load_trained_weights", killed)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    result = finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", resume=True, progress=False)
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))


def unsaved(*_arguments: object) -> None:
    raise ArtifactError("out: cannot be written (No space left on device); give a folder on a disk with room")


@pytest.mark.parametrize("patience", [0, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kept", [True, False], ids=["run", "no run"])
def test_a_result_that_cannot_be_saved_is_saved_without_training_again(start, tmp_path, monkeypatch, patience, kept):
    """Also where it stopped between checkpoints, and where nobody asked for a folder of the run."""
    still = {"learning_rate": 1e-30, "head_learning_rate": 1e-30} if patience else {}
    config = replace(CONFIG, patience=patience, save_steps=100, **still)
    given = {"config": config, "out": tmp_path / "out", "progress": False}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "save", unsaved)
        run = {"run": tmp_path / "run"} if kept else {}
        with pytest.raises(
            ArtifactError, match=r"No space left .*; what was trained is kept in (.*): the same"
        ) as caught:
            finetune(start, *rows(), **given, **run)
    assert "resume=True and another out= and run=" in str(caught.value)
    folder = Path(str(caught.value).split("is kept in ")[1].split(": the same")[0])
    assert folder.is_dir()
    monkeypatch.setattr(FinetuneTrainer, "training_step", killed)
    result = finetune(start, *rows(), **given, run=folder, resume=True)
    assert [look["step"] for look in result.history] == ([0, 3] if patience else [0, 3, 6, 9])
    assert Classifier.load(tmp_path / "out", device="cpu").training == json.loads(
        json.dumps(result.classifier.training)
    )
    with pytest.raises(ConfigError, match=f"its run has ended, and its classifier was saved in {tmp_path / 'out'}"):
        finetune(start, *rows(), **given, run=folder, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", folder.name}


def test_nothing_is_left_of_a_run_that_nobody_asked_for(start, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    finetune(start, *rows(), config=replace(CONFIG, epochs=1), out=tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_places_are_looked_at_before_training(start, tmp_path, monkeypatch):
    monkeypatch.setattr(FinetuneTrainer, "training_step", killed)
    (tmp_path / "file").touch()
    out = tmp_path / "out"
    for given, problem in (
        ({"out": tmp_path / "file"}, "is a file|is not a saved classifier"),
        ({"out": tmp_path / "file" / "out"}, "cannot be written"),
        ({"out": tmp_path}, "is not a saved classifier"),
        ({"out": out, "run": out / "run"}, "lies in .*, which is replaced"),
        ({"out": out, "run": tmp_path / "file" / "run"}, "cannot be written"),
    ):
        with pytest.raises((ConfigError, ArtifactError), match=problem):
            finetune(start, *rows(), config=CONFIG, progress=False, **given)
    with pytest.raises(ConfigError, match=r"^features=.* lies in"):
        finetune(start, *rows(), config=CONFIG, out=out, store=FeatureStore(out / "features"), progress=False)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="fine-tuning will take about"):
        finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)


def test_a_full_disk_says_how_to_go_on(start, whole, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def in_torchs_words(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file")

    for step, failing in ((2, full), (4, in_torchs_words)):
        with monkeypatch.context() as patch:
            patch.setattr(
                FinetuneTrainer,
                "_save_rng_state",
                lambda loop, *_, step=step, failing=failing: failing() if loop.state.global_step == step else None,
            )
            with pytest.raises(TrainingError, match=r"cannot be written .*continue from the last checkpoint with"):
                finetune(start, *rows(), config=CONFIG, run=tmp_path / f"run{step}", progress=False)
    result = finetune(start, *rows(), config=CONFIG, run=tmp_path / "run2", resume=True, progress=False)
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))


def test_weights_of_classes_do_not_keep_a_run_from_going_on(start, tmp_path, monkeypatch):
    """Their keys are numbers, and texts in the record."""
    config = replace(CONFIG, class_weight={0: 1.0, 1: 5.0}, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(start, *rows(), config=config, run=tmp_path / "run", progress=False)
    assert finetune(start, *rows(), config=config, run=tmp_path / "run", resume=True, progress=False).history


def test_nan_stops_with_the_rows_named_and_the_last_good_state_kept(start, whole, tmp_path, monkeypatch):
    forward = FinetuneTrainer._accumulate

    def poisoned(self, model, batch, *arguments):
        if self.state.global_step == 5:
            batch["targets"][0] = np.nan
        return forward(self, model, batch, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "_accumulate", poisoned)
        with pytest.raises(TrainingError, match=r"the loss is nan in the batch of r\d+, r\d+.*lower the learning rate"):
            finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run/checkpoint-4/trainer_state.json").read_text())["global_step"] == 4
    assert not (tmp_path / "run/checkpoint-6").exists()
    result = finetune(start, *rows(), config=CONFIG, run=tmp_path / "run", resume=True, progress=False)
    assert_same(snapshot(result.classifier), snapshot(whole.classifier))
