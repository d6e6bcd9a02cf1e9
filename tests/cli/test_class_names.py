"""What classes are called: the words of the data, recorded for good, and read again by every verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_vl_classifier import Classifier
from qwen_vl_classifier.classifier.artifact import read_manifest
from qwen_vl_classifier.cli.main import main

QUICK = ("--device", "cpu", "--taps", "mean:-1", "--heads", "linear")


def data(folder: Path, name: str, words: tuple) -> Path:
    path = folder / f"{name}.jsonl"
    rows = [
        {"image": None, "text": f"The finding, said number {n}.", "label": words[n % len(words)]} for n in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a classifier that was trained with `--positive pneumonia` on two words."""
    folder = tmp_path_factory.mktemp("names")
    trained = data(folder, "train", ("normal", "pneumonia"))
    assert main(["train", str(trained), "--positive", "pneumonia", "--out", str(folder / "clf"), *QUICK]) == 0
    return folder


def evaluate(folder: Path, words: tuple, *flags: str) -> int:
    return main(
        ["evaluate", str(folder / "clf"), str(data(folder, "test", words)), "--device", "cpu", "--no-checks", *flags]
    )


def test_both_words_are_recorded(folder):
    assert read_manifest(folder / "clf").label_names == ("normal", "pneumonia")


@pytest.mark.parametrize("words", [("pneumonia", "normal"), (" pneumonia", "normal "), (1, 0), (True, False)])
def test_evaluate_reads_them_without_being_told(folder, capsys, blank_plots, words):
    assert evaluate(folder, words, "--out", str(folder / "report")) == 0
    out = capsys.readouterr().out
    assert "\nlabel normal " in out
    assert "answer pneumonia" in out
    report = json.loads((folder / "report" / "evaluation.json").read_text())
    assert [row["label"] for row in report["predictions"]] == [1, 0] * 15


def test_other_words_are_refused(folder, capsys):
    assert evaluate(folder, ("pneumonia", "covid")) == 2
    error = capsys.readouterr().err
    assert "label is 'covid', expected 'normal' or 'pneumonia' (or 0 or 1)" in error
    assert "'covid' (15 rows), 'pneumonia' (15 rows)" in error
    assert evaluate(folder, ("Pneumonia", "normal"), "--positive", "pneumonia") == 2
    assert "did you mean 'Pneumonia'?" in capsys.readouterr().err
    assert evaluate(folder, ("pneumonia", "normal"), "--positive", "normal") == 2
    assert "but class 0 is called 'normal'" in capsys.readouterr().err


def test_predictions_have_them(folder, capsys, scores_here):
    classifier = str(folder / "clf")
    assert main(["predict", classifier, "-", "A claim.", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["label_name"] in ("normal", "pneumonia")
    rows, out = data(folder, "some", ("x",)), folder / "scores"
    assert main(["score", classifier, str(rows), "--out", str(out), "--format", "jsonl", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (out / "shards" / "000000.jsonl").read_text().splitlines()]
    assert all(line["label_name"] == ("normal", "pneumonia")[line["label"]] for line in lines)
    assert main(["score", classifier, str(rows), "--out", str(out), "--format", "jsonl", "--device", "cpu"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_more_than_two_words(tmp_path):
    trained = data(tmp_path, "train", ("normal", "pneumonia", "covid"))
    assert main(["train", str(trained), "--positive", "pneumonia", "--out", str(tmp_path / "clf"), *QUICK]) == 0
    assert Classifier.load(tmp_path / "clf", device="cpu").label_names == ("not pneumonia", "pneumonia")
    assert evaluate(tmp_path, ("asthma", "pneumonia")) == 0


def test_names_for_numbers(tmp_path, capsys):
    trained = data(tmp_path, "train", (0, 1))
    train = ["train", str(trained), "--out", str(tmp_path / "clf"), *QUICK]
    assert main([*train, "--class-names", "normal,pneumonia"]) == 0
    assert read_manifest(tmp_path / "clf").label_names == ("normal", "pneumonia")
    for words in (("normal", "pneumonia"), (0, 1)):
        assert evaluate(tmp_path, words) == 0
    for names in ("normal", "a,b,c", "a,", "a,a"):
        with pytest.raises(SystemExit):
            main([*train, "--class-names", names])
        assert "expected two different words" in capsys.readouterr().err


def test_folders_are_classes(tmp_path, capsys):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(8):
            shade = 20 * number + 100 * (name == "dog")
            Image.new("RGB", (32, 32), (shade, 50, 50)).save(tmp_path / "pets" / name / f"{number}.png")
    pets = [str(tmp_path / "pets"), "--text", "Is it a dog?"]
    assert main(["train", *pets, "--positive", "dog", "--out", str(tmp_path / "clf"), *QUICK]) == 0
    assert read_manifest(tmp_path / "clf").label_names == ("cat", "dog")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "clf"), *pets, "--device", "cpu", "--no-checks"]) == 0
    assert "\nlabel dog " in capsys.readouterr().out
