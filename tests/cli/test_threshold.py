"""`threshold`: a copy of a classifier with another threshold, and what the new one changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_vl_classifier import Backbone, Classifier
from qwen_vl_classifier.classifier.artifact import read_manifest
from qwen_vl_classifier.cli.main import main

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def folder(tiny_backbone, tmp_path_factory) -> Path:
    """A folder with a classifier that abstains, and labelled rows of text."""
    folder = tmp_path_factory.mktemp("threshold")
    classifier = Classifier.zero_shot(tiny_backbone)
    classifier.label_names, classifier.abstention = ("fine", "broken"), (0.4, 0.6)
    classifier.save(folder / "clf")
    rows = [{"image": None, "text": f"Part {n} is broken.", "label": n % 2} for n in range(20)]
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_threshold_is_set_without_loading_the_backbone(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Backbone, "load", classmethod(lambda *_, **__: pytest.fail("the backbone was loaded")))
    assert main(["threshold", str(folder / "clf"), "--set", "0.9", "--out", str(tmp_path / "strict")]) == 0
    out = capsys.readouterr().out
    assert "0.9 (before: 0.5)" in out
    assert "never abstains" in out
    assert read_manifest(tmp_path / "strict").threshold == 0.9


def test_an_objective_chooses_it_and_its_effect_is_shown(folder, tmp_path, capsys):
    words = ["threshold", str(folder / "clf"), str(folder / "dev.jsonl"), "--objective", "recall>=0.8"]
    assert main([*words, "--out", str(tmp_path / "careful"), *CPU]) == 0
    lines = {line[: line.rfind("  ", 0, -10)].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert float(lines["recall of broken"][-1]) >= 0.8
    record = read_manifest(tmp_path / "careful").training["threshold"]
    assert record["objective"] == "recall>=0.8"


def test_rows_show_what_a_threshold_set_by_hand_does(folder, tmp_path, capsys):
    words = ["threshold", str(folder / "clf"), str(folder / "dev.jsonl"), "--set", "0", "--out", str(tmp_path / "all")]
    assert main([*words, *CPU]) == 0
    (answered,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("answers broken"))
    assert answered.split()[-1] == "20"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "f1"], "--objective without DATA"),
        (["--objective", "best"], "objective 'best'"),
        (["--set", "90"], "threshold is 90.0; expected a number from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(folder, tmp_path, capsys, words, message):
    assert main(["threshold", str(folder / "clf"), "--out", str(tmp_path / "new"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_classifier_is_replaced_only_with_overwrite(folder, tmp_path, capsys):
    words = ["threshold", str(folder / "clf"), "--out", str(tmp_path / "copy"), "--set"]
    assert main([*words, "0.7"]) == 0
    assert main([*words, "0.8"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "0.8", "--overwrite"]) == 0
    assert read_manifest(tmp_path / "copy").threshold == 0.8
