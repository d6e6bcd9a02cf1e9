"""Which weight files belong to a checkpoint, and what is said of those that are not right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.backbone.checkpoint.weight_files import INDEX, weight_files
from qwen_vl_classifier.errors import CheckpointError
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

TAPS = [Tap(1, "mean"), Tap(-1, "last")]
EXAMPLES = [Example(Image.new("RGB", (84, 56), "red"), "a text"), Example(None, "no picture")]
SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
WEIGHT = "model.layers.2.mlp.up_proj.weight"


def load(folder: Path, **options: Any) -> Backbone:
    return Backbone.load(folder, **{"device": "cpu", "dtype": "float32", **options})


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    assert "fetch the checkpoint again" not in text
    return text


def facts(folder: Path) -> tuple[str, bytes, bytes]:
    """Return all that a checkpoint's weights decide: fingerprint, features, and the zero-shot answer."""
    backbone = load(folder)
    zero_shot = Classifier.zero_shot(backbone, yes="A", no="B")
    return backbone.fingerprint, backbone.encode(EXAMPLES, TAPS).tobytes(), zero_shot.predict_proba(EXAMPLES).tobytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "whole")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "sharded", shards=3)


@pytest.fixture
def folder(sharded, tmp_path) -> Path:
    """A checkpoint with an index, which a test may change."""
    return shutil.copytree(sharded, tmp_path / "checkpoint")


