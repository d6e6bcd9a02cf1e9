"""Classifiers on backbones that were fine-tuned: what is saved is what a fresh process loads, or an error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Backbone, Classifier, Example, Panel, Tap
from qwen_vl_classifier.backbone.adapters import add_adapter, merge_adapter
from qwen_vl_classifier.backbone.checkpoint.adapter_layout import adapter_weights
from qwen_vl_classifier.backbone.towers import train_towers
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.errors import ArtifactError, ConfigError, MissingExtraError
from tests import nano
from tests.fresh import FreshProcesses

ROOT = Path(__file__).resolve().parents[2]
TAP = Tap(3, "mean")
TOLERANCE = 1e-6  # of a probability, in float32

Probabilities: TypeAlias = dict[str, np.ndarray]

PLAIN = (
    ((84, 56), "red", "a red picture"),
    ((84, 56), "red", "a long text about the same picture"),
    ((56, 112), "navy", "a red picture"),
)
EXAMPLES = [Example(Image.new("RGB", size, colour), text) for size, colour, text in PLAIN]

FRESH = """
import json, sys, numpy, torch
from PIL import Image
from qwen_vl_classifier import Classifier, Example

torch.set_num_threads(1)
examples = [Example(Image.new("RGB", size, colour), text) for size, colour, text in json.loads(sys.argv[1])]
for folder in sys.argv[2:]:
    numpy.save(f"{folder}.npy", Classifier.load(folder, device="cpu").predict_proba(examples))
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")


def load(folder: Path, **options) -> Backbone:
    return Backbone.load(folder, **{"device": "cpu", "dtype": "float32", **options})


def classifier_on(backbone: Backbone, tap: Tap = TAP) -> Classifier:
    torch.manual_seed(0)
    spec = HeadSpec("mlp", backbone.hidden_size, units=16, dropout=0.1)
    head = spec.build()
    torch.nn.init.normal_(head[3].weight, std=0.5)
    return Classifier(backbone, tap, head, spec)


