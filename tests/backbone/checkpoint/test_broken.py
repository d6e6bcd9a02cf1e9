"""Whatever a folder holds, loading it is whole or refused in one line, and never runs a line of its code."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qwen_vl_classifier.errors import OutOfMemoryError
from tests import nano
from tests.backbone.checkpoint_folders import EXAMPLES, TAPS, edit, edit_weights, load, message_of, refusal

pytestmark = pytest.mark.usefixtures("one_thread")


class TestBrokenWeights:
    """Weights that are not those of the configuration."""

    def test_a_missing_weight(self, folder):
        edit_weights(folder, lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"))
        text = refusal(folder)
        assert "1 missing weight(s), first language_model.layers.2.mlp.up_proj.weight" in text
        assert "fetch the checkpoint again" not in text

    def test_a_missing_weight_above_the_layers_that_are_loaded(self, folder):
        edit_weights(folder, lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"))
        assert load(folder, num_layers=2).num_layers == 2
        refusal(folder, num_layers=3)

    @pytest.mark.parametrize("name", ["model.layers.4.mlp.up_proj.weight", "visual.extra.weight", "model.extra"])
    @pytest.mark.parametrize("num_layers", [None, 2])
    def test_a_weight_that_is_left_over(self, folder, name, num_layers):
        edit_weights(folder, lambda weights: weights.update({name: torch.zeros(2)}))
        if num_layers and "layers" in name:
            load(folder, num_layers=num_layers)  # higher layers are meant to be left over
        else:
            assert "1 unexpected weight(s)" in refusal(folder, num_layers=num_layers)

    @pytest.mark.parametrize("name", ["model.norm.weight", "visual.patch_embed.proj.weight"])
    def test_another_shape(self, folder, name):
        edit_weights(folder, lambda weights: weights.update({name: torch.zeros(3, 3)}))
        assert "shapes differ" in refusal(folder)

    @pytest.mark.parametrize("left", [0, 5, 1000, -1])
    def test_a_truncated_file(self, folder, left):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:left])
        assert "weights cannot be read" in refusal(folder)

    def test_only_a_pickle(self, folder):
        class Trap:
            def __reduce__(self):
                return (Path.touch, (folder / "ran",))

        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
        assert "no .safetensors weights in it; other formats are not read (pytorch_model.bin)" in refusal(folder)
        assert not (folder / "ran").exists()

    @pytest.mark.parametrize(
        "index", ["{", "[]", "{}", '{"weight_map": []}', '{"metadata": {}, "weight_map": {"model.norm.weight": 3}}']
    )
    def test_a_malformed_index(self, sound, tmp_path, index):
        folder = nano.make_checkpoint("qwen2_5_vl", tmp_path / "sharded", shards=2)
        (folder / "model.safetensors.index.json").write_text(index)
        refusal(folder)

    def test_a_missing_shard(self, tmp_path):
        folder = nano.make_checkpoint("qwen2_5_vl", tmp_path / "sharded", shards=2)
        (folder / "model-00002-of-00002.safetensors").unlink()
        assert "model-00002-of-00002.safetensors" in refusal(folder)

    def test_lack_of_memory_ends_in_advice(self, sound, monkeypatch):
        for error in (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        ):

            def full(*_args, raised=error, **_options):
                raise raised

            with monkeypatch.context() as patched:
                patched.setattr(transformers.PreTrainedModel, "from_pretrained", full)
                text = refusal(sound, OutOfMemoryError)
            assert f"loading {sound}" in text
            assert "smaller checkpoint" in text


class TestBrokenConfiguration:
    """`config.json`, the tokeniser and the picture settings."""

    @pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json"])
    def test_a_missing_file(self, folder, file):
        (folder / file).unlink()
        assert file in refusal(folder)

    @pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json"])
    @pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe{", b"[" * 100_000])
    def test_a_malformed_file(self, folder, file, content):
        (folder / file).write_bytes(content)
        refusal(folder)

    @pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "tokenizer.json"])
    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (b"", "it is empty"),
            (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
            (b"<html>", "it is an HTML page"),
            (b"{", "1 bytes; Expecting property name"),
        ],
    )
    def test_a_malformed_file_is_named_with_the_reason(self, folder, file, content, kind):
        (folder / file).write_bytes(content)
        assert f"its {file} is not valid JSON ({kind}" in refusal(folder)

    def test_a_folder_that_may_not_be_entered(self, folder, monkeypatch):
        stat = Path.stat

        def refuse(path, **options):
            if path.parent == folder:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return stat(path, **options)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "stat", refuse)
            patched.setattr(Path, "read_text", lambda path, **_: refuse(path))
            assert "its config.json cannot be read (Permission denied)" in refusal(folder)

    def test_a_folder_in_place_of_a_file(self, folder):
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()
        assert "cannot be read" in refusal(folder)

    @pytest.mark.parametrize("model_type", ["llava", "qwen2", None, 7])
    def test_another_family(self, folder, model_type):
        edit(folder / "config.json", model_type=model_type)
        assert f"has model_type {model_type!r}" in refusal(folder)

    def test_the_name_says_nothing_the_model_type_all(self, folder):
        misleading = folder.rename(folder.parent / "Qwen3-VL-4B")
        assert load(misleading).family.name == "Qwen2.5-VL"

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_size": "abc"},
            {"hidden_size": -1},
            {"hidden_size": 0},
            {"hidden_size": 65},
            {"num_attention_heads": 0},
            {"num_hidden_layers": "4"},
            {"num_hidden_layers": 5},
            {"num_hidden_layers": 3},
            {"vocab_size": 10},
            {"rope_scaling": "none"},
            {"rope_scaling": {"type": "unheard of"}},
            {"hidden_act": "unheard of"},
            {"vision_config": []},
            {"vision_config": {"patch_size": 16}},
            {"image_token_id": "x"},
            {"torch_dtype": "unheard of"},
            {"use_sliding_window": True, "max_window_layers": 0},
        ],
        ids=str,
    )
    def test_impossible_values(self, folder, changes):
        edit(folder / "config.json", **changes)
        refusal(folder)

    @pytest.mark.parametrize(
        "changes",
        [
            {"min_pixels": "abc"},
            {"max_pixels": []},
            {"patch_size": 16},
            {"merge_size": 4},
            {"temporal_patch_size": 1},
            {"patch_size": "14"},
            {"image_processor_type": "CLIPImageProcessor"},
        ],
        ids=str,
    )
    def test_impossible_picture_settings(self, folder, changes):
        edit(folder / "preprocessor_config.json", **changes)
        refusal(folder)

    @pytest.mark.parametrize("value", [3, ["a"], {"other": "x"} | {"default": 4}])
    def test_a_chat_template_that_is_no_text(self, folder, value):
        edit(folder / "tokenizer_config.json", chat_template=value)
        assert "template" in message_of(lambda: load(folder).encode(EXAMPLES, TAPS))

    def test_a_path_that_is_no_checkpoint(self, tmp_path):
        assert "no such folder" in refusal(tmp_path / "missing")
        (tmp_path / "file").write_text("")
        assert "this is a file" in refusal(tmp_path / "file")
        assert "no config.json" in refusal(tmp_path)
        assert "expected builtin:tiny; did you mean 'builtin:tiny'?" in refusal("builtin:tinny")
        assert "cannot be reached" in refusal("no-such-owner-anywhere/no-such-model")


class TestForeignCode:
    """A checkpoint may bring code; it is never run."""

    TRAP = (
        "from pathlib import Path\n"
        "Path(__file__).with_name('ran').touch()\n"
        "Path({ran!r}).touch()\n"
        "class Trap:\n"
        "    @classmethod\n"
        "    def from_pretrained(cls, *args, **options): return cls()\n"
    )

    @pytest.fixture
    def trapped(self, folder, tmp_path, monkeypatch) -> Iterator[Path]:
        (folder / "trap.py").write_text(self.TRAP.format(ran=str(tmp_path / "ran")))
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
        yield folder
        assert not (tmp_path / "ran").exists()
        assert not any(name.startswith("transformers_modules") for name in sys.modules)

    @pytest.mark.parametrize("own_class", [True, False])
    @pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
    def test_auto_map_is_ignored_or_refused(self, trapped, file, own_class):
        classes = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor")
        auto_map = dict.fromkeys(classes, "trap.Trap") | {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}
        changes: dict[str, Any] = {"auto_map": auto_map, "trust_remote_code": True}
        if own_class:
            changes |= {
                "config.json": {"architectures": ["Trap"]},
                "tokenizer_config.json": {"tokenizer_class": "Trap"},
                "preprocessor_config.json": {"image_processor_type": "Trap"},
            }[file]
        edit(trapped / file, **changes)
        assert "\n" not in message_of(lambda: load(trapped).encode(EXAMPLES, TAPS))

    def test_all_at_once(self, trapped):
        for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor"), "trap.Trap")
            edit(trapped / file, auto_map=auto_map | {"AutoTokenizer": ["trap.Trap", None]}, trust_remote_code=True)
        (trapped / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "trap.Trap"}}))
        edit(trapped / "tokenizer_config.json", tokenizer_class=None)
        edit(trapped / "preprocessor_config.json", image_processor_type=None)
        assert "\n" not in message_of(lambda: load(trapped).encode(EXAMPLES, TAPS))
