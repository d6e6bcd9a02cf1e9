"""`predict` with a panel: one picture, several, and the columns that come into a table."""

from __future__ import annotations

import csv
import json

import pytest
from PIL import Image

from qwen_vl_classifier import Example, Panel
from qwen_vl_classifier.cli.main import main
from tests.evaluation.sample_panel import make_panel

TEXT = "Is it red?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_backbone):
    folder = tmp_path_factory.mktemp("predict")
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (60, 40), colour).save(folder / f"{name}.png")
    (folder / "rows.csv").write_text(f"image,text,label_dirty\nred.png,{TEXT},x\nblue.png,{TEXT},y\n")
    make_panel(tiny_backbone, ("defect", "dirty")).save(folder / "panel")
    make_panel(tiny_backbone, ("ash", "elm"), one_of=True).save(folder / "trees")
    return folder


@pytest.fixture
def predict(folder, capsys, monkeypatch):
    """Run the verb in the folder; return its output."""
    monkeypatch.chdir(folder)

    def run(*words: str) -> str:
        assert main(["predict", *words, "--device", "cpu"]) == 0
        return capsys.readouterr().out

    return run


def answers(folder, name):
    panel = Panel.load(folder / name, device="cpu")
    return panel.decide([Example(str(folder / f"{colour}.png"), TEXT) for colour in ("red", "blue")])


def test_a_table_gets_columns_for_each_label(folder, predict, tmp_path):
    out = predict("panel", "rows.csv", "--out", str(tmp_path / "scored.csv"))
    added = ("probability_defect", "probability_dirty", "label_defect", "label_dirty", "decision_defect")
    assert ", ".join(f"predicted_{name}" for name in added) in out, "label_dirty is a column of the table"
    rows = list(csv.DictReader((tmp_path / "scored.csv").read_text().splitlines()))
    for row, answer in zip(rows, answers(folder, "panel"), strict=True):
        for name, one in answer.labels.items():
            assert float(row[f"predicted_probability_{name}"]) == pytest.approx(one.probability, abs=1e-6)
            assert row[f"predicted_label_{name}"] == str(one.label)
            assert row[f"predicted_decision_{name}"] == one.decision
    assert [row["label_dirty"] for row in rows] == ["x", "y"]


def test_a_table_gets_the_class_and_what_each_has(folder, predict, tmp_path):
    out = predict("trees", "rows.csv", "--out", str(tmp_path / "scored.csv"))
    assert "probability_ash, probability_elm, class, class_probability added" in out
    rows = list(csv.DictReader((tmp_path / "scored.csv").read_text().splitlines()))
    for row, answer in zip(rows, answers(folder, "trees"), strict=True):
        assert row["class"] == answer.label_name
        assert float(row["class_probability"]) == pytest.approx(answer.probability, abs=1e-6)
        assert float(row["probability_ash"]) + float(row["probability_elm"]) == pytest.approx(1)


def test_one_picture_is_answered_label_by_label(folder, predict):
    lines = predict("panel", "red.png", TEXT).splitlines()
    assert lines[0].split() == ["label", "probability", "decision"]
    for line, (name, one) in zip(lines[1:], answers(folder, "panel")[0].labels.items(), strict=True):
        assert line.split() == [name, f"{one.probability:.4f}", one.decision]
    first = predict("trees", "red.png", TEXT).splitlines()[1].split()
    assert first == [answers(folder, "trees")[0].label_name, f"{answers(folder, 'trees')[0].probability:.4f}"]
    made = json.loads(predict("trees", "red.png", TEXT, "--json"))
    assert set(made) == {"probability_ash", "probability_elm", "class", "class_probability"}


def test_several_pictures_are_a_short_table(folder, predict):
    out = predict("panel", "red.png", "blue.png", TEXT)
    assert "answered yes" in out.splitlines()[0]
    counts = [
        sum(answer.labels[name].decision == "yes" for answer in answers(folder, "panel"))
        for name in ("defect", "dirty")
    ]
    assert out.splitlines()[-1] == f"2 rows: {counts[0]} yes defect, {counts[1]} yes dirty"
    assert "class" in predict("trees", "red.png", "blue.png", TEXT).splitlines()[0]
