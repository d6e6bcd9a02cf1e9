"""A folder that somebody else made: whatever it holds ends in one line, soon and in little memory."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from qwen_vl_classifier import Classifier
from qwen_vl_classifier.errors import ArtifactError, QwenVLClassifierError


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tiny_classifier):
    return tiny_classifier.save(tmp_path_factory.mktemp("sound") / "saved")


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "saved")


def refusal(folder) -> str:
    with pytest.raises(QwenVLClassifierError) as caught:
        Classifier.load(folder, device="cpu")
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def edit(folder, **changes) -> None:
    path = folder / "classifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def hollow(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


def link(path):
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("change", [pipe, device, hollow, link])
@pytest.mark.parametrize("file", ["classifier.json", "head.safetensors", "average.png"])
def test_whatever_lies_in_the_place_of_a_file(folder, file, change):
    (folder / file).unlink(missing_ok=True)
    change(folder / file)
    assert file.removesuffix(".safetensors").removesuffix(".json") in refusal(folder)


@pytest.mark.parametrize("change", [pipe, device, hollow, link])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_whatever_lies_in_the_place_of_a_file_of_an_adapter(folder, file, change):
    edit(folder, backbone=json.loads((folder / "classifier.json").read_text())["backbone"] | {"adapter": True})
    (folder / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_dropout": 0}
    targets = ["language_model.layers.0.self_attn.q_proj"]
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": targets}))
    (folder / "adapter" / file).unlink(missing_ok=True)
    change(folder / "adapter" / file)
    assert file in refusal(folder)


class TestHeads:
    """The size of a head is known before it is read or built."""

    def test_a_large_head(self, folder):
        with (folder / "head.safetensors").open("r+b") as file:
            file.truncate(1 << 33)
        assert "it has 8,589,934,592 bytes" in refusal(folder)

    @pytest.mark.parametrize("head", [{"hidden_size": 2**20, "units": 2**20}, {"hidden_size": 2**20, "units": 65}])
    def test_an_impossible_width(self, folder, head):
        edit(folder, head={"kind": "mlp", "dropout": 0.0, **head})
        assert "weights in a layer" in refusal(folder)

    def test_another_width(self, folder):
        edit(folder, head={"kind": "mlp", "dropout": 0.0, "hidden_size": 2**20, "units": 63})
        assert "shape" in refusal(folder)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1", "2", '"0.5"', "null", "1" * 400])
@pytest.mark.parametrize("name", ["threshold", "temperature"])
def test_numbers_that_are_none(folder, name, value):
    if (name, value) in (("temperature", "2"), ("temperature", "1" * 400)):
        value = "-2"
    content = json.loads((folder / "classifier.json").read_text()) | {name: "PLACE"}
    (folder / "classifier.json").write_text(json.dumps(content).replace('"PLACE"', value))
    with pytest.raises(ArtifactError, match=name):
        Classifier.load(folder, device="cpu")


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "\ufeff{}", "1" * 10**5])
def test_json_that_is_none(folder, text):
    (folder / "classifier.json").write_text(text)
    assert "classifier.json" in refusal(folder)
