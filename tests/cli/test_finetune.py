"""`finetune` on the command line: from a checkpoint in one go, stopped and resumed, and what it says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Tap
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.training.finetuning.trainer import FinetuneTrainer
from tests import nano
from tests.tuning import start_at


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty plain pictures, red (1) or blue (0), and a checkpoint beside them."""
    folder = tmp_path_factory.mktemp("finetune")
    nano.make_checkpoint("qwen2_5_vl", folder / "checkpoint")
    lines = []
    for number in range(40):
        colour = (150 + number, number, 0) if number % 2 else (number, 0, 150 + number)
        Image.new("RGB", (56, 56), colour).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "text": "It is red.", "label": number % 2})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def start(data) -> Path:
    """A saved classifier."""
    backbone = Backbone.load(data / "checkpoint", device="cpu", dtype="float32")
    return start_at(backbone, Tap(3, "mean")).save(data / "start")


def command(data: Path, out: Path, *flags: str) -> list[str]:
    course = ["--epochs", "2", "--batch-size", "8", "--learning-rate", "1e-3", "--save-steps", "1"]
    return ["finetune", str(data / "train.jsonl"), *course, "--device", "cpu", "--out", str(out), *flags]


def test_from_a_checkpoint_to_a_classifier(data, start, tmp_path, capsys):
    model = ["--model", str(data / "checkpoint"), "--dtype", "float32"]
    flags = ["--features", str(tmp_path / "features"), "--augment", "light", "--report-to", "none"]
    assert main(command(data, tmp_path / "tuned", *model, *flags)) == 0
    printed = capsys.readouterr()
    assert "validation log loss" in printed.out
    assert printed.out.startswith(("Kept the fine-tuned state: log loss ", "Kept the start: no fine-tuned state was"))
    assert "The validation rows stand for " in printed.out
    assert f"\nSaved: {tmp_path / 'tuned'}\nLogs of the run: {tmp_path / 'tuned-run'}\n" in printed.out
    assert f"Features: kept in {tmp_path / 'features'} (" in printed.out
    assert max(len(line) for line in printed.out.splitlines() if str(tmp_path) not in line) <= 80
    assert "fine-tune: 100%" in printed.err
    assert "validation=" in printed.err
    assert (tmp_path / "tuned-run" / "augmentation.html").is_file()
    assert Classifier.load(tmp_path / "tuned", device="cpu").training["method"] in ("lora", "probe")
    # The run has ended, so that the next may begin in its folder.
    assert main(command(data, tmp_path / "tuned", "--from", str(start), "--report-to", "none", "--overwrite")) == 0


def test_sigterm_ends_with_status_zero_and_resume_goes_on(data, start, tmp_path, capsys, monkeypatch):
    inner = FinetuneTrainer.training_step

    def training_step(self, *arguments):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "training_step", training_step)
        assert main(command(data, tmp_path / "tuned", "--from", str(start))) == 0
    assert "stopped by SIGTERM after step 3 of 8" in capsys.readouterr().out
    assert not (tmp_path / "tuned").exists()
    assert main(command(data, tmp_path / "tuned", "--from", str(start))) == 2
    assert "continue with --resume" in capsys.readouterr().err
    assert main(command(data, tmp_path / "tuned", "--from", str(start), "--resume")) == 0
    assert (tmp_path / "tuned" / "classifier.json").is_file()


def test_an_option_that_cannot_be_is_one_line(data, tmp_path, capsys):
    assert main(command(data, tmp_path / "tuned", "--method", "full", "--merge")) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_a_folder_that_cannot_be_replaced_is_refused_before_any_work(tmp_path, capsys, verb):
    """Also before the data are looked at: there are none here."""
    (tmp_path / "thesis.tex").touch()
    assert main([verb, str(tmp_path / "missing.jsonl"), "--out", str(tmp_path)]) == 2
    assert "exists and is not a saved classifier" in capsys.readouterr().err


