"""What is exported and what is refused, with the reason; and that a folder is there whole or not at all."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from qwen_vl_classifier import Backbone, Example, export
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.config.export import ExportConfig
from qwen_vl_classifier.errors import ArtifactError, ConfigError
from qwen_vl_classifier.exporting import checkpoint
from qwen_vl_classifier.exporting.export_manifest import MANIFEST, read_export
from qwen_vl_classifier.exporting.exportable import exportable_of
from tests.exporting.engine_by_files import EngineByFiles
from tests.exporting.linear import linear_classifier


@pytest.fixture(scope="module")
def exported(tiny_backbone, tmp_path_factory):
    """A folder that was exported."""
    return export(linear_classifier(tiny_backbone, "mean:-1"), tmp_path_factory.mktemp("exported") / "out")


@pytest.mark.parametrize("tap", ["image:-1", "text:3:normed", "mean:3", "last:6"])
def test_taps_that_no_engine_reads_are_refused(tiny_backbone, tmp_path, tap):
    with pytest.raises(ConfigError, match=f"the tap is {tap}, .*train --exportable"):
        export(linear_classifier(tiny_backbone, tap), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_heads_that_are_not_linear_are_refused(tiny_classifier, tmp_path):
    with pytest.raises(ConfigError, match="the head is of kind mlp"):
        export(tiny_classifier, tmp_path / "out")


def test_quantised_backbones_are_refused(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_backbone, "quantization", "4bit")
    with pytest.raises(ConfigError, match="quantised to 4bit"):
        export(linear_classifier(tiny_backbone, "mean:-1"), tmp_path / "out")


def test_a_hybrid_model_keeps_a_layer_of_full_attention(nano_folder, tmp_path):
    backbone = Backbone.load(nano_folder("qwen3_5"), device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match="mean:3:normed leaves no layer of full attention"):
        export(linear_classifier(backbone, "mean:3:normed"), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"isotonic": ((0.2, 0.8), (0.1, 0.9))}, "isotonic calibration"),
        ({"abstention": (0.4, 0.6)}, "abstention"),
    ],
)
def test_what_no_engine_applies_is_refused_or_left_to_the_client(tiny_backbone, tmp_path, options, named):
    classifier = linear_classifier(tiny_backbone, "mean:-1", **options)
    with pytest.raises(ConfigError, match=f"has {named}, .*leave_to_client=True"):
        export(classifier, tmp_path / "out")
    assert exportable_of(classifier, ExportConfig(leave_to_client=True)).leave_to_client


def test_the_temperature_is_folded_exactly(tiny_backbone):
    classifier = linear_classifier(tiny_backbone, "mean:-1", temperature=3.0)
    made = exportable_of(classifier, ExportConfig())
    assert torch.equal(made.weight, (classifier.head.weight.detach().double() / 3).float())
    assert torch.equal(made.bias, (classifier.head.bias.detach().double() / 3).float())


def test_an_unknown_engine_is_named(tiny_backbone, tmp_path):
    with pytest.raises(ConfigError, match="to 'vlm': give one of vllm"):
        export(linear_classifier(tiny_backbone, "mean:-1"), tmp_path / "out", "vlm")


def test_folders_with_something_in_them_stay_as_they_are(tiny_backbone, tmp_path):
    (tmp_path / "out").mkdir()
    classifier = linear_classifier(tiny_backbone, "mean:-1")
    assert export(classifier, tmp_path / "out").is_dir()
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(classifier, tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


def test_a_disk_without_room_is_an_error_before_anything_is_written(tiny_backbone, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigError, match="the exported model will take about"):
        export(linear_classifier(tiny_backbone, "mean:-1"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tiny_backbone, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(ConfigError, match=r"cannot be written .*No space left"):
        export(linear_classifier(tiny_backbone, "mean:-1"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_names_of_classes_may_be_any_text(tiny_backbone, tmp_path):
    names = ("no \udc80", "<b>yes</b>\n|")
    folder = export(linear_classifier(tiny_backbone, "mean:-1", label_names=names), tmp_path / "out")
    assert read_export(folder).label_names == names
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": names[0], "1": names[1]}
    assert "<b>" not in (folder / "README.md").read_text()


def test_paths_of_this_machine_do_not_leave_it(nano_folder, tmp_path):
    backbone = Backbone.load(nano_folder("qwen2_5_vl"), device="cpu", dtype="float32")
    folder = export(linear_classifier(backbone, "mean:-1"), tmp_path / "out")
    assert read_export(folder).classifier["backbone"] == "qwen2_5_vl"
    for path in folder.rglob("*"):
        assert path.is_dir() or str(nano_folder("qwen2_5_vl")).encode() not in path.read_bytes(), path


def test_others_may_read_what_was_written(exported):
    assert len({path.stat().st_mode for path in exported.iterdir() if path.is_file()}) == 1


def test_the_manifest_round_trips(exported):
    manifest = read_export(exported)
    assert len(manifest.examples) == 8
    assert {len(row.images) for row in manifest.examples} == {0, 1, 2}
    assert [row.resized for row in manifest.examples].count(True) == 1
    assert json.loads((exported / "decision.json").read_text()) == manifest.left_to_client


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "not of format 1"),
        ({"tolerance": "much"}, "fields of the wrong kind"),
        ({"examples": [{"text": "a"}]}, "fields of the wrong kind"),
        ({"examples": [1]}, "fields of the wrong kind"),
        ({"label_names": ["a"]}, "fields of the wrong kind"),
    ],
)
def test_a_damaged_manifest_is_one_line(exported, tmp_path, change, message):
    content = json.loads((exported / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(content | change))
    with pytest.raises(ArtifactError, match=message):
        read_export(tmp_path)


def test_a_folder_without_manifest_is_one_line(tmp_path):
    with pytest.raises(ArtifactError, match=r"no export\.json in it"):
        read_export(tmp_path)


def test_the_command_line_exports_a_saved_classifier(tiny_backbone, tmp_path, capsys):
    """Of which the layers alone are loaded that its tap needs."""
    classifier = linear_classifier(tiny_backbone, "last:4:normed", abstention=(0.4, 0.6))
    saved, out = classifier.save(tmp_path / "saved"), tmp_path / "an out"
    words = ["export", str(saved), "--out", str(out), "--device", "cpu"]
    assert main(words) == 2
    assert "--leave-to-client" in capsys.readouterr().err
    assert main([*words, "--leave-to-client"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"exported {out}"
    assert printed[1].startswith(f"vllm serve '{out}' ")
    assert main([*words, "--leave-to-client"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), "--out", str(tmp_path / "other")]) == 2
    assert "no classifier.json in it" in capsys.readouterr().err
    manifest = read_export(out)
    assert any("4 of 6 decoder layers" in sentence for sentence in manifest.folded)
    rows = manifest.examples[:2]
    examples = [Example(out / row.images[0], row.text) for row in rows]
    answers = EngineByFiles(out, "LAST").answers(rows, out)
    assert np.abs(answers - classifier.predict_proba(examples)[:, 1]).max() < 1e-5
