"""A saved adapter that is damaged or another one is an error, and the backbone is unchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.backbone.adapters import read_adapter
from qwen_vl_classifier.errors import ArtifactError
from tests.backbone.adapted import load_exact

pytestmark = pytest.mark.usefixtures("one_thread")


class TestTampering:
    """A file that is not what it should be is an error, and the backbone stays as it was."""

    def refusal(self, backbone: Backbone, folder: Path) -> str:
        before = backbone.fingerprint
        with pytest.raises(ArtifactError) as caught:
            read_adapter(backbone, folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
        assert backbone.adapter is None
        assert backbone.fingerprint == before
        assert not any("lora" in name for name, _ in backbone.model.named_parameters())
        return str(caught.value)

    @pytest.fixture
    def folder(self, written, tmp_path) -> Path:
        return shutil.copytree(written, tmp_path / "adapter")

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    @pytest.mark.parametrize("damage", ["gone", "empty", "cut", "nonsense"])
    def test_a_damaged_file(self, untouched, folder, name, damage):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        if damage != "gone":
            path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "nonsense": b"\xff{]"}[damage])
        assert str(path) in self.refusal(untouched, folder)

    def test_weights_that_could_run_code_are_never_read(self, untouched, folder):
        weights = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save(weights, folder / "adapter_model.bin")
        assert "missing or damaged" in self.refusal(untouched, folder)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ("missing", "1 missing weight"),
            ("unexpected", "1 unexpected weight"),
            ("renamed", "1 missing weight"),
            ("shape", "has shape"),
            ("transposed", "has shape"),
            ("nan", "not finite"),
            ("inf", "not finite"),
            ("integers", "not finite"),
            ("none", "missing weight"),
        ],
    )
    def test_other_weights(self, untouched, folder, change, expected):
        weights = load_file(folder / "adapter_model.safetensors")
        name = sorted(weights)[5]
        if change in ("missing", "renamed"):
            removed = weights.pop(name)
        if change == "renamed":
            weights[name.replace("lora", "xlora")] = removed
        elif change == "unexpected":
            weights[name.replace("lora", "xlora")] = weights[name].clone()
        elif change == "shape":
            weights[name] = weights[name][:, :-1].contiguous()
        elif change == "transposed":
            weights[name] = weights[name].T.contiguous()
        elif change in ("nan", "inf"):
            weights[name][1, 1] = float(change)
        elif change == "integers":
            weights[name] = weights[name].int()
        elif change == "none":
            weights = {}
        save_file(weights, folder / "adapter_model.safetensors")
        assert expected in self.refusal(untouched, folder)

    @pytest.mark.parametrize(
        "change",
        [
            {"peft_type": "LOHA"},
            {"peft_type": None},
            {"r": 8},
            {"r": 10**9},
            {"r": True},
            {"r": "4"},
            {"r": 0},
            {"lora_alpha": float("inf")},
            {"lora_alpha": float("nan")},
            {"lora_alpha": 10**400},
            {"lora_alpha": -1},
            {"lora_dropout": 1},
            {"lora_dropout": None},
            {"target_modules": []},
            {"target_modules": "all-linear"},
            {"target_modules": ["a"] * 2},
            {"target_modules": [1]},
            {"target_modules": ["language_model.layers." + "9" * 5000]},
            {"target_modules": ["language_model.layers.9.mlp.up_proj"]},
            {"target_modules": ["language_model.norm"]},
            {"target_modules": ["visual"]},
            {"target_modules": ["q_proj"]},
            {"target_modules": [".", "", "language_model..layers"]},
            {"target_parameters": ["language_model.embed_tokens.weight"]},
            {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
            {"modules_to_save": ["norm"]},
            {"trainable_token_indices": [1]},
            {"layers_to_transform": [0]},
            {"layer_replication": [[0, 4]]},
            {"rank_pattern": {"q_proj": 10**6}},
            {"alpha_pattern": {"q_proj": 10**6}},
            {"use_dora": True},
            {"use_rslora": True},
            {"fan_in_fan_out": True},
            {"bias": "all"},
            {"lora_bias": True},
            {"init_lora_weights": "pissa"},
            {"megatron_core": "os"},
            {"invented": "x" * 1000},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_a_configuration_that_asks_for_something_else(self, untouched, folder, change):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        self.refusal(untouched, folder)

    @pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha", "lora_dropout", "target_modules"])
    def test_a_field_that_is_missing(self, untouched, folder, name):
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text())
        del content[name]
        path.write_text(json.dumps(content))
        assert f"{name} = 'None'" in self.refusal(untouched, folder)

    def test_a_configuration_that_is_no_object(self, untouched, folder):
        (folder / "adapter_config.json").write_text("[" * 100_000)
        self.refusal(untouched, folder)
        (folder / "adapter_config.json").write_text("[]")
        assert "not hold a JSON object" in self.refusal(untouched, folder)

    def test_a_layer_that_is_not_loaded(self, checkpoint, folder):
        assert "(2 decoder layers loaded)" in self.refusal(load_exact(checkpoint, num_layers=2), folder)

    def test_fields_of_peft_that_say_nothing_are_let_pass(self, checkpoint, written, adapted, folder):
        everything = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1).to_dict()
        own = json.loads((written / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**everything, **own}))
        loaded = load_exact(checkpoint)
        read_adapter(loaded, folder)
        assert loaded.fingerprint == adapted.fingerprint
