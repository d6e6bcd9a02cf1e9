"""`demo`: training wins, what it says is so, and the commands it ends with run."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from qwen_vl_classifier import Classifier, TrainConfig, load_examples
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.scenes import colour_match
from qwen_vl_classifier.training.probe import probe

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--taps", "text:1", "--heads", "linear")


def commands(output: str) -> list[list[str]]:
    """Return the arguments of the commands that the demo ends with."""
    return [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("  qwen-vl-classifier ")]


def check_commands(made: list[list[str]], capsys, *, quick: tuple[str, ...]) -> None:
    """Run what can be run to an end, and parse the command that serves."""
    assert [command[0] for command in made] == ["predict", "train", "serve"]
    for command in made[:2]:
        assert main([*command, *(quick if command[0] == "train" else ())]) == 0, capsys.readouterr().err
    assert (Path(made[2][1]) / "classifier.json").is_file()


@pytest.fixture
def out(tmp_path, monkeypatch, blank_plots) -> Path:
    """Give the demo few pictures and one tap, and a folder whose name a shell would split."""
    monkeypatch.setattr(colour_match, "write_task", partial(colour_match.write_task, train=80, test=40, new=3))
    quick = TrainConfig(taps="text:1", heads="linear")
    monkeypatch.setattr(probe, "train", partial(probe.train, config=quick))
    return tmp_path / "of two words"


def test_training_wins_and_the_commands_run(out, capsys):
    assert main(["demo", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert max(len(line) for line in output.splitlines() if str(out) not in line) <= 80
    assert "\nLearned something: accuracy " in output
    words = " ".join(output.split())
    assert "classifier is right more often than zero-shot" in words
    assert len(re.findall(r"probability of 'matching' [01]\.\d{3}", words)) == 3
    made = commands(output)
    check_commands(made, capsys, quick=QUICK)
    assert len((out / "scored.csv").read_text().splitlines()) == 1 + 3
    assert Classifier.load(out / "my-classifier").label_names == colour_match.CLASSES
    evaluation = json.loads((out / "report" / "evaluation.json").read_text())
    assert evaluation["measured"]["data"] == str(out / "data" / "test.csv")
    assert evaluation["classifier"]["label_names"] == list(colour_match.CLASSES)
    assert f"{evaluation['metrics']['accuracy']['value']:.1%}".replace("%", " %") in words


@pytest.mark.soak
def test_the_whole_demo(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    output = " ".join(capsys.readouterr().out.split())
    shares = [float(share) for share in re.findall(r"(\d+\.\d) %", output.split("right more often")[1])[:2]]
    assert shares[0] > 94
    assert shares[1] < 62
    test = load_examples(tmp_path / "demo" / "data" / "test.csv", positive="matching")
    assert len(test) == 200
