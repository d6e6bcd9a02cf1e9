"""Finishing trains on answers, measures a twin on rows drawn at random, and replaces nothing that is not its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, Classifier, Example, Panel, TrainConfig
from qwen_vl_classifier.labelling.asking import LabelSpec
from qwen_vl_classifier.labelling.finishing import Finishing, twin_parts

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = TrainConfig(taps="mean:1", heads="linear", folds=2)


def labelled(count: int, at_random: int) -> list[Example]:
    """Red and blue pictures in turn, the first of which were drawn at random."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        colour = rng.integers(0, 90, 3)
        colour[0 if number % 2 else 2] = rng.integers(160, 256)
        how = "random" if number < at_random else "uncertain"
        picture = Image.new("RGB", (30, 30), tuple(map(int, colour)))
        rows.append(Example(picture, "Is it red?", number % 2, fields={"sampled": how}))
    return rows


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Draw no plots, which take longer than all else and are no part of the page."""
    monkeypatch.setattr("qwen_vl_classifier.evaluation.report.draw_plots", lambda _: {})


def finished(backbone: Backbone, out: Path, rows: list[Example], *labels: LabelSpec, **options: Any) -> Finishing:
    """Finish with rows, and wait for it."""
    made = Finishing(backbone, labels or [LabelSpec()], one_of=False, out=out, store=None, config=FAST, **options)
    made.start(rows)
    made.wait()
    return made


def test_a_classifier_is_saved_and_its_twin_measured(tiny_backbone, tmp_path):
    names = LabelSpec(no="blue", yes="red")
    made = finished(tiny_backbone, tmp_path / "a.jsonl", labelled(32, 22), names, train_command="train a.jsonl")
    assert made.state() == {
        "state": "done",
        "message": "",
        "classifier": str(tmp_path / "a-classifier"),
        "report": True,
        "command": f"qwen-vl-classifier serve {tmp_path / 'a-classifier'}",
        "train": "train a.jsonl",
    }
    saved = Classifier.load(tmp_path / "a-classifier", backbone=tiny_backbone)
    assert (saved.label_names, saved.training["training_rows"]) == (("blue", "red"), 32)
    assert saved.training["estimate"]["rows"] == 22
    page = made.report()
    assert page is not None
    assert "trained in the same way without these rows" in page
    assert "twin of a-classifier" in page
    again = finished(tiny_backbone, tmp_path / "a.jsonl", labelled(24, 10), names)
    assert again.state()["state"] == "done"
    assert "so far there are 10 such rows" in again.state()["message"]
    assert again.report() is None
    assert Classifier.load(tmp_path / "a-classifier", backbone=tiny_backbone).training["training_rows"] == 24


def test_what_was_not_made_from_this_data_set_is_not_replaced(tiny_backbone, tiny_classifier, tmp_path):
    tiny_classifier.save(tmp_path / "a-classifier")
    made = finished(tiny_backbone, tmp_path / "a.jsonl", labelled(24, 10))
    assert made.state()["state"] == "failed"
    assert "was not made from a.jsonl" in made.state()["message"]
    (tmp_path / "b-classifier").mkdir()
    (tmp_path / "b-classifier" / "diary.txt").write_text("mine")
    made = finished(tiny_backbone, tmp_path / "b.jsonl", labelled(24, 10))
    assert "is not a saved classifier" in made.state()["message"]
    assert (tmp_path / "b-classifier" / "diary.txt").read_text() == "mine"


def test_one_class_is_one_line(tiny_backbone, tmp_path):
    made = finished(tiny_backbone, tmp_path / "a.jsonl", labelled(24, 10)[::2])
    assert made.state()["state"] == "failed"
    assert "class" in made.state()["message"]
    assert "\n" not in made.state()["message"]
    assert not (tmp_path / "a-classifier").exists()


@pytest.mark.soak
def test_several_labels_become_a_panel(tiny_backbone, tmp_path):
    rows = [
        replace(row, label=None, fields={**row.fields, "red": row.label, "odd": number % 4 // 2})
        for number, row in enumerate(labelled(36, 24))
    ]
    made = finished(tiny_backbone, tmp_path / "a.jsonl", rows, LabelSpec("red"), LabelSpec("odd"))
    assert made.state()["state"] == "done", made.state()["message"]
    assert Panel.load(tmp_path / "a-classifier", device="cpu").names == ("red", "odd")
    page = made.report()
    assert page is not None
    assert "trained in the same way without these rows" in page


def plain(rows: list[Example]) -> list[dict[str, Any]]:
    return [{"label": row.label} for row in rows]


def test_a_twin_is_measured_on_half_of_the_random_rows_and_trained_on_no_row_of_their_groups():
    rows = labelled(120, 60)
    rows = [replace(row, fields={**row.fields, "group": number // 4}) for number, row in enumerate(rows)]
    parts = twin_parts(rows, plain(rows), seed=0)
    assert not isinstance(parts, str)
    rest, held_out = parts
    assert 30 <= len(held_out) < 34
    assert max(held_out) < 60
    groups = [{row // 4 for row in part} for part in (rest, held_out)]
    assert not groups[0] & groups[1]
    assert len(rest) + len(held_out) == 120
    other = twin_parts(rows, plain(rows), seed=1)
    assert not isinstance(other, str)
    assert other[1].tolist() != held_out.tolist()


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (labelled(60, 0), "so far there are 0 such rows"),
        (labelled(60, 19), "so far there are 19 such rows"),
        (labelled(42, 40)[1:40:2] + labelled(30, 0), "the rows to measure on lack the class '0'"),
    ],
)
def test_there_is_no_report_where_it_would_say_nothing(rows, why):
    parts = twin_parts(rows, plain(rows), seed=0)
    assert isinstance(parts, str)
    assert parts.startswith("No report yet. A report needs 20 rows drawn at random")
    assert why in parts
