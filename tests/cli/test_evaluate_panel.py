"""`evaluate` on the command line, given the folder of a panel."""

from __future__ import annotations

import csv
import json

import pytest

from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.scenes.statements import write_dataset
from tests.evaluation.sample_panel import make_panel

QUICK = ("--resamples", "20", "--no-checks", "--device", "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A table with two columns of labels, one with gaps, and a column of classes."""
    folder = tmp_path_factory.mktemp("data")
    path = write_dataset(folder, split="test", scenes=12, per_scene=2)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else []
    rows = rows or list(csv.DictReader(path.read_text().splitlines()))
    table = path.parent / "labels.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text", "defect", "dirty", "label"])
        for number, row in enumerate(rows):
            dirty = "" if number % 4 == 0 else number % 3 % 2
            writer.writerow([row["image"], row["text"], number % 2, dirty, ("ash", "elm")[number % 5 % 2]])
    return table


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_backbone):
    folder = tmp_path_factory.mktemp("saved")
    make_panel(tiny_backbone, ("defect", "dirty")).save(folder / "panel")
    make_panel(tiny_backbone, ("ash", "elm"), one_of=True).save(folder / "trees")
    return folder


def run(capsys, *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments), *QUICK]) == 0
    return capsys.readouterr().out


def fail(capsys, *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments), *QUICK]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_all_labels_are_measured_and_reported(capsys, folder, data, tmp_path):
    output = run(capsys, folder / "panel", data, "--out", tmp_path / "report")
    assert max(len(line) for line in output.splitlines() if not line.startswith("report")) <= 80
    words = " ".join(output.split())
    assert "on average over 2 labels" in words
    assert "18 of 24 rows have all" in words
    evaluation = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert [label["rows"]["labelled"] for label in evaluation["labels"]] == [24, 18]
    assert evaluation["measured"]["panel"] == str(folder / "panel")
    assert f"report  {tmp_path / 'report' / 'report.html'}" in output


def test_classes_are_named_by_the_label_column(capsys, folder, data):
    output = " ".join(run(capsys, folder / "trees", "--data", data).split())
    assert "the right one of 2 classes" in output
    assert "mean (macro)" in output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--train", "rows.csv"), "--train with the panel"),
        (("--positive", "1"), "--positive with the panel"),
        (("--slice-by", "kind"), "--slice-by kind with a panel"),
    ],
)
def test_what_a_panel_does_not_have_is_refused(capsys, folder, data, options, expected):
    assert expected in fail(capsys, folder / "panel", data, *options)


def test_panels_are_not_compared(capsys, folder, data):
    assert "is a panel, and 2 folders were given" in fail(capsys, folder / "panel", folder / "trees", data)
