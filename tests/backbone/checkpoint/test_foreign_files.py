"""A pipe, a device, a link or far too large a file in the place of any file of a checkpoint is refused at once."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from tests import nano
from tests.backbone.checkpoint_folders import load, refusal

FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "vocab.json",
    "merges.txt",
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("sound") / "checkpoint")


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "checkpoint")


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def hollow(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("change", [pipe, device, hollow])
@pytest.mark.parametrize("file", FILES)
def test_whatever_lies_in_the_place_of_a_file(folder, file, change):
    if file in ("vocab.json", "merges.txt"):
        (folder / "tokenizer.json").rename(folder / "kept")
        shutil.copy(folder / "kept", folder / ("merges.txt" if file == "vocab.json" else "vocab.json"))
    (folder / file).unlink(missing_ok=True)
    change(folder / file)
    text = refusal(folder)
    assert file in text or ".safetensors weights" in text or "no tokenizer.json" in text


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_link_out_of_the_folder(folder, tmp_path, file):
    (folder / file).rename(tmp_path / "elsewhere.json")
    (folder / file).symlink_to("../elsewhere.json")
    assert f"its {file} cannot be read (a link leads out of its folder)" in refusal(folder)


def test_the_hub_s_cache_is_made_of_links(sound, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("c0" * 20)
    blobs = tmp_path / "models--a--b" / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    for number, path in enumerate(sorted(sound.iterdir())):
        digest = f"{number:040x}"
        shutil.copy(path, blobs / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    assert load(snapshot).num_layers == nano.NUM_LAYERS


def test_weights_may_lie_on_another_disk(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "large")
    (folder / "model.safetensors").symlink_to("../large")
    assert load(folder).num_layers == nano.NUM_LAYERS


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_of_an_impossible_length(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "its weights cannot be read: model.safetensors" in refusal(folder)


def test_a_hollow_header(folder):
    with (folder / "model.safetensors").open("wb") as file:
        file.write((90 << 20).to_bytes(8, "little"))
        file.truncate(1 << 40)
    assert "its header claims 94,371,840 bytes" in refusal(folder)


def test_settings_that_no_library_can_read_are_not_waited_for(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    os.mkfifo(folder / "generation_config.json")
    refusal(folder)
