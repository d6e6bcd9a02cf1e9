"""Backbone.load: whole or not at all, whatever the folder holds, and never a line of its code."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.backbone.families import FAMILIES
from qwen_vl_classifier.errors import CheckpointError, ConfigError, OutOfMemoryError, QwenVLClassifierError
from qwen_vl_classifier.files import digests
from tests import nano

pytestmark = pytest.mark.usefixtures("one_thread")

TAPS = [Tap(1, "mean"), Tap(2, "last")]
EXAMPLES = [Example(Image.new("RGB", (84, 56), "red"), "a text"), Example(None, "no picture")]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "sound")


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A checkpoint that a test may break."""
    return shutil.copytree(sound, tmp_path / "broken")


def load(folder: Path | str, **options: Any) -> Backbone:
    return Backbone.load(folder, **{"device": "cpu", "dtype": "float32", **options})


def refusal(folder: Path | str, error: type[QwenVLClassifierError] = CheckpointError, **options: Any) -> str:
    """Return what is said of a folder: one line, without a heap of paths or a traceback."""
    with pytest.raises(error) as caught:
        load(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def said(action: Callable[[], object]) -> str:
    """Return what an action says in refusal, nothing where it went well."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; `None` takes one out."""
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


class TestSoundCheckpoints:
    """Every layout that the hub has."""

    @pytest.mark.parametrize(
        ("shards", "tied", "chat_template"), [(1, False, True), (3, True, False)], ids=["whole", "sharded-tied-bare"]
    )
    @pytest.mark.parametrize("family", nano.FAMILIES)
    def test_every_weight_finds_its_place(self, family, shards, tied, chat_template, tmp_path):
        folder = nano.make_checkpoint(family, tmp_path / "nano", shards=shards, tied=tied, chat_template=chat_template)
        assert len(list(folder.glob("*.safetensors"))) == shards
        backbone = load(folder)
        reference = nano.reference_class(family).from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(backbone.model.state_dict(), reference.model.state_dict(), rtol=0, atol=0)
        assert backbone.family is FAMILIES[family]
        assert (backbone.num_layers, backbone.total_layers, backbone.hidden_size) == (4, 4, 64)
        assert backbone.dtype == torch.float32
        assert backbone.device == torch.device("cpu")
        assert backbone.name == str(folder)
        assert backbone.revision is None
        assert np.isfinite(backbone.encode(EXAMPLES, TAPS)).all()

    def test_it_is_frozen_and_in_evaluation_mode(self, sound):
        backbone = load(sound)
        assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
        assert not any(module.training for module in backbone.model.modules())

    def test_loading_is_quiet(self, sound, capfd):
        before = transformers.utils.logging.get_verbosity()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(str(sound), num_layers=1)
        assert capfd.readouterr() == ("", "")
        assert transformers.utils.logging.get_verbosity() == before

    def test_random_numbers_of_the_caller_are_left_alone(self, sound):
        before = torch.get_rng_state()
        load(sound)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_builtin_backbone(self, tiny_backbone):
        assert tiny_backbone.name == "builtin:tiny"
        assert tiny_backbone.hidden_size == 128
        assert tiny_backbone.family.model_type == "qwen2_5_vl"


class TestArguments:
    """Device, dtype, layers and pixels."""

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
    def test_dtype(self, sound, dtype):
        backbone = load(sound, dtype=dtype)
        assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.bfloat16}
        assert backbone.encode(EXAMPLES, TAPS).dtype == np.float32

    def test_auto_is_a_choice_between_the_two(self, sound):
        assert load(sound, dtype="auto").dtype in (torch.float32, torch.bfloat16)
        assert Backbone.load(sound).device.type in ("cpu", "cuda")

    @pytest.mark.parametrize("dtype", ["float16", torch.float16, "int8", "", None, torch.float64])
    def test_other_dtypes_are_refused(self, sound, dtype):
        assert "give auto, float32 or bfloat16" in refusal(sound, ConfigError, dtype=dtype)

    @pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "meta", "mps:0", "cpu cpu"])
    def test_other_devices_are_refused(self, sound, device):
        assert "give auto, cpu, cuda or cuda:N" in refusal(sound, ConfigError, device=device)

    def test_a_gpu_that_is_not_there(self, sound, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "sees no GPU" in refusal(sound, ConfigError, device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert "sees 2 GPU(s)" in refusal(sound, ConfigError, device="cuda:2")

    @pytest.mark.parametrize("family", nano.FAMILIES)
    def test_only_the_first_layers(self, family, tmp_path):
        folder = nano.make_checkpoint(family, tmp_path / "nano", shards=2)
        part, whole = load(folder, num_layers=2), load(folder)
        assert (part.num_layers, part.total_layers) == (2, 4)
        names = set(part.model.state_dict())
        assert {name.split(".")[2] for name in names if name.startswith("language_model.layers.")} == {"0", "1"}
        np.testing.assert_array_equal(part.encode(EXAMPLES, TAPS), whole.encode(EXAMPLES, TAPS))

    @pytest.mark.parametrize("num_layers", [0, -1, 5, 100])
    def test_layers_that_are_not_there(self, sound, num_layers):
        assert f"num_layers {num_layers}: {sound} has 4; give 1 to 4" in refusal(
            sound, ConfigError, num_layers=num_layers
        )

    def test_pixel_limits(self, sound):
        picture = [Example(Image.new("RGB", (280, 280)), "")]

        def tokens(backbone: Backbone) -> int:
            return int(backbone.processor(picture)["mm_token_type_ids"].sum())

        kept, small, large = load(sound), load(sound, max_pixels=7000), load(sound, min_pixels=150_000)
        assert kept.pixel_limits == (3136, 200704)
        assert small.pixel_limits == (3136, 7000)
        assert large.pixel_limits == (150_000, 200704)
        assert tokens(kept) == 100
        assert tokens(small) == 4
        assert tokens(large) * 28 * 28 >= 150_000
        assert len({backbone.fingerprint for backbone in (kept, small, large)}) == 3

    @pytest.mark.parametrize(
        "limits", [{"min_pixels": 0}, {"max_pixels": 100}, {"min_pixels": 500, "max_pixels": 499}, {"max_pixels": -1}]
    )
    def test_pixel_limits_that_contradict_each_other(self, sound, limits):
        assert "give 0 < min_pixels <= max_pixels" in refusal(sound, ConfigError, **limits)


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
        assert f"says model_type {model_type!r}" in refusal(folder)

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
        assert "template" in said(lambda: load(folder).encode(EXAMPLES, TAPS))

    def test_a_path_that_is_no_checkpoint(self, tmp_path):
        assert "no such folder" in refusal(tmp_path / "missing")
        (tmp_path / "file").write_text("")
        assert "this is a file" in refusal(tmp_path / "file")
        assert "no config.json" in refusal(tmp_path)
        assert "use builtin:tiny" in refusal("builtin:huge")
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
        assert "\n" not in said(lambda: load(trapped).encode(EXAMPLES, TAPS))

    def test_all_at_once(self, trapped):
        for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor"), "trap.Trap")
            edit(trapped / file, auto_map=auto_map | {"AutoTokenizer": ["trap.Trap", None]}, trust_remote_code=True)
        (trapped / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "trap.Trap"}}))
        edit(trapped / "tokenizer_config.json", tokenizer_class=None)
        edit(trapped / "preprocessor_config.json", image_processor_type=None)
        assert "\n" not in said(lambda: load(trapped).encode(EXAMPLES, TAPS))


