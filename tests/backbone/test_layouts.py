"""Weights under every name that is in circulation: the same features to the last bit, and the same language head."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Backbone, Classifier, Example, Tap
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.errors import CheckpointError
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

TAPS = [Tap(1, "mean"), Tap(3, "image"), Tap(-1, "last")]
EXAMPLES = [Example(Image.new("RGB", (84, 56), "red"), "a text"), Example(None, "no picture")]
HEADS = {
    "score.weight": (2, 64),
    "v_head.summary.weight": (1, 64),
    "v_head.summary.bias": (1,),
    "classifier.dense.weight": (3, 3),
    "model.value_head.weight": (1, 64),
    "custom_text_proj.weight": (8, 64),
    "mtp.layers.0.mlp.up_proj.weight": (128, 64),
    "mtp.norm.weight": (64,),
    "lm_head.bias": (7,),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
}


def load(folder: Path) -> Backbone:
    return Backbone.load(folder, device="cpu", dtype="float32")


def results(backbone: Backbone) -> tuple[bytes, bytes]:
    """Return features and the zero-shot answer, bit by bit."""
    zero_shot = Classifier.zero_shot(backbone, yes="A", no="B")
    return backbone.encode(EXAMPLES, TAPS).tobytes(), zero_shot.predict_proba(EXAMPLES).tobytes()


def rename(source: Path, folder: Path, change: Callable[[str], str | None]) -> Path:
    """Copy a checkpoint under other names of its weights; those that become `None` are left out."""
    shutil.copytree(source, folder)
    weights = {change(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    weights.pop(None, None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def own(name: str) -> str:
    """Return the name that a weight has within the model without its head, however a nano checkpoint calls it."""
    name = name.removeprefix("model.") if name.startswith(("model.visual.", "model.language_model.")) else name
    return name.replace("model.", "language_model.", 1) if name.startswith("model.") else name


def old(name: str) -> str:
    return own(name).replace("language_model.", "model.", 1)


def new(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.{own(name)}"


LAYOUTS: dict[str, Callable[[str], str]] = {
    "old names": old,
    "new names": new,
    "no prefix": own,
    "prefix twice": lambda name: name if name == "lm_head.weight" else f"model.{new(name)}",
    "head inside": lambda name: "model.lm_head.weight" if name == "lm_head.weight" else new(name),
    "compiled": lambda name: f"_orig_mod.{new(name)}",
    "parts compiled": lambda name: new(name).replace("language_model.", "language_model._orig_mod."),
    "data parallel": lambda name: f"module.{old(name)}",
    "both": lambda name: f"module._orig_mod.{new(name)}",
    "checkpointed": lambda name: new(name).replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
}
MOST_COMMON = ("old names", "new names")


@pytest.fixture(scope="module")
def results_of(nano_folder) -> Callable[[str], tuple[bytes, bytes]]:
    """Return the results of the checkpoint of a family as it was published."""
    return functools.cache(lambda family: results(load(nano_folder(family))))


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, layout) for family in nano.FAMILIES for layout in (LAYOUTS if family in nano.KINDS else MOST_COMMON)],
)
def test_every_layout_gives_the_same(nano_folder, results_of, family, layout, tmp_path):
    renamed = load(rename(nano_folder(family), tmp_path / "renamed", LAYOUTS[layout]))
    assert results(renamed) == results_of(family)
    assert all("mtp." in name for name in renamed.passed_over)


@pytest.mark.parametrize(("bare", "shard_size"), [(False, "100KB"), (True, "5GB")], ids=["whole", "without head"])
def test_what_transformers_saves(nano_checkpoint, bare, shard_size, tmp_path):
    family, folder = nano_checkpoint
    model = nano.reference_class(family).from_pretrained(folder, dtype=torch.float32)
    saved = shutil.copytree(folder, tmp_path / "saved", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (model.model if bare else model).save_pretrained(saved, max_shard_size=shard_size)
    assert (saved / "model.safetensors.index.json").exists() == (shard_size == "100KB")
    backbone, before = load(saved), load(folder)
    np.testing.assert_array_equal(backbone.encode(EXAMPLES, TAPS), before.encode(EXAMPLES, TAPS))
    if bare:
        with pytest.raises(CheckpointError, match=r"no lm_head\.weight among its weights"):
            backbone.token_rows(["A"])
    else:
        assert results(backbone) == results(before)
    own_model = nano.reference_class(family).from_pretrained(saved, dtype=torch.float32).model
    torch.testing.assert_close(backbone.model.state_dict(), own_model.state_dict(), rtol=0, atol=0)


def test_heads_of_other_trainers_are_passed_over_and_named(kind_checkpoint, results_of, tmp_path, capsys):
    family, folder = kind_checkpoint
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors") | {name: torch.ones(shape) for name, shape in HEADS.items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    backbone = load(copy)
    assert results(backbone) == results_of(family)
    assert backbone.passed_over == tuple(sorted({*HEADS, *load(folder).passed_over}))
    assert main(["info", str(copy)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("passed over"))
    for part in ("score.* (1)", "v_head.* (2)", "mtp.* (", "value_head.* (1)", "*.inv_freq (1)"):
        assert part in line
    assert main(["info", str(folder)]) == 0
    none = "mtp.* (2)" if family in nano.HYBRID else "no weights"
    assert f"passed over     {none}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["audio_tower.weight", "model.layers.0.extra.weight", "visual.score.weight", "extra"])
def test_any_other_weight_is_an_error_that_names_it(kind_checkpoint, name, tmp_path):
    _, folder = kind_checkpoint
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors") | {name: torch.ones(1)}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 unexpected weight") as caught:
        load(copy)
    assert name in str(caught.value)


def test_numbers_of_64_bits_are_not_taken_for_quantised(kind_checkpoint, results_of, tmp_path):
    family, folder = kind_checkpoint
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = {name: tensor.double() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert results(load(copy)) == results_of(family)


class TestUnknownLayouts:
    """What lies there in place of the weights that are missing is named."""

    def test_names_with_a_strange_prefix(self, kind_checkpoint, tmp_path):
        _, folder = kind_checkpoint
        with pytest.raises(CheckpointError) as caught:
            load(rename(folder, tmp_path / "copy", lambda name: f"pretrained_model.{name}"))
        assert "missing weight(s), first language_model.embed_tokens.weight of shape" in str(caught.value)
        assert "; model.safetensors has " in str(caught.value)
        assert " other(s), first pretrained_model." in str(caught.value)

    def test_projections_that_are_joined(self, kind_checkpoint, tmp_path):
        _, folder = kind_checkpoint
        with pytest.raises(CheckpointError) as caught:
            load(rename(folder, tmp_path / "copy", lambda name: name.replace(".q_proj.", ".qkv_proj.")))
        assert "self_attn.qkv_proj." in str(caught.value)
        assert "joins several (as inference servers do)" in str(caught.value)


@pytest.fixture(scope="module", params=nano.KINDS)
def tied(request, tmp_path_factory) -> Path:
    return nano.make_checkpoint(request.param, tmp_path_factory.mktemp("nano") / request.param, tied=True)


class TestTiedHeads:
    @staticmethod
    def with_head(
        tied: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[Path, torch.Tensor]:
        shutil.copytree(tied, folder)
        weights = load_file(folder / "model.safetensors")
        head = change(next(tensor for name, tensor in weights.items() if "embed_tokens" in name)).contiguous()
        save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, head

    def test_without_a_head_of_its_own_the_embeddings_answer(self, tied):
        backbone = load(tied)
        token = backbone.processor.tokenizer("A", add_special_tokens=False)["input_ids"][0]
        embeddings = backbone.model.get_input_embeddings().weight
        torch.testing.assert_close(backbone.token_rows(["A"]), embeddings[[token]], rtol=0, atol=0)

    @pytest.mark.parametrize("flag", [True, False])
    def test_the_flag_of_the_language_model_alone(self, tmp_path, flag):
        folder = nano.make_checkpoint(
            "qwen3_5", tmp_path / "nano", tied=True, text_config={"tie_word_embeddings": flag}
        )
        config = json.loads((folder / "config.json").read_text())
        del config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config))
        if flag:
            assert load(folder).token_rows(["A"]).any()
        else:
            with pytest.raises(CheckpointError, match="cannot answer zero-shot"):
                load(folder).token_rows(["A"])

    def test_a_head_of_its_own_answers_as_in_transformers(self, tied, tmp_path):
        folder, head = self.with_head(tied, tmp_path / "copy", lambda embeddings: embeddings.flip(0))
        backbone = load(folder)
        token = backbone.processor.tokenizer("A", add_special_tokens=False)["input_ids"][0]
        torch.testing.assert_close(backbone.token_rows(["A"]), head[[token]], rtol=0, atol=0)
        family = json.loads((folder / "config.json").read_text())["model_type"]
        reference = nano.reference_class(family).from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(reference.lm_head.weight[[token]], head[[token]], rtol=0, atol=0)
        before, after = (
            Classifier.zero_shot(load(name), yes="A", no="B").predict_proba(EXAMPLES) for name in (tied, folder)
        )
        assert np.abs(before - after).max() > 1e-4

    def test_a_saved_backbone_does_not_answer_by_other_rows(self, tied, tmp_path):
        """Saving leaves the head out; where it was the embeddings, these still answer."""
        folder, _ = self.with_head(tied, tmp_path / "other", lambda embeddings: embeddings + 1)
        backbone = load(folder)
        backbone.save(tmp_path / "saved")
        with pytest.raises(CheckpointError, match="cannot answer zero-shot"):
            load(tmp_path / "saved").token_rows(["A"])
        folder, _ = self.with_head(tied, tmp_path / "same", torch.clone)
        backbone = load(folder)
        rows = backbone.token_rows(["A"])
        backbone.save(tmp_path / "kept")
        torch.testing.assert_close(load(tmp_path / "kept").token_rows(["A"]), rows, rtol=0, atol=0)

    def test_a_file_that_holds_them_under_the_head_alone(self, tied, tmp_path):
        folder = rename(
            tied, tmp_path / "copy", lambda name: "lm_head.weight" if name.endswith("embed_tokens.weight") else name
        )
        assert results(load(folder)) == results(load(tied))
