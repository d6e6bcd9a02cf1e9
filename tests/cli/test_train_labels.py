"""train with several labels: what is saved and said, and which flags do not go together."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qwen_vl_classifier.classifier.panel_folder import read_panel
from qwen_vl_classifier.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ("--taps", "mean:2", "--heads", "linear", "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table of parts, of which some are scratched and some dirty, and the same photos by class."""
    made = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    lines = ["image,text,scratch,dirty,state"]
    for number in range(24):
        picture = Image.new("RGB", (56, 56), tuple(int(value) for value in rng.integers(150, 220, 3)))
        scratch, dirty = number % 2, number % 3 == 0
        if scratch:
            ImageDraw.Draw(picture).line([(5, int(rng.integers(50))), (50, 40)], fill="white", width=5)
        if dirty:
            ImageDraw.Draw(picture).ellipse([10, 10, 40, 35], fill="black")
        state = ("scratched" if scratch else "good") if not dirty else "dirty"
        (made / "photos" / state).mkdir(parents=True, exist_ok=True)
        picture.save(made / "photos" / state / f"{number}.png")
        known = "" if number % 4 == 1 else ("yes" if dirty else "no")
        lines.append(f"photos/{state}/{number}.png,A metal part.,{scratch},{known},{state}")
    (made / "parts.csv").write_text("\n".join(lines) + "\n")
    return made


def test_labels_become_a_panel(folder, tmp_path, capsys):
    out, features = tmp_path / "panel", tmp_path / "kept"
    data = (str(folder / "parts.csv"), "--labels", "scratch, dirty", "--features", str(features))
    assert main(["train", *data, *TINY, "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "labels: right more often than guessing on new rows." in output
    assert [line.split()[:2] for line in output.splitlines() if "linear" in line] == [
        ["scratch", "24"],
        ["dirty", "18"],
    ]
    commands = [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("  qwen-vl-classifier ")]
    assert [command[:2] for command in commands] == [["serve", str(out)], ["evaluate", str(out)]]
    saved = read_panel(out)
    assert (saved.names, saved.one_of) == (("scratch", "dirty"), False)
    assert saved.training["text"] == "A metal part."
    assert main(["train", *data, *TINY, "--out", str(out)]) == 2
    assert "holds a saved panel; give a new folder, or --overwrite" in capsys.readouterr().err
    (command,) = (command for command in commands if command[0] == "evaluate")
    command[2] = str(folder / "parts.csv")
    assert main([*command, "--resamples", "10", "--no-checks", "--quiet"]) == 0
    evaluation = json.loads((tmp_path / "panel-report" / "evaluation.json").read_text())
    assert [label["rows"]["labelled"] for label in evaluation["labels"]] == [24, 18]


@pytest.mark.parametrize("source", ["folders", "words"])
def test_classes_are_words_or_folders(folder, tmp_path, capsys, source):
    data = (
        [str(folder / "photos"), "--text", "A metal part."]
        if source == "folders"
        else [str(folder / "parts.csv"), "--label-column", "state"]
    )
    assert main(["train", *data, "--one-of", *TINY, "--out", str(tmp_path / "panel")]) == 0
    output = capsys.readouterr().out
    assert "Macro-F1" in output
    saved = read_panel(tmp_path / "panel")
    assert (saved.names, saved.one_of) == (("dirty", "good", "scratched"), True)
    assert saved.temperature == saved.training["one_of"]["temperature"]
    assert saved.training["training_rows"] == 24


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "scratch,dirty", "--positive", "1"], "--positive with --labels"),
        (["--labels", "scratch,dirty", "--class-names", "no,yes"], "--class-names with --labels"),
        (["--labels", "scratch,dirty", "--soft-labels"], "--soft-labels with --labels"),
        (["--labels", "scratch,dirty", "--label-column", "state"], "--label-column with --labels"),
        (["--one-of", "--positive", "good"], "--positive with --one-of"),
        (
            ["--one-of", "--label-column", "state", "--target-error-rate", "0.1"],
            "--target-error-rate 0.1 with --one-of",
        ),
        (["--labels", "scratch", "--one-of"], "--one-of with the one label 'scratch'"),
        (["--labels", "scratch,dirtyy"], "did you mean 'dirty'?"),
        (["--labels", "scratch,dirty", "--one-of"], "line 5: 'scratch' and 'dirty' are both 1"),
        (["--one-of"], "name its column with --label-column, or the column of each label with --labels"),
    ],
)
def test_what_does_not_go_together(folder, tmp_path, capsys, flags, message):
    assert main(["train", str(folder / "parts.csv"), *flags, *TINY, "--out", str(tmp_path / "panel")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "panel").exists()


def test_labels_without_names_are_refused(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(folder / "parts.csv"), "--labels", " , ", "--out", str(tmp_path / "panel")])
    assert "expected names of columns, such as defect,dirty" in capsys.readouterr().err
