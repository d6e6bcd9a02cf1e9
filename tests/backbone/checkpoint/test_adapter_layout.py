"""Checkpoints with a PEFT adapter in their folder: refused with the way out, never applied, never passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.backbone.adapters import add_adapter, write_adapter
from qwen_vl_classifier.backbone.checkpoint.adapter_layout import adapter_weights
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.errors import CheckpointError
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = Tap(-1, "mean")
EXAMPLES = [Example(Image.new("RGB", (84, 56), "red"), "a text")]


def load(folder: Path) -> Backbone:
    return Backbone.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "plain")


@pytest.fixture(scope="module")
def adapter(plain, tmp_path_factory) -> Path:
    """The folder of an adapter that changes features."""
    backbone = load(plain)
    add_adapter(backbone, towers="llm", tap=LAST, rank=4, alpha=8)
    with torch.no_grad():
        for weight in adapter_weights(backbone.model, backbone.adapter).values():
            weight.normal_()
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    write_adapter(backbone, folder)
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_beside_weights_it_is_refused_with_the_way_out(plain, adapter, kind, sharded, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    if sharded:
        nano.make_checkpoint("qwen2_5_vl", folder, shards=2)
    else:
        shutil.copytree(plain, folder)
    before = load(folder).encode(EXAMPLES, [LAST])
    shutil.copy(adapter / "adapter_config.json", folder)
    shutil.copy(adapter / "adapter_model.safetensors", folder / f"adapter_model.{kind}")
    with pytest.raises(CheckpointError, match="a PEFT adapter lies beside the weights") as caught:
        load(folder)
    for part in ("merge_and_unload", f"delete adapter_config.json and adapter_model.{kind}"):
        assert part in str(caught.value)
    assert main(["info", str(folder)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    (folder / "adapter_config.json").unlink()
    (folder / f"adapter_model.{kind}").unlink()
    np.testing.assert_array_equal(load(folder).encode(EXAMPLES, [LAST]), before)


def test_weights_of_an_adapter_without_its_settings_are_a_stray_file(plain, adapter, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "checkpoint")
    shutil.copy(adapter / "adapter_model.safetensors", folder)
    assert load(folder).fingerprint == load(plain).fingerprint
    np.testing.assert_array_equal(load(folder).encode(EXAMPLES, [LAST]), load(plain).encode(EXAMPLES, [LAST]))


@pytest.mark.parametrize("with_config", [False, True])
def test_a_folder_that_holds_only_an_adapter_names_its_base(plain, adapter, with_config, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "Qwen/Qwen2.5-VL-3B-Instruct"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if with_config:
        shutil.copy(plain / "config.json", folder)
    with pytest.raises(
        CheckpointError, match=r"it holds only a PEFT adapter for Qwen/Qwen2\.5-VL-3B-Instruct; load the base"
    ):
        load(folder)
    settings["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="only a PEFT adapter and does not name its base model"):
        load(folder)


def test_an_adapter_that_comes_later_is_not_saved(plain, adapter, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "checkpoint")
    backbone = load(folder)
    before = backbone.encode(EXAMPLES, [LAST])
    for file in adapter.iterdir():
        shutil.copy(file, folder)
    backbone.save(tmp_path / "saved")
    np.testing.assert_array_equal(load(tmp_path / "saved").encode(EXAMPLES, [LAST]), before)


def test_nothing_else_in_the_folder_enters(plain, tmp_path):
    """Instructions of a `config.json` to transformers, distributed checkpoints, and files of a training run."""
    folder = shutil.copytree(plain, tmp_path / "checkpoint")
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "transformers_weights": "other.safetensors",
        "fusion_config": {"patch_embeddings": True},
        "attn_implementation": "some/kernel",
        "_attn_implementation": "some/kernel",
        "experts_implementation": "batched_mm",
        "use_kernels": True,
        "auto_map": {"AutoModel": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit")
    (folder / ".metadata").write_bytes(b"x")
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "generation_config.json").write_text('{"temperature": "none"}')
    np.testing.assert_array_equal(load(folder).encode(EXAMPLES, [LAST]), load(plain).encode(EXAMPLES, [LAST]))
