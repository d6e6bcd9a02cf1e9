"""`--model` says where the backbone of a saved classifier is now, in every verb that loads one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qwen_vl_classifier import Backbone, Classifier, ServeConfig, Tap
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.cli.flags import from_flags
from qwen_vl_classifier.cli.main import build_parser, main
from qwen_vl_classifier.scenes.statements import write_dataset
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread", "scores_here")


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> tuple[Path, Path]:
    """A classifier whose checkpoint is no longer where it was, and where that is now."""
    folder = tmp_path_factory.mktemp("moved")
    before = nano.make_checkpoint("qwen2_5_vl", folder / "before")
    backbone = Backbone.load(before, device="cpu", dtype="float32")
    spec = HeadSpec("linear", backbone.hidden_size)
    torch.manual_seed(0)
    saved = Classifier(backbone, Tap(2, "mean"), spec.build(), spec).save(folder / "saved")
    return saved, Path(shutil.move(before, folder / "now"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), split="test", name="rows", seed=0, scenes=8, per_scene=2)


def commands(saved: Path, data: Path, out: Path) -> list[list[str]]:
    other = shutil.copytree(saved, out.with_name("other"))
    return [
        ["predict", str(saved), "-", "a text"],
        ["explain", str(saved), "-", "a text"],
        ["evaluate", str(saved), str(data), "--no-checks", "--resamples", "10"],
        ["evaluate", str(saved), str(other), str(data), "--resamples", "10"],
        ["score", str(saved), str(data), "--out", str(out), "--workers", "1"],
    ]


@pytest.mark.parametrize("number", range(5))
def test_with_and_without(moved, data, tmp_path, capsys, number):
    saved, now = moved
    command = commands(saved, data, tmp_path / "out")[number]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "--model" in message
    assert str(now.with_name("before")) in message
    assert "Traceback" not in message
    assert main([*command, "--model", str(now)]) == 0


def test_serve_has_it_in_its_configuration():
    flags = build_parser().parse_args(["serve", "a", "--model", "b"])
    assert from_flags(ServeConfig, flags, classifiers=("a",)).model == "b"


def test_finetune_takes_it_for_the_classifier_to_start_from(moved, data, tmp_path, capsys):
    saved, now = moved
    command = ["finetune", str(data), "--from", str(saved), "--out", str(tmp_path / "tuned"), "--device", "cpu"]
    assert main(command) == 2
    assert "--model" in capsys.readouterr().err
    small = ["--epochs", "1", "--rank", "2", "--report-to", "none"]
    assert main([*command, *small, "--model", str(now)]) == 0
