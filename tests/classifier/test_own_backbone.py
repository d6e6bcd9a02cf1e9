"""A classifier trained on a folder works from any working folder, also after that folder has moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Backbone, Classifier, Example, Panel, Tap
from qwen_vl_classifier.backbone.checkpoint import hub
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.config.spelling import naming_flags
from qwen_vl_classifier.errors import ArtifactError, CheckpointError
from qwen_vl_classifier.serving.models.loading_models import load_models
from qwen_vl_classifier.serving.models.model_set import ModelSet
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example(None, "one"), Example(None, "another")]
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def asked(monkeypatch) -> list[str]:
    """The names that the hub was asked for."""
    names: list[str] = []

    def fetch(name: str, _revision: str | None) -> Path:
        names.append(name)
        raise CheckpointError(f"{name}: the hub was asked")

    monkeypatch.setattr(hub, "_fetch", fetch)
    return names


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A working folder with a checkpoint in `models/qwen`."""
    folder = tmp_path / "project"
    nano.make_checkpoint("qwen2_5_vl", folder / "models" / "qwen")
    monkeypatch.chdir(folder)
    return folder


def trained(name: str | Path) -> Classifier:
    backbone = Backbone.load(name, device="cpu", dtype="float32")
    spec = HeadSpec("linear", backbone.hidden_size)
    torch.manual_seed(0)
    return Classifier(backbone, Tap(2, "mean"), spec.build(), spec)


def recorded(saved: Path) -> dict:
    return json.loads((saved / "classifier.json").read_text())["backbone"]


def test_a_relative_folder_is_found_from_another_working_folder(project, tmp_path, monkeypatch, asked):
    classifier = trained("models/qwen")
    saved = classifier.save(tmp_path / "saved")
    assert (recorded(saved)["name"], recorded(saved)["folder"]) == ("models/qwen", str(project / "models" / "qwen"))
    monkeypatch.chdir(tmp_path)
    loaded = Classifier.load(saved, device="cpu")
    np.testing.assert_array_equal(loaded.predict_proba(EXAMPLES), classifier.predict_proba(EXAMPLES))
    assert recorded(loaded.save(tmp_path / "again"))["folder"] == str(project / "models" / "qwen")
    assert asked == []


def test_a_folder_that_has_gone_is_named_and_never_asked_of_the_hub(project, tmp_path, monkeypatch, asked):
    saved = trained("models/qwen").save(tmp_path / "saved")
    shutil.move(project / "models", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Classifier.load(saved, device="cpu")
    message = str(caught.value)
    assert str(project / "models" / "qwen") in message
    assert "models/qwen is not a folder here" in message
    assert "model=" in message
    assert "\n" not in message
    with naming_flags(), pytest.raises(CheckpointError, match="--model"):
        Classifier.load(saved, device="cpu")
    with pytest.raises(CheckpointError, match="typing/error is not a folder") as caught:
        Classifier.load(saved, device="cpu", model="typing/error")
    assert str(project / "models" / "qwen") in str(caught.value)
    assert asked == []


def test_it_may_be_said_where_the_folder_is_now(project, tmp_path, monkeypatch):
    classifier = trained("models/qwen")
    saved = classifier.save(tmp_path / "saved")
    now = Path(shutil.move(project / "models", tmp_path / "elsewhere")) / "qwen"
    monkeypatch.chdir(tmp_path)
    wanted = classifier.predict_proba(EXAMPLES)
    for model in (now, "elsewhere/qwen"):
        np.testing.assert_array_equal(Classifier.load(saved, device="cpu", model=model).predict_proba(EXAMPLES), wanted)
    panel = Panel.load([saved], device="cpu", model=now)
    np.testing.assert_array_equal(panel.predict_proba(EXAMPLES)[:, 0], wanted[:, 1])
    served, failures = load_models(ModelSet(), {"a": saved}, ServeConfig(device="cpu", model=str(now)))
    assert not failures
    assert served.models["a"].backbone.local_folder == now


def test_a_project_may_move_with_its_folder(project, tmp_path, monkeypatch):
    saved = trained("models/qwen").save(project / "saved")
    monkeypatch.chdir(tmp_path)
    shutil.move(project, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert Classifier.load(saved.relative_to(project), device="cpu").tap == Tap(2, "mean")


def test_the_fingerprint_still_decides(project, tmp_path):
    saved = trained("models/qwen").save(tmp_path / "saved")
    other = nano.make_checkpoint("qwen2_5_vl", tmp_path / "other", seed=1)
    with pytest.raises(ArtifactError, match="fingerprint"):
        Classifier.load(saved, device="cpu", model=other)


def test_a_classifier_of_an_older_version_loads(project, tmp_path):
    saved = trained("models/qwen").save(tmp_path / "saved")
    content = json.loads((saved / "classifier.json").read_text())
    del content["backbone"]["folder"]
    (saved / "classifier.json").write_text(json.dumps(content))
    assert Classifier.load(saved, device="cpu").tap == Tap(2, "mean")


def test_the_built_in_backbone_is_no_folder(tiny_classifier, tmp_path):
    assert recorded(tiny_classifier.save(tmp_path / "saved"))["folder"] is None


def test_of_a_name_on_the_hub_the_commit_is_recorded(tmp_path, monkeypatch):
    snapshot = nano.make_checkpoint("qwen2_5_vl", tmp_path / "models--owner--model" / "snapshots" / COMMIT)
    revisions = []

    def fetch(_name: str, revision: str | None) -> Path:
        revisions.append(revision)
        return snapshot

    monkeypatch.setattr(hub, "_fetch", fetch)
    saved = trained("owner/model").save(tmp_path / "saved")
    assert (recorded(saved)["name"], recorded(saved)["revision"], recorded(saved)["folder"]) == (
        "owner/model",
        COMMIT,
        None,
    )
    Classifier.load(saved, device="cpu")
    assert revisions == [None, COMMIT]  # the commit that it was trained on, whatever the branch holds by now
