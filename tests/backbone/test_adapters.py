"""Adapters: nothing changes until they train; what is written is what PEFT reads; anything amiss is an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from qwen_vl_classifier import Backbone, Tap
from qwen_vl_classifier.backbone.adapters import add_adapter, merge_adapter, read_adapter, write_adapter
from qwen_vl_classifier.backbone.checkpoint.adapter_layout import adapter_weights
from qwen_vl_classifier.backbone.layers import fused
from qwen_vl_classifier.backbone.towers import TOWERS, linear_layers, train_towers
from qwen_vl_classifier.errors import ConfigError, MissingExtraError
from tests import nano
from tests.backbone.adapted import LAST, SETTINGS, TAPS, load_exact, train
from tests.reference import assert_close, by_hand, cosine_distance, load_reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def backbone(kind_checkpoint) -> Backbone:
    return load_exact(kind_checkpoint[1])


class TestAttaching:
    """A new adapter."""

    @pytest.mark.parametrize("towers", TOWERS)
    def test_features_stay_what_they_were(self, backbone, mixed_examples, towers):
        before = backbone.encode(mixed_examples, TAPS)
        add_adapter(backbone, towers=towers, tap=LAST, rank=4, alpha=8)
        assert_close(backbone.encode(mixed_examples, TAPS), before)
        # The layers take another way, which rounds otherwise; on the same way, they are the same to the last bit.
        inputs = backbone.processor(mixed_examples)
        with torch.enable_grad():
            seen = backbone.encode_batch(inputs, TAPS).detach()
            for weight in adapter_weights(backbone.model, backbone.adapter).values():
                weight.data.zero_()
            assert torch.equal(seen, backbone.encode_batch(inputs, TAPS).detach())

    def test_only_its_weights_train(self, backbone):
        backbone.model.requires_grad_(True)
        add_adapter(backbone, towers="llm", tap=Tap(2, "mean"), rank=4, alpha=8)
        training = {name for name, weight in backbone.model.named_parameters() if weight.requires_grad}
        expected = {
            f"{target}.{side}.default.weight"
            for target in linear_layers(load_exact(backbone.folder).model, "llm", Tap(2, "mean"))
            for side in ("lora_A", "lora_B")
        }
        assert training == expected
        assert not backbone.model.training
        assert not any(module.training for module in backbone.model.modules())

    def test_its_weights_are_float32_over_bfloat16(self, kind_checkpoint, mixed_examples):
        narrow, exact = (load_exact(kind_checkpoint[1], dtype=dtype) for dtype in ("bfloat16", "float32"))
        features = []
        for backbone in (narrow, exact):
            add_adapter(backbone, **SETTINGS)
            train(backbone)
            weights = adapter_weights(backbone.model, backbone.adapter).values()
            assert {weight.dtype for weight in weights} == {torch.float32}
            features.append(backbone.encode(mixed_examples, TAPS))
        assert narrow.dtype == torch.bfloat16
        distance = cosine_distance(*features)
        # Where two experts are nearly tied, rounding sends a token to the other one.
        assert (np.median(distance) if kind_checkpoint[0] in nano.EXPERTS else distance.max()) < 0.01

    def test_the_seed_decides_the_first_weights(self, checkpoint):
        first, same, other = (load_exact(checkpoint) for _ in range(3))
        state = torch.random.get_rng_state()
        for backbone, seed in ((first, 3), (same, 3), (other, 4)):
            add_adapter(backbone, **SETTINGS, seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        assert first.fingerprint == same.fingerprint != other.fingerprint

    def test_a_second_one_or_training_beneath_it_is_refused(self, adapted, written):
        with pytest.raises(ConfigError, match="has an adapter already"):
            add_adapter(adapted, **SETTINGS)
        with pytest.raises(ConfigError, match="has an adapter already"):
            read_adapter(adapted, written)
        with pytest.raises(ConfigError, match="merge it first"):
            train_towers(adapted, "llm", LAST)

    @pytest.mark.parametrize(
        "wrong",
        [{"rank": 0}, {"rank": 10**6}, {"rank": 2.0}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0}],
        ids=str,
    )
    def test_settings_out_of_range(self, checkpoint, wrong):
        backbone = load_exact(checkpoint)
        with pytest.raises(ConfigError) as caught:
            add_adapter(backbone, **SETTINGS | wrong)
        assert "\n" not in str(caught.value)
        assert backbone.adapter is None

    def test_without_peft_the_extra_is_named(self, checkpoint, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(MissingExtraError, match=r"qwen-vl-classifier\[finetune\]"):
            add_adapter(load_exact(checkpoint), **SETTINGS)

    def test_nothing_else_imports_peft(self, fresh):
        code = (
            "import sys; from qwen_vl_classifier import Backbone, Example, Tap\n"
            "import qwen_vl_classifier.backbone.adapters, qwen_vl_classifier.classifier.classifier\n"
            "Backbone.load('builtin:tiny', device='cpu').encode([Example(None, 'x')], [Tap(-1, 'mean')])\n"
            "assert not {'peft', 'bitsandbytes'} & sys.modules.keys()"
        )
        fresh.run(code).check_returncode()


class TestGradients:
    """What training sees."""

    def gradients(self, backbone: Backbone, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        backbone.model.train()
        backbone.model.zero_grad()
        torch.manual_seed(0)  # of dropout
        features = backbone.encode_batch(inputs, [LAST])
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        backbone.model.eval()
        named = backbone.model.named_parameters()
        return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

    @pytest.mark.parametrize("towers", TOWERS)
    def test_checkpointing_leaves_them_as_they_are(self, backbone, scene_rows, towers):
        add_adapter(backbone, **SETTINGS | {"towers": towers})
        train(backbone)
        inputs = backbone.processor(scene_rows[:3])
        wanted = self.gradients(backbone, inputs)
        assert all("lora_" in name for name in wanted)
        assert len(wanted) == 2 * len(backbone.adapter.targets)
        backbone.enable_gradient_checkpointing()
        seen = self.gradients(backbone, inputs)
        assert seen.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert gradient.abs().max() > 0, name
            assert torch.equal(seen[name], gradient), name


class TestFiles:
    """PEFT's own layout, without this machine in it."""

    # PEFT asks transformers by an older name, which transformers warns of.
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
    def test_peft_reads_what_was_written(self, nano_checkpoint, mixed_examples, tmp_path):
        backbone = load_exact(nano_checkpoint[1])
        add_adapter(backbone, **SETTINGS | {"towers": "all"})
        write_adapter(train(backbone), tmp_path / "adapter")
        seen = backbone.encode(mixed_examples, TAPS)
        assert_close(backbone.encode(mixed_examples, TAPS, share_prefixes=False), seen)
        reference = load_reference(*nano_checkpoint)
        plain = by_hand(reference, backbone.processor, mixed_examples, TAPS)
        wrapped = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
        wanted = by_hand(wrapped.base_model.model, backbone.processor, mixed_examples, TAPS)
        assert_close(seen, wanted)
        assert np.abs(seen - plain).max() > 0.01 * np.abs(plain).max()  # the adapter does something

    def test_it_comes_back(self, checkpoint, written, adapted, mixed_examples):
        loaded = load_exact(checkpoint)
        read_adapter(loaded, written)
        np.testing.assert_array_equal(loaded.encode(mixed_examples, TAPS), adapted.encode(mixed_examples, TAPS))
        assert loaded.fingerprint == adapted.fingerprint
        assert loaded.adapter == adapted.adapter
        assert not any(weight.requires_grad for weight in loaded.model.parameters())
        assert not any(module.training for module in loaded.model.modules())

    def test_no_path_of_this_machine(self, checkpoint, written):
        assert sorted(path.name for path in written.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        text = (written / "adapter_config.json").read_text()
        assert json.loads(text)["base_model_name_or_path"] == "checkpoint"
        assert str(checkpoint.parent) not in text
        assert str(Path.home()) not in text

    def test_without_an_adapter_there_is_nothing_to_write(self, checkpoint, tmp_path):
        with pytest.raises(ConfigError, match="has no adapter"):
            write_adapter(load_exact(checkpoint), tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


class TestMerging:
    """The adapter becomes part of the weights."""

    def test_features_stay_and_layers_are_plain_again(self, backbone, mixed_examples, monkeypatch):
        names = list(backbone.model.state_dict())
        add_adapter(backbone, **SETTINGS | {"towers": "all"})
        wanted = train(backbone).encode(mixed_examples, TAPS)
        calls: list[int] = []
        run = fused._mlp_plus
        monkeypatch.setattr(fused, "_mlp_plus", lambda *states: calls.append(1) or run(*states))
        assert not calls
        merge_adapter(backbone)
        assert_close(backbone.encode(mixed_examples, TAPS), wanted)
        assert len(calls) >= backbone.num_layers
        assert list(backbone.model.state_dict()) == names
        assert all(type(m) is nn.Linear for m in backbone.model.modules() if isinstance(m, nn.Linear))
        assert backbone.adapter is None
        assert backbone.changed
        assert not any(weight.requires_grad for weight in backbone.model.parameters())

    def test_the_sum_is_rounded_once(self, checkpoint, adapted):
        narrow = load_exact(checkpoint, dtype="bfloat16")
        add_adapter(narrow, **SETTINGS)
        train(narrow)
        base = {
            name: weight.float() for name, weight in load_exact(checkpoint, dtype="bfloat16").model.state_dict().items()
        }
        weights = adapter_weights(narrow.model, narrow.adapter)
        merge_adapter(narrow)
        for target in adapted.adapter.targets:
            up, down = (weights[f"base_model.model.{target}.lora_{side}.weight"].detach() for side in "BA")
            wanted = (base[f"{target}.weight"] + 2.0 * up @ down).bfloat16()
            assert torch.equal(narrow.model.get_submodule(target).weight, wanted), target

    def test_the_next_adapter_is_the_first_one_again(self, adapted, mixed_examples):
        merge_adapter(adapted)
        before = adapted.encode(mixed_examples, TAPS)
        add_adapter(adapted, **SETTINGS | {"rank": 2, "towers": "llm"})
        assert_close(adapted.encode(mixed_examples, TAPS), before)
        assert len(adapted.adapter.targets) == 4 * 7

    def test_without_an_adapter(self, checkpoint):
        with pytest.raises(ConfigError, match="has no adapter"):
            merge_adapter(load_exact(checkpoint))


class TestFingerprint:
    """Features with and without an adapter, before and after training, are never mixed up."""

    def test_it_follows_attaching_training_and_merging(self, checkpoint):
        backbone = load_exact(checkpoint)
        prints = [backbone.fingerprint]
        add_adapter(backbone, **SETTINGS)
        prints.append(backbone.fingerprint)
        train(backbone)
        prints.append(backbone.fingerprint)
        assert not backbone.changed  # its own weights are those of the files
        merge_adapter(backbone)
        prints.append(backbone.fingerprint)
        assert len(set(prints)) == 4

    def test_scaling_enters(self, checkpoint):
        one, two = load_exact(checkpoint), load_exact(checkpoint)
        add_adapter(one, **SETTINGS)
        add_adapter(two, **SETTINGS | {"alpha": 4.0})
        assert one.fingerprint != two.fingerprint

    def test_changed_weights_beneath_an_adapter_enter(self, checkpoint, tmp_path):
        backbone, plain = load_exact(checkpoint), load_exact(checkpoint)
        backbone.model.language_model.norm.weight.data += 0.5
        backbone.mark_changed()
        for each in (backbone, plain):
            add_adapter(each, **SETTINGS)
        assert backbone.changed
        assert backbone.fingerprint != plain.fingerprint
        backbone.save(tmp_path / "saved")  # the base alone; the adapter stays attached
        write_adapter(backbone, tmp_path / "adapter")
        loaded = load_exact(tmp_path / "saved")
        read_adapter(loaded, tmp_path / "adapter")
        assert loaded.fingerprint == backbone.fingerprint