class TestFingerprint:
    """What makes two backbones the same."""

    def test_equal_content_is_equal_wherever_it_lies(self, sound, folder):
        assert load(sound).fingerprint == load(folder).fingerprint
        assert len(load(sound).fingerprint) == 64

    def test_the_number_of_layers_does_not_enter(self, sound):
        assert load(sound, num_layers=1).fingerprint == load(sound).fingerprint

    @pytest.mark.parametrize(
        "change", ["weights", "head", "config", "template", "mean", "rescale", "tokenizer", "dtype"]
    )
    def test_everything_else_does(self, sound, folder, change):
        if change in ("weights", "head"):
            name = "lm_head.weight" if change == "head" else "model.norm.weight"
            edit_weights(folder, lambda weights: weights[name].view(-1)[:1].add_(1))
        elif change == "config":
            edit(folder / "config.json", rms_norm_eps=1e-5)
        elif change == "template":
            template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
            start = "{% if 'image' not in messages|string %}x{% endif %}"  # differs without a picture alone
            edit(folder / "tokenizer_config.json", chat_template=start + template)
        elif change == "mean":
            edit(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
        elif change == "rescale":
            edit(folder / "preprocessor_config.json", rescale_factor=1 / 127)
        elif change == "tokenizer":
            content = json.loads((folder / "tokenizer.json").read_text())
            merges = content["model"]["merges"]
            merges[-1], merges[-2] = merges[-2], merges[-1]
            (folder / "tokenizer.json").write_text(json.dumps(content))
        dtype = "bfloat16" if change == "dtype" else "float32"
        assert load(folder, dtype=dtype).fingerprint != load(sound).fingerprint

    def test_special_tokens_count_where_the_prompt_prints_them(self, sound, tmp_path):
        template = json.loads((sound / "tokenizer_config.json").read_text())["chat_template"]
        prints = []
        kinds = [(start, token) for start in ("", "{{ bos_token }}") for token in ("<|im_end|>", "<|endoftext|>")]
        for number, (start, token) in enumerate(kinds):
            folder = shutil.copytree(sound, tmp_path / str(number))
            edit(folder / "tokenizer_config.json", chat_template=start + template, bos_token=token)
            prints.append(load(folder).fingerprint)
        assert prints[0] == prints[1]
        assert len(set(prints)) == 3

    def test_a_change_in_memory_is_told_and_noticed(self, sound):
        backbone = load(sound)
        before = backbone.fingerprint
        with torch.no_grad():
            backbone.model.language_model.norm.weight[0] += 1
        backbone.mark_changed()
        changed = backbone.fingerprint
        assert changed != before
        with torch.no_grad():
            backbone.model.language_model.norm.weight[0] += 1
        backbone.mark_changed()
        assert backbone.fingerprint not in (before, changed)

    def test_weight_files_are_not_read_again(self, sound, folder, tmp_path, monkeypatch):
        """Neither those of the hub's cache, which are named by their SHA-256, nor those that are as they were."""
        monkeypatch.setattr(digests.time, "time", lambda: 2**40)  # what has just been written counts as settled
        wanted = load(sound).fingerprint
        plain = digests.file_digest(sound / "model.safetensors")
        (tmp_path / "blobs").mkdir()
        shutil.move(folder / "model.safetensors", tmp_path / "blobs" / plain)
        (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / plain)
        monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert load(sound).fingerprint == wanted
        assert load(folder).fingerprint == wanted


class TestSaving:
    """Backbone.save writes what Backbone.load reads."""

    @pytest.mark.parametrize("num_layers", [None, 2])
    @pytest.mark.parametrize("family", nano.FAMILIES)
    def test_saved_is_loaded(self, family, num_layers, tmp_path):
        backbone = load(nano.make_checkpoint(family, tmp_path / "nano", shards=2), num_layers=num_layers)
        with torch.no_grad():
            backbone.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.5)
        backbone.mark_changed()
        wanted = backbone.encode(EXAMPLES, TAPS)
        backbone.save(tmp_path / "saved")
        assert not backbone.changed
        loaded = load(tmp_path / "saved")
        assert loaded.num_layers == loaded.total_layers == (num_layers or 4)
        np.testing.assert_array_equal(loaded.encode(EXAMPLES, TAPS), wanted)
        assert loaded.fingerprint == backbone.fingerprint
        assert loaded.processor.chat_template == backbone.processor.chat_template
        assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}
        if num_layers is None:
            own = nano.reference_class(family).from_pretrained(tmp_path / "saved").model
            torch.testing.assert_close(own.state_dict(), backbone.model.state_dict(), rtol=0, atol=0)


class TestPreparing:
    """Pictures are opened once and never mistaken for one another."""

    def test_one_picture_is_read_once_for_all_its_texts(self, sound, monkeypatch):
        backbone = load(sound)
        read = []
        read_pictures = backbone.processor.read_pictures
        monkeypatch.setattr(
            backbone.processor, "read_pictures", lambda example: read.append(1) or read_pictures(example)
        )
        picture = Image.new("RGB", (56, 56))
        prepared = backbone.prepare([Example(picture, str(number)) for number in range(5)])
        assert read == [1]
        assert len({item.pictures.key for item in prepared}) == 1
        assert len({tuple(item.ids) for item in prepared}) == 5

    def test_pictures_of_a_stream_that_are_gone_are_not_mistaken(self, sound):
        """CPython gives the `id` of what is gone to what comes next."""
        stream = (Example(Image.new("RGB", (56, 56), (number, 0, 0)), "x") for number in range(30))
        assert len({item.pictures.key for item in load(sound).prepare(stream)}) == 30
