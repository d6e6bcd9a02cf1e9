"""Verbs that are given a panel: those that describe, score and serve it, and those that need one of its labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from qwen_vl_classifier import Backbone, Panel, load_examples
from qwen_vl_classifier.classifier.panel_folder import read_panel
from qwen_vl_classifier.cli.main import main
from tests.panels import CLASSES, LABELS, make_panel

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def folder(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a panel of labels, a panel of classes, and rows of text."""
    folder = tmp_path_factory.mktemp("panels")
    make_panel(tiny_backbone).save(folder / "parts")
    make_panel(tiny_backbone, CLASSES, one_of=True, temperature=1.7, seed=1).save(folder / "animals")
    rows = [{"image": None, "text": f"Part {number}."} for number in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    assert main([str(word) for word in words]) == status
    streams = capsys.readouterr()
    return streams.err if status else streams.out


def test_info_describes_every_label(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(capsys, "info", folder / "parts")
    facts = dict(line.split("  ", 1) for line in out.splitlines())
    assert facts["answers"].strip() == "3 labels, each for itself"
    assert facts["label 2"].strip() == "scratch in scratch/, linear head at last:2, threshold 0.5"
    out = told(capsys, "info", folder / "animals")
    assert "one of 3 classes" in out
    assert "other animal in other-animal/, linear head at image:1" in out
    assert "1.7" in out


@pytest.mark.usefixtures("scores_here")
def test_score_writes_and_counts_labels_and_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = (folder / "parts", folder / "animals")
    out = told(capsys, "score", *both, folder / "rows.jsonl", "--out", tmp_path / "out", "--columns", "text", *CPU)
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines[2:6]] == [*LABELS, "animals"]
    rows = pq.read_table(tmp_path / "out" / "shards").to_pylist()
    examples = load_examples(folder / "rows.jsonl")
    for panel, names in zip(both, (LABELS, CLASSES), strict=True):
        found = [[row[f"probability_{name}"] for name in names] for row in rows]
        np.testing.assert_allclose(found, Panel.load(panel, device="cpu").predict_proba(examples), rtol=0, atol=1e-6)
    assert "class_animals" in rows[0]
    assert rows[3]["text"] == "Part 3."
    again = told(capsys, "score", *both, folder / "rows.jsonl", "--out", tmp_path / "out", "--columns", "text", *CPU)
    assert "nothing to do" in again


@pytest.mark.parametrize(
    "words",
    [
        ("explain", "PANEL", "-", "a text"),
        ("export", "PANEL", "--out", "NEW"),
        ("threshold", "PANEL", "--set", "0.9", "--out", "NEW"),
        pytest.param(("finetune", "DATA", "--from", "PANEL", "--out", "NEW"), marks=pytest.mark.soak),
    ],
)
def test_verbs_that_need_one_classifier_name_the_folders_of_the_labels(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    panel = folder / "parts"
    places = {"PANEL": panel, "NEW": tmp_path / "new", "DATA": folder / "rows.jsonl"}
    (line,) = told(capsys, *(places.get(word, word) for word in words), status=2).splitlines()
    expected = (
        f"{panel}: holds a panel of 3 labels, expected one classifier; give the folder of one label: {panel}/defect"
    )
    assert expected in line
    assert not (tmp_path / "new").exists()


def test_a_threshold_changes_one_label_of_a_panel_which_stays_sound(
    tiny_backbone: Backbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    panel = make_panel(tiny_backbone).save(tmp_path / "parts")
    scratch = panel / "scratch"
    out = told(capsys, "threshold", scratch, "--set", "0.9", "--out", scratch, "--overwrite")
    assert f"{panel} uses it from now on" in out
    changed = Panel.load(panel, device="cpu")
    assert [round(one.threshold, 2) for one in changed.classifiers] == [0.4, 0.9, 0.6]
    assert "| scratch | scratch/ | last:2 | linear | 0.9 |" in (panel / "README.md").read_text()
    (line,) = told(
        capsys, "threshold", scratch, "--set", "0.8", "--out", panel / "dirty", "--overwrite", status=2
    ).splitlines()
    assert "is the folder of another label of the panel" in line
    assert read_panel(panel).names == LABELS
    changed.save(panel)
    animals = make_panel(tiny_backbone, CLASSES, one_of=True).save(tmp_path / "animals")
    out = told(capsys, "threshold", animals / "cat", "--set", "0.2", "--out", animals / "cat", "--overwrite")
    assert "its choice of a class depends on no threshold" in out