def test_names_threshold_and_band_are_those_that_were_asked_for(data, start, tmp_path, capsys):
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    named = data / "named.jsonl"
    named.write_text("".join(json.dumps({**row, "label": ("dog", "cat")[row["label"]]}) + "\n" for row in rows))
    model = ["--model", str(data / "checkpoint"), "--dtype", "float32", "--taps", "mean:3", "--heads", "linear"]
    answers = [
        "--positive",
        "cat",
        "--objective",
        "cost=3:1",
        "--target-error-rate",
        "0.2",
        "--validation-share",
        "0.3",
    ]
    for name, given in (("one", model), ("two", ["--from", str(start)])):
        flags = [*given, *answers, "--report-to", "none"]
        assert main(["finetune", str(named), *command(data, tmp_path / name, *flags)[2:]]) == 0
        printed = capsys.readouterr().out
        saved = Classifier.load(tmp_path / name, device="cpu")
        assert saved.label_names == ("dog", "cat")
        assert saved.training["threshold"]["objective"] == "cost=3:1"
        assert saved.training["abstention"]["target_error_rate"] == 0.2
        words = " ".join(printed.split())
        chosen = "chosen for the lowest cost, where a miss costs 3 and a false alarm 1."
        assert f'Threshold: "cat" from a probability of {saved.threshold:.3f} on, {chosen}' in words
        assert "at most 0.2 of all rows are expected to be decided wrongly" in words


def test_flags_of_a_checkpoint_beside_a_classifier_are_refused(data, start, tmp_path, capsys):
    for flag in (["--dtype", "float32"], ["--heads", "linear"], ["--max-pixels", "5000"]):
        assert main(command(data, tmp_path / "tuned", "--from", str(start), *flag)) == 2
        assert f"{' '.join(flag)} with --from: the classifier has its own" in capsys.readouterr().err


def test_going_on_with_a_run_that_has_ended_says_so(data, start, tmp_path, capsys, monkeypatch):
    flags = ["--from", str(start), "--epochs", "1", "--report-to", "none"]
    assert main(command(data, tmp_path / "tuned", *flags)) == 0
    capsys.readouterr()
    monkeypatch.setattr(FinetuneTrainer, "train", None)
    assert main(command(data, tmp_path / "tuned", *flags, "--resume")) == 2
    message = capsys.readouterr().err
    assert f"its run has ended, and its classifier was saved in {tmp_path / 'tuned'}" in message
    assert message.endswith("leave out --resume to train again\n")


def test_a_save_that_fails_loses_nothing(data, start, tmp_path, capsys, monkeypatch):
    def save(*_: object) -> None:
        raise OSError(28, "No space left on device")

    flags = ["--from", str(start), "--epochs", "1", "--report-to", "none"]
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "save", save)
        assert main(command(data, tmp_path / "tuned", *flags)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in message
    assert f"what was trained is kept in {tmp_path / 'tuned-run'}" in message
    assert "the same command with --resume and another --out saves it without training" in message
    monkeypatch.setattr(FinetuneTrainer, "train", None)
    run = ["--run", str(tmp_path / "tuned-run"), "--resume"]
    assert main(command(data, tmp_path / "elsewhere", *flags, *run)) == 0
    assert (tmp_path / "elsewhere" / "classifier.json").is_file()


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys, verb):
    """Also before the data are looked at: there are none here."""
    (tmp_path / "file").touch()
    out = ["--out", str(tmp_path / "new")]
    for flags, problem in (
        (["--out", str(tmp_path / "file" / "new")], "cannot be written (Not a directory)"),
        (["--out", "/proc/new"], "cannot be written"),
        ([*out, "--features", str(tmp_path / "new" / "features")], "lies in"),
        *([([*out, "--run", str(tmp_path / "new")], "lies in")] if verb == "finetune" else []),
        *([([*out, "--run", str(tmp_path / "file")], "is not the folder of a run")] if verb == "finetune" else []),
    ):
        assert main([verb, str(tmp_path / "missing.jsonl"), *flags]) == 2
        message = capsys.readouterr().err
        assert problem in message
        assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