def other_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a checkpoint, each changed."""
    return {name: tensor + 1 for file in weight_files(folder, "x") for name, tensor in load_file(folder / file).items()}


class TestTheIndexDecides:
    @pytest.mark.parametrize(
        "stray", ["a-old.safetensors", "model.safetensors", "zz.safetensors", "adapter_model.safetensors"]
    )
    def test_strays_change_nothing(self, folder, sharded, stray, tmp_path):
        save_file(other_weights(folder), folder / stray, metadata={"format": "pt"})
        assert facts(folder) == facts(sharded)
        backbone = load(folder)
        backbone.save(tmp_path / "saved")
        assert [path.name for path in (tmp_path / "saved").glob("*.safetensors*")] == ["model.safetensors"]
        np.testing.assert_array_equal(
            load(tmp_path / "saved").encode(EXAMPLES, TAPS), load(sharded).encode(EXAMPLES, TAPS)
        )

    def test_a_stray_that_cannot_be_read_is_not_read(self, folder, sharded):
        (folder / "a-old.safetensors").write_bytes(b"nothing of the kind")
        assert facts(folder) == facts(sharded)

    def test_an_index_of_one_file_of_any_name(self, whole, tmp_path):
        folder = shutil.copytree(whole, tmp_path / "copy")
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "weights.safetensors")}))
        np.testing.assert_array_equal(load(folder).encode(EXAMPLES, TAPS), load(whole).encode(EXAMPLES, TAPS))

    def test_missing_files_are_named(self, folder):
        for file in SHARDS[1:]:
            (folder / file).unlink()
        text = refusal(folder)
        assert f"2 of the 3 files that its {INDEX} names are missing: {', '.join(SHARDS[1:])};" in text
        assert "take" not in text
        shutil.copy(folder / SHARDS[0], folder / "model.safetensors")
        assert f"delete {INDEX} if model.safetensors holds all weights" in refusal(folder)

    @pytest.mark.parametrize("path", ["../{}", "/etc/{}", "a/../../{}", "..\\{}", "C:{}", "{}.bin", "model.pt"])
    def test_paths_stay_in_the_folder(self, folder, path):
        outside = folder.parent / SHARDS[0]
        shutil.move(folder / SHARDS[0], outside)
        index = json.loads((folder / INDEX).read_text())
        path = path.format(SHARDS[0])
        index["weight_map"] = {name: file.replace(SHARDS[0], path) for name, file in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))
        assert "expected the name of a .safetensors file in its folder" in refusal(folder)

    def test_a_subfolder_is_in_the_folder(self, folder, sharded):
        (folder / "part").mkdir()
        shutil.move(folder / SHARDS[0], folder / "part")
        index = (folder / INDEX).read_text().replace(SHARDS[0], f"part/{SHARDS[0]}")
        (folder / INDEX).write_text(index)
        assert facts(folder)[1:] == facts(sharded)[1:]

    @pytest.mark.parametrize(
        "index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"model.norm.weight": 3}}', "{"]
    )
    def test_a_malformed_index_is_named(self, folder, index):
        (folder / INDEX).write_text(index)
        assert INDEX in refusal(folder)


class TestWithoutAnIndex:
    def test_the_whole_file_counts_alone(self, whole, tmp_path):
        folder = shutil.copytree(whole, tmp_path / "copy")
        changed = other_weights(folder)
        for stray in ("a-old.safetensors", "consolidated.safetensors", SHARDS[0]):
            save_file(changed, folder / stray, metadata={"format": "pt"})
        assert facts(folder) == facts(whole)

    def test_a_complete_set_of_numbered_files(self, folder, sharded):
        (folder / INDEX).unlink()
        assert facts(folder) == facts(sharded)

    def test_the_only_file_there_is(self, whole, tmp_path):
        folder = shutil.copytree(whole, tmp_path / "copy")
        (folder / "model.safetensors").rename(folder / "merged.safetensors")
        np.testing.assert_array_equal(load(folder).encode(EXAMPLES, TAPS), load(whole).encode(EXAMPLES, TAPS))

    @pytest.mark.parametrize("removed", [SHARDS[:1], SHARDS[1:], []])
    def test_else_it_is_unclear(self, folder, removed):
        (folder / INDEX).unlink()
        for file in removed:
            (folder / file).unlink()
        if not removed:
            shutil.copy(folder / SHARDS[0], folder / "a-old.safetensors")
        text = refusal(folder)
        assert "it is unclear which weights to load" in text
        assert next(path.name for path in sorted(folder.glob("*.safetensors"))) in text

    @pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
    def test_other_formats_are_named(self, whole, tmp_path, file):
        folder = shutil.copytree(whole, tmp_path / "copy")
        (folder / "model.safetensors").rename(folder / file)
        assert f"no .safetensors weights in it; other formats are not read ({file})" in refusal(folder)


class TestWhatIsSaid:
    """Each message names the weight, the file, the shapes or the key."""

    @pytest.fixture
    def whole_copy(self, whole, tmp_path) -> Path:
        return shutil.copytree(whole, tmp_path / "copy")

    @staticmethod
    def change(folder: Path, **weights: torch.Tensor | None) -> None:
        content = load_file(folder / "model.safetensors") | weights
        content = {name: tensor for name, tensor in content.items() if tensor is not None}
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})

    def test_a_missing_weight(self, whole_copy):
        self.change(whole_copy, **{WEIGHT: None})
        text = refusal(whole_copy)
        assert "1 missing weight(s), first language_model.layers.2.mlp.up_proj.weight of shape [128, 64]" in text
        assert "model.safetensors has none of them" in text

    def test_a_weight_that_is_left_over(self, whole_copy):
        self.change(whole_copy, **{"model.layers.2.mlp.extra.weight": torch.zeros(2, 3)})
        text = refusal(whole_copy)
        assert (
            "1 unexpected weight(s), first model.layers.2.mlp.extra.weight of shape [2, 3] in model.safetensors" in text
        )

    def test_another_shape(self, whole_copy):
        self.change(whole_copy, **{WEIGHT: torch.zeros(100, 64)})
        assert f"{WEIGHT} in model.safetensors has shape [100, 64], expected [128, 64]" in refusal(whole_copy)

    def test_another_type(self, whole_copy):
        self.change(whole_copy, **{WEIGHT: torch.zeros(128, 64, dtype=torch.int32)})
        assert f"{WEIGHT} in model.safetensors is of type I32, expected floating-point numbers" in refusal(whole_copy)

    def test_one_weight_twice(self, whole_copy):
        self.change(whole_copy, **{"model.language_model.layers.2.mlp.up_proj.weight": torch.zeros(128, 64)})
        text = refusal(whole_copy)
        assert "one weight is stored twice, as " in text
        assert f"{WEIGHT} in model.safetensors" in text

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "it is empty"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
                "it is a Git LFS pointer: run git lfs",
            ),
            (b"<!DOCTYPE html><html></html>", "it is an HTML page"),
            (b"\x00" * 100, "100 bytes; "),
        ],
    )
    def test_a_file_that_is_something_else(self, folder, content, said):
        (folder / SHARDS[1]).write_bytes(content)
        assert f"its weights cannot be read: {SHARDS[1]} ({said}" in refusal(folder)

    def test_a_file_that_was_cut_short(self, folder):
        path = folder / SHARDS[2]
        path.write_bytes(path.read_bytes()[:-1])
        assert f"its weights cannot be read: {SHARDS[2]} (" in refusal(folder)

    def test_weights_with_an_adapter_among_them(self, whole_copy):
        self.change(
            whole_copy, **{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 64)}
        )
        text = refusal(whole_copy)
        assert "was saved with a PEFT adapter in it" in text
        assert "merge_and_unload" in text