def train(backbone: Backbone, tap: Tap = TAP) -> Backbone:
    """Change what trains as training would: by steps along gradients."""
    weights = [weight for weight in backbone.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=1e-2)
    backbone.model.train()
    for _ in range(3):
        optimizer.zero_grad()
        backbone.encode_batch(backbone.processor(EXAMPLES), [tap]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    backbone.model.requires_grad_(False).eval()
    backbone.mark_changed()
    return backbone


def with_adapter(backbone: Backbone, tap: Tap = TAP, towers: str = "llm+vision") -> Backbone:
    add_adapter(backbone, towers=towers, tap=tap, rank=4, alpha=8, dropout=0.1)
    with torch.no_grad():
        for weight in adapter_weights(backbone.model, backbone.adapter).values():
            weight += torch.randn_like(weight) * 0.1
    return train(backbone, tap)


def fully_trained(backbone: Backbone) -> Backbone:
    train_towers(backbone, "llm+vision", TAP)
    return train(backbone)


def merged(backbone: Backbone) -> Backbone:
    merge_adapter(with_adapter(backbone))
    return backbone


RUNGS: dict[str, tuple[Callable[[Path], Backbone], set[str], str]] = {
    "probe": (load, set(), "nothing"),
    "lora": (lambda folder: with_adapter(load(folder)), {"adapter"}, "an adapter (LoRA)"),
    "merged": (lambda folder: merged(load(folder)), {"backbone"}, "its own weights"),
    "full": (lambda folder: fully_trained(load(folder)), {"backbone"}, "its own weights"),
    "full-lora": (
        lambda folder: with_adapter(fully_trained(load(folder))),
        {"adapter", "backbone"},
        "its own weights and an adapter (LoRA)",
    ),
    "probe-8bit": (lambda folder: load(folder, quantization="8bit"), set(), "nothing"),
    "probe-4bit": (lambda folder: load(folder, quantization="4bit"), set(), "nothing"),
    "qlora-8bit": (lambda folder: with_adapter(load(folder, quantization="8bit")), {"adapter"}, "an adapter (LoRA)"),
    "qlora-4bit": (lambda folder: with_adapter(load(folder, quantization="4bit")), {"adapter"}, "an adapter (LoRA)"),
}

PAIRS = (("lora", "probe"), ("full", "probe"), ("full-lora", "full"), ("qlora-4bit", "probe-4bit"))
"""Rungs that give other probabilities."""
# What differs between families: arrays of experts that train, are written as published, or are quantised.
FEWER = {"qwen3_vl_moe": ("full",), "qwen3_5_moe": ("full", "lora", "qlora-4bit")}


class TestParity:
    """Every rung gives in a fresh process what it gave when it was saved."""

    def check(self, checkpoint: Path, rungs: Iterable[str], folder: Path, fresh: FreshProcesses) -> Probabilities:
        before, folders = {}, {}
        for name in rungs:
            classifier = classifier_on(RUNGS[name][0](checkpoint))
            before[name] = classifier.predict_proba(EXAMPLES)
            folders[name] = classifier.save(folder / name)
            assert np.abs(classifier.predict_proba(EXAMPLES) - before[name]).max() == 0, name
            assert np.ptp(before[name][:, 1]) > 1e-3, name
        fresh.run(FRESH, json.dumps(PLAIN), *folders.values()).check_returncode()
        for name, wanted in before.items():
            seen = np.load(folder / f"{name}.npy")
            assert np.abs(seen - wanted).max() <= TOLERANCE, name
        return before

    def test_a_fresh_process_agrees(self, checkpoint, tmp_path, fresh):
        before = self.check(checkpoint, RUNGS, tmp_path, fresh)
        for name, other in PAIRS:
            assert np.abs(before[name] - before[other]).max() > 1e-3, name

    @pytest.mark.parametrize("family", FEWER)
    def test_in_other_families(self, family, nano_folder, tmp_path, fresh):
        before = self.check(nano_folder(family), ("probe", *FEWER[family]), tmp_path, fresh)
        for name in FEWER[family]:
            assert np.abs(before[name] - before["probe"]).max() > 1e-3, name

    @pytest.mark.soak
    @pytest.mark.parametrize("family", sorted({*nano.FAMILIES} - {"qwen2_5_vl"}))
    def test_every_rung_of_every_family(self, family, nano_folder, tmp_path, fresh):
        before = self.check(nano_folder(family), RUNGS, tmp_path, fresh)
        for name, other in PAIRS:
            assert np.abs(before[name] - before[other]).max() > 1e-3, name


@pytest.fixture(scope="module")
def lora(checkpoint) -> Classifier:
    return classifier_on(with_adapter(load(checkpoint)))


@pytest.fixture(scope="module")
def saved(lora, tmp_path_factory) -> Path:
    return lora.save(tmp_path_factory.mktemp("saved") / "lora")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A saved classifier that a test may break."""
    return shutil.copytree(saved, tmp_path / "broken")


class TestFolder:
    """What is saved, and what it says of itself."""

    @pytest.mark.parametrize("rung", RUNGS)
    def test_weights_are_there_only_where_they_changed(self, checkpoint, tmp_path, capsys, rung):
        make, parts, tuning = RUNGS[rung]
        folder = classifier_on(make(checkpoint)).save(tmp_path / "saved")
        names = {path.name for path in folder.iterdir()}
        assert names == {"classifier.json", "head.safetensors", "README.md", *parts}
        backbone = json.loads((folder / "classifier.json").read_text())["backbone"]
        quantization = rung.partition("-")[2] if "bit" in rung else None
        assert backbone["quantization"] == quantization
        assert (backbone["finetuned"], backbone["adapter"]) == ("backbone" in parts, "adapter" in parts)
        card = (folder / "README.md").read_text()
        assert f"| fine-tuned | {tuning} |" in card
        assert ("[finetune]" in card) == bool("adapter" in parts or quantization)
        assert (f"quantised to {quantization}" in card) == (quantization is not None)
        assert main(["info", str(folder)]) == 0
        facts = dict(line.split("  ", maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert facts["fine-tuned"].strip() == tuning
        assert facts["quantised"].strip() == (f"to {quantization}" if quantization else "no")

    def test_it_is_loaded_no_deeper_than_needed(self, saved):
        assert Classifier.load(saved, device="cpu").backbone.num_layers == 3

    def test_an_adapter_that_reaches_deeper_than_the_tap(self, checkpoint, tmp_path):
        classifier = classifier_on(with_adapter(load(checkpoint)), Tap(1, "mean"))
        wanted = classifier.predict_proba(EXAMPLES)
        loaded = Classifier.load(classifier.save(tmp_path / "saved"), device="cpu")
        assert loaded.backbone.num_layers == 3
        np.testing.assert_array_equal(loaded.predict_proba(EXAMPLES), wanted)

    def test_loaded_is_saved_again(self, lora, saved, tmp_path):
        again = Classifier.load(Classifier.load(saved, device="cpu").save(tmp_path / "again"), device="cpu")
        np.testing.assert_array_equal(again.predict_proba(EXAMPLES), lora.predict_proba(EXAMPLES))
        assert again.backbone.fingerprint == lora.backbone.fingerprint
        assert not again.finetuned
        assert not (tmp_path / "again" / "backbone").exists()

    def test_saving_over_itself_after_merging(self, folder):
        loaded = Classifier.load(folder, device="cpu")
        merge_adapter(loaded.backbone)
        wanted = loaded.predict_proba(EXAMPLES)
        loaded.save(folder)
        assert not (folder / "adapter").exists()
        np.testing.assert_allclose(Classifier.load(folder, device="cpu").predict_proba(EXAMPLES), wanted, atol=1e-6)


class TestSharing:
    """A panel shares a pass only where the adapter is the same."""

    def test_two_heads_on_one_adapter(self, lora, saved, tmp_path):
        second = classifier_on(lora.backbone, Tap(1, "last"))
        panel = Panel.load([second.save(tmp_path / "second"), saved], device="cpu")
        wanted = [each.predict_proba(EXAMPLES)[:, 1] for each in (second, lora)]
        np.testing.assert_allclose(panel.predict_proba(EXAMPLES), np.stack(wanted, axis=1), atol=TOLERANCE)

    def test_another_adapter_or_none_is_another_backbone(self, checkpoint, saved, tmp_path):
        plain = classifier_on(load(checkpoint)).save(tmp_path / "plain")
        other = with_adapter(load(checkpoint))
        other.model.get_submodule(other.adapter.targets[0]).lora_B["default"].weight.data += 1e-4
        other.mark_changed()
        adapted = classifier_on(other).save(tmp_path / "adapted")
        for folder in (plain, adapted):
            with pytest.raises(ConfigError, match="different backbones"):
                Panel.load([saved, folder], device="cpu")
        for backbone in (load(checkpoint), other, load(checkpoint, quantization="4bit")):
            with pytest.raises(ArtifactError, match="adapter, quantisation"):
                Classifier.load(saved, backbone=backbone)


class TestDamage:
    """A missing or changed part is an error that names it, never random weights."""

    def refusal(self, folder: Path) -> str:
        with pytest.raises(ArtifactError) as caught:
            Classifier.load(folder, device="cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize(
        "name",
        ["classifier.json", "head.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
    )
    def test_a_file_that_is_gone(self, folder, name):
        (folder / name).unlink()
        assert Path(name).name in self.refusal(folder)

    def test_an_adapter_that_is_gone(self, folder):
        shutil.rmtree(folder / "adapter")
        assert "adapter_config.json" in self.refusal(folder)

    @pytest.mark.parametrize("change", ["one value", "one layer", "scaling"])
    def test_an_adapter_that_was_changed(self, folder, change):
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        name = sorted(weights)[0]
        if change == "one value":
            weights[name][0, 0] += 1e-4
        elif change == "one layer":
            del weights[name]
        else:
            path = folder / "adapter" / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16}))
        save_file(weights, folder / "adapter" / "adapter_model.safetensors")
        assert ("missing weight" if change == "one layer" else "fingerprint") in self.refusal(folder)

    @pytest.mark.parametrize("change", [{"adapter": False}, {"quantization": "4bit"}], ids=str)
    def test_a_manifest_that_was_changed(self, folder, change):
        content = json.loads((folder / "classifier.json").read_text())
        content["backbone"] |= change
        (folder / "classifier.json").write_text(json.dumps(content))
        assert "fingerprint" in self.refusal(folder)

    def test_an_adapter_deeper_than_any_backbone(self, folder):
        path = folder / "adapter" / "adapter_config.json"
        targets = ["language_model.layers.99999999.mlp.up_proj"]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": targets}))
        with pytest.raises(ConfigError, match="has 4; expected 1 to 4"):
            Classifier.load(folder, device="cpu")

    def test_without_peft_the_extra_is_named(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(MissingExtraError, match=r"qwen-vl-classifier\[finetune\]"):
            Classifier.load(folder, device="cpu")

    def test_what_cannot_be_saved_leaves_everything_as_it_was(self, folder):
        loaded = Classifier.load(folder, device="cpu")
        before = loaded.backbone.fingerprint
        loaded.threshold = 2.0
        with pytest.raises(ArtifactError, match="threshold"):
            loaded.save(folder)
        assert loaded.backbone.fingerprint == before
        assert Classifier.load(folder, device="cpu").threshold == 0.5
