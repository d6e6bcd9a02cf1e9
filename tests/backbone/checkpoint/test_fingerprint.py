"""The fingerprint names a backbone by its content."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from qwen_vl_classifier.files import digests
from tests.backbone.checkpoint_folders import edit, edit_weights, load

pytestmark = pytest.mark.usefixtures("one_thread")


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
