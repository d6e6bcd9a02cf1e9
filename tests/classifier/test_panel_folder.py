"""The saved panel: every field is checked, folders stay inside, and it is written whole or not at all."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Classifier, Panel, Tap
from qwen_vl_classifier.classifier.artifact import check_replaceable
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.classifier.panel_folder import folder_names, is_panel, read_panel
from qwen_vl_classifier.errors import ArtifactError, ConfigError
from tests import crash_points

ROWS = [{"image": None, "text": text} for text in ("A claim.", "Another claim, which is longer.", "Number 3")]
TAP = Tap(-1, "mean")
NAMES = ("Defect", "../defect", "грязь")

SAVE = """
import sys
from pathlib import Path
from qwen_vl_classifier import Backbone, Classifier, Panel
from tests import crash_points

folder, moment, barrier = sys.argv[1:]
zero_shot = Classifier.zero_shot(Backbone.load("builtin:tiny", device="cpu", dtype="float32"))
crash_points.halt(moment, "saved", Path(barrier))
Panel([zero_shot], names=["new"]).save(folder)
"""


def classifier_of(backbone, seed: int, tap: Tap = TAP, kind: str = "linear", **options) -> Classifier:
    """Return a classifier with random weights."""
    spec = HeadSpec(kind, backbone.hidden_size, units=8 if kind == "mlp" else 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = spec.build()
    return Classifier(backbone, tap, head, spec, **options)


@pytest.fixture(scope="module")
def panel(tiny_backbone) -> Panel:
    """Labels of which a row has exactly one, with heads of two kinds at two taps."""
    classifiers = [
        classifier_of(tiny_backbone, 0, temperature=0.2, threshold=0.4),
        classifier_of(tiny_backbone, 1, isotonic=((0.1, 0.9), (0.3, 0.6)), label_names=("not b", "b")),
        classifier_of(tiny_backbone, 2, Tap(1, "last"), "mlp", abstention=(0.4, 0.6)),
    ]
    names = [name.replace("/", ":") for name in NAMES]
    return Panel(classifiers, names=names, one_of=True, temperature=0.7, training={"method": "by hand"})


@pytest.fixture
def saved(panel, tmp_path) -> Path:
    return panel.save(tmp_path / "saved")


def edit(folder: Path, change: dict[str, Any]) -> None:
    content = json.loads((folder / "panel.json").read_text()) | change
    (folder / "panel.json").write_text(json.dumps(content))


def test_saving_and_loading_round_trip_exactly(panel, saved):
    loaded = Panel.load(saved, device="cpu")
    for name in ("names", "one_of", "temperature", "training", "taps"):
        assert getattr(loaded, name) == getattr(panel, name)
    np.testing.assert_array_equal(loaded.predict_proba(ROWS), panel.predict_proba(ROWS))
    assert loaded.decide(ROWS) == panel.decide(ROWS)
    assert is_panel(saved)
    assert not is_panel(saved / "defect")
    alone = Classifier.load(saved / "defect", device="cpu")
    assert alone.threshold == 0.4
    assert {path.name for path in saved.iterdir()} == {"panel.json", "README.md", "defect", "defect-2", "label"}
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "exactly one" in card
    assert "| Defect | defect/ |" in card


def test_folder_names_are_safe_and_distinct():
    assert folder_names(NAMES) == ["defect", "defect-2", "label"]
    assert folder_names(["a" * 100, "a" * 101, "..", "con."]) == ["a" * 60, f"{'a' * 60}-2", "label", "con"]


def test_probabilities_of_one_class_sum_to_one(panel):
    found = panel.predict_proba(ROWS)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=1e-12)
    own = np.stack([one.predict_proba(ROWS)[:, 1] for one in panel.classifiers], axis=1)
    raised = own ** (1 / 0.7)
    np.testing.assert_allclose(found, raised / raised.sum(axis=1, keepdims=True), rtol=1e-5)
    chosen = panel.predict(ROWS)
    assert chosen.tolist() == found.argmax(axis=1).tolist()
    for row, answer in enumerate(panel.decide(ROWS)):
        assert answer.label_name == panel.names[chosen[row]]
        assert answer.probability == found[row].max()
        assert [one.decision for one in answer.labels.values()].count("yes") == 1
        assert answer.labels[answer.label_name].label == 1


def test_labels_are_decided_for_themselves(panel):
    each = Panel(panel.classifiers, names=panel.names)
    answers = each.decide(ROWS)
    for name, classifier, column in zip(each.names, each.classifiers, each.predict(ROWS).T, strict=True):
        alone = classifier.decide(ROWS)
        assert [answer.labels[name].decision for answer in answers] == [one.decision for one in alone]
        assert column.tolist() == [one.label for one in alone]
    assert (answers[0].label_name, answers[0].probability) == (None, None)


def test_it_describes_itself(panel):
    assert repr(panel) == "<Panel: one of 3 classes ('Defect', '..:defect', 'грязь') on 'builtin:tiny'>"
    assert "..:defect" in panel._repr_html_()
    assert "<Panel: 2 labels ('1', '2')" in repr(Panel(panel.classifiers[:2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["a", "b"]}, "3 classifiers with 2 names"),
        ({"names": ["a", "a", "b"]}, "two labels are called 'a'"),
        ({"names": ["a", "b/c", "d"]}, "slash"),
        ({"names": ["a", "", "d"]}, "expected a name"),
        ({"names": ["a", "b\n", "d"]}, "cannot be printed"),
        ({"names": ["a", "b" * 129, "d"]}, "at most 128"),
        ({"temperature": 0}, "above 0"),
    ],
)
def test_impossible_panels(panel, options, message):
    with pytest.raises(ConfigError, match=message):
        Panel(panel.classifiers, **options)


def test_one_class_alone_is_no_choice(panel):
    with pytest.raises(ConfigError, match="at least two"):
        Panel(panel.classifiers[:1], one_of=True)


LABELS = [{"name": name, "folder": folder} for name, folder in zip("abc", ("defect", "defect-2", "label"), strict=True)]


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"format_version": True},
        {"one_of": 1},
        {"temperature": 0},
        {"temperature": "1"},
        {"temperature": True},
        {"labels": []},
        {"labels": {"a": "defect"}},
        {"labels": [*LABELS, {"name": "d", "folder": "../saved/defect"}]},
        {"labels": [{"name": "a", "folder": "/etc"}]},
        {"labels": [{"name": "a", "folder": ".."}]},
        {"labels": [{"name": "a", "folder": 3}]},
        {"labels": [{"name": ["a"], "folder": "defect"}]},
        {"labels": [{"name": "a"}]},
        {"labels": [{**LABELS[0], "more": 1}]},
        {"labels": [LABELS[0], {**LABELS[1], "name": "a"}]},
        {"labels": [LABELS[0], {**LABELS[1], "folder": "defect"}]},
        {"labels": [{"name": f"{number}", "folder": f"a{number}"} for number in range(1001)]},
        {"labels": [{"name": "a\u0007", "folder": "defect"}]},
        {"training": []},
        {"versions": {"torch": 2}},
        {"more": 1},
    ],
)
def test_every_field_is_checked(saved, change):
    edit(saved, change)
    with pytest.raises(ArtifactError) as caught:
        read_panel(saved)
    assert "\n" not in str(caught.value)
    assert "panel.json" in str(caught.value)


def test_damaged_files(saved, tmp_path):
    with pytest.raises(ArtifactError, match=r"no panel\.json in it"):
        Panel.load(tmp_path)
    (saved / "panel.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_panel(saved)
    (saved / "panel.json").write_text("[]")
    with pytest.raises(ArtifactError, match="JSON object"):
        read_panel(saved)
    (saved / "panel.json").unlink()
    os.mkfifo(saved / "panel.json")
    assert not is_panel(saved)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_panel(saved)


def test_a_folder_that_leads_outside_is_refused(panel, saved, tmp_path):
    outside = panel.classifiers[0].save(tmp_path / "outside")
    (saved / "label").rename(tmp_path / "moved")
    (saved / "label").symlink_to(outside)
    with pytest.raises(ArtifactError, match="leads out"):
        Panel.load(saved)


def test_a_label_without_its_classifier(saved, tmp_path):
    (saved / "label").rename(tmp_path / "moved")
    with pytest.raises(ArtifactError, match=r"label: no classifier\.json"):
        Panel.load(saved)


def test_an_older_panel_is_replaced_and_nothing_else(panel, saved, tiny_classifier, tmp_path):
    (saved / "report.html").write_text("of the older one")
    Panel(panel.classifiers[:1], names=["other"]).save(saved)
    assert {path.name for path in saved.iterdir()} == {"panel.json", "README.md", "other"}
    with pytest.raises(ArtifactError, match="overwrite"):
        check_replaceable(saved, overwrite=False, panel=True)
    with pytest.raises(ArtifactError, match="not a saved classifier"):
        tiny_classifier.save(saved)
    (saved / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"thesis\.txt"):
        panel.save(saved)
    (saved / "other" / "thesis.txt").rename(saved / "thesis.txt")
    with pytest.raises(ArtifactError, match=r"thesis\.txt"):
        panel.save(saved)
    assert (saved / "thesis.txt").read_text() == "mine"
    with pytest.raises(ArtifactError, match="not a saved panel"):
        panel.save(tiny_classifier.save(tmp_path / "classifier"))


def test_a_fine_tuned_backbone_is_not_saved_as_a_panel(panel, tiny_backbone, tmp_path):
    changed = classifier_of(tiny_backbone, 3, finetuned=True)
    with pytest.raises(ArtifactError, match=r"'b' was fine-tuned .* save each classifier for itself"):
        Panel([panel.classifiers[0], changed], names=["a", "b"]).save(tmp_path / "panel")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "moment",
    [
        crash_points.MOMENTS[2],
        *(pytest.param(moment, marks=pytest.mark.soak) for moment in ("in the middle", "after the rename")),
    ],
)
def test_a_killed_save_leaves_the_old_or_the_new_one(panel, saved, fresh, moment):
    barrier = saved.parent / "barrier"
    fresh.start(SAVE, saved, moment, barrier)
    crash_points.kill_at(barrier)
    assert fresh.wait().returncode == -signal.SIGKILL
    expected = ("new",) if moment == "after the rename" else panel.names
    assert read_panel(saved).names == expected
    assert Panel.load(saved, device="cpu").names == expected
    panel.save(saved)
    assert read_panel(saved).names == panel.names
    assert sorted(path.name for path in saved.parent.iterdir() if "barrier" not in path.name) == ["saved"]
