"""Backbone.load: whole or not at all, as its arguments ask; saving; preparing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from qwen_vl_classifier import Backbone, Example
from qwen_vl_classifier.backbone.families import FAMILIES
from qwen_vl_classifier.errors import ConfigError
from tests import each_family, nano
from tests.backbone.checkpoint_folders import EXAMPLES, TAPS, load, refusal

pytestmark = pytest.mark.usefixtures("one_thread")


class TestSoundCheckpoints:
    """Every layout that the hub has."""

    @pytest.mark.parametrize(
        ("shards", "tied", "chat_template"), [(1, False, True), (3, True, False)], ids=["whole", "sharded-tied-bare"]
    )
    @pytest.mark.parametrize("family", each_family.FAMILIES)
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

    @pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "meta", "hpu:0", "cpu cpu"])
    def test_other_devices_are_refused(self, sound, device):
        assert "give auto, cpu, cuda, cuda:N, mps" in refusal(sound, ConfigError, device=device)

    def test_a_gpu_that_is_not_there(self, sound, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "sees no GPU" in refusal(sound, ConfigError, device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert "sees 2 GPU(s)" in refusal(sound, ConfigError, device="cuda:2")

    @pytest.mark.parametrize("family", each_family.FAMILIES)
    def test_only_the_first_layers(self, family, tmp_path):
        folder = nano.make_checkpoint(family, tmp_path / "nano", shards=2)
        part, whole = load(folder, num_layers=2), load(folder)
        assert (part.num_layers, part.total_layers) == (2, 4)
        names = set(part.model.state_dict())
        assert {name.split(".")[2] for name in names if name.startswith("language_model.layers.")} == {"0", "1"}
        np.testing.assert_array_equal(part.encode(EXAMPLES, TAPS), whole.encode(EXAMPLES, TAPS))

    @pytest.mark.parametrize("num_layers", [0, -1, 5, 100])
    def test_layers_that_are_not_there(self, sound, num_layers):
        assert f"num_layers {num_layers}: {sound} has 4; expected 1 to 4" in refusal(
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
        assert "expected 0 < min_pixels <= max_pixels" in refusal(sound, ConfigError, **limits)


class TestSaving:
    """Backbone.save writes what Backbone.load reads."""

    @pytest.mark.parametrize("num_layers", [None, 2])
    @pytest.mark.parametrize("family", each_family.FAMILIES)
    def test_saved_is_loaded(self, family, num_layers, tmp_path):
        backbone = load(nano.make_checkpoint(family, tmp_path / "nano", shards=2), num_layers=num_layers)
        with torch.no_grad():
            for parameter in backbone.model.language_model.layers[1].mlp.parameters():
                parameter.mul_(1.5)
        backbone.mark_changed()
        wanted = backbone.encode(EXAMPLES, TAPS)
        backbone.save(tmp_path / "saved")
        assert not backbone.changed
        loaded = load(tmp_path / "saved")
        assert loaded.num_layers == loaded.total_layers == (num_layers or 4)
        np.testing.assert_array_equal(loaded.encode(EXAMPLES, TAPS), wanted)
        assert loaded.fingerprint == backbone.fingerprint
        assert loaded.processor.chat_template == backbone.processor.chat_template
        names = {path.name for path in (tmp_path / "saved").iterdir()}
        settings = {path.name for path in (tmp_path / "nano").iterdir() if ".safetensors" not in path.name}
        assert names == settings | {"model.safetensors"}
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
            backbone.processor, "read_pictures", lambda example, **how: read.append(1) or read_pictures(example, **how)
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
