"""How commands that train end: the verdict first, what was kept, and commands that run as they are printed."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import pytest

from qwen_vl_classifier.cli.finetune import _history_lines
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.cli.shared.endings import command_line, features_line, next_commands
from qwen_vl_classifier.scenes.colour_match import QUESTION, write_task

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ("--positive", "matching", "--taps", "text:1", "--heads", "linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("photos") / "with a space"
    write_task(made, train=24, test=12, new=1)
    return made


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("  qwen-vl-classifier ")]


def test_train_ends_with_what_was_kept_and_the_next_command(folder, tmp_path, capsys, blank_plots):
    out, features = tmp_path / "my classifier", tmp_path / "kept"
    text = ("--text", QUESTION, "--features", str(features))
    data = (str(folder / "train"), "--validation", str(folder / "test"))
    assert main(["train", *data, *TINY, *text, "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert output.startswith(("Learned something: ", "No better than guessing"))
    plain = [line for line in output.splitlines() if str(tmp_path) not in line and str(folder) not in line]
    assert max(map(len, plain)) <= 80
    assert output.index("Chosen: ") < output.index("log loss ± s.e.") < output.index("Saved: ") < output.index("Next: ")
    size = sum(file.stat().st_size for file in features.glob("*.parquet"))
    assert f"Features: kept in {features} ({size / 1e3:.1f} kB in all)" in output
    (command,) = commands(output)
    assert command[:3] == ["evaluate", str(out), str(folder / "test")]
    assert command[3:7] == ["--text", QUESTION, "--features", str(features)]
    assert main([*command, "--resamples", "10", "--no-checks"]) == 0
    assert json.loads((tmp_path / "my classifier-report" / "evaluation.json").read_text())["rows"]["total"] == 12


def test_without_validation_rows_it_says_what_to_measure_on(folder, tmp_path, capsys):
    assert main(["train", str(folder / "train.csv"), *TINY, "--out", str(tmp_path / "made")]) == 0
    output = capsys.readouterr().out
    assert "Features: not kept; --features FOLDER keeps them" in output
    assert [command[:2] for command in commands(output)] == [
        ["serve", str(tmp_path / "made")],
        ["evaluate", str(tmp_path / "made")],
    ]
    assert "labelled rows that it was not trained on" in output


def test_commands_are_quoted_and_bytes_are_counted(tmp_path):
    assert shlex.split(command_line("train", Path("my photos"), "--text", "Is it a 'cat'?")) == [
        *("qwen-vl-classifier", "train", "my photos", "--text", "Is it a 'cat'?")
    ]
    for size, words in ((12, "12 bytes"), (2_500_000, "2.5 MB")):
        (tmp_path / "a.parquet").write_bytes(bytes(size))
        assert f"({words} in all)" in features_line(tmp_path)


def test_after_fine_tuning_both_are_compared(tmp_path):
    flags = argparse.Namespace(text=None, allow_outside=True, features=None, label_column="truth")
    *_, command = next_commands(tmp_path / "tuned", flags, start=Path("probe"))
    assert shlex.split(command)[1:] == [
        *("evaluate", "probe", str(tmp_path / "tuned"), "NEW_DATA", "--label-column", "truth", "--allow-outside"),
        *("--out", str(tmp_path / "tuned-comparison")),
    ]


def test_of_a_long_history_the_start_the_best_and_the_last_are_shown():
    rows = [
        {
            "step": step,
            "epoch": step / 10,
            "training_loss": None,
            "validation_log_loss": abs(step - 7),
            "validation_accuracy": 0.5,
        }
        for step in range(40)
    ]
    lines = _history_lines(rows)
    assert [int(line.split()[0]) for line in lines[1:-1]] == [0, 7, 35, 36, 37, 38, 39]
    assert lines[2].endswith("best")
    assert lines[-1] == "and 33 more in the log of the run"
