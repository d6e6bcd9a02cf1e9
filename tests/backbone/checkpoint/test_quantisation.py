"""Quantised decoders: which layers, how far off, and that nothing else about a backbone changes."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.backbone.adapters import add_adapter, merge_adapter, read_adapter, write_adapter
from qwen_vl_classifier.backbone.checkpoint.adapter_layout import adapter_weights
from qwen_vl_classifier.backbone.checkpoint.quantisation import QUANTIZATIONS, whole_weight
from qwen_vl_classifier.backbone.towers import linear_layers, train_towers
from qwen_vl_classifier.errors import CheckpointError, ConfigError, MissingExtraError
from tests import nano
from tests.reference import assert_close, cosine_distance

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = Tap(-1, "mean")
TAPS = [Tap(1, "mean"), LAST, Tap(-1, "last")]
KINDS = {"8bit": bitsandbytes.nn.Linear8bitLt, "4bit": bitsandbytes.nn.Linear4bit}
MOST_ERROR = {"8bit": 0.005, "4bit": 0.16}  # of a weight, as a share of the layer's largest: half the widest step
ROOT = Path(__file__).resolve().parents[3]


def load(folder: Path | str, **options) -> Backbone:
    return Backbone.load(folder, **{"device": "cpu", "dtype": "float32", **options})


def round_weights(plain: Backbone, small: Backbone) -> Backbone:
    """Give a backbone the weights that a quantised one has, as whole numbers of their own type."""
    quantised = {name: weight for name, weight in small.model.named_parameters() if not weight.is_floating_point()}
    for name, weight in quantised.items():
        plain.model.get_parameter(name).data.copy_(whole_weight(weight, torch.float32))
    assert quantised
    return plain


@pytest.fixture(scope="module")
def checkpoint(nano_folder) -> Path:
    return nano_folder("qwen2_5_vl")


@pytest.fixture(scope="module")
def untouched() -> Callable[[Path, str | None], Backbone]:
    """Return a backbone in a quantisation that no test changes."""
    return functools.cache(lambda folder, quantization: load(folder, quantization=quantization))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
class TestLayers:
    def test_the_linear_layers_and_experts_of_the_decoder_and_no_others(self, nano_checkpoint, untouched, quantization):
        plain, small = (untouched(nano_checkpoint[1], kind) for kind in (None, quantization))
        decoder = linear_layers(plain.model, "llm", LAST)
        assert linear_layers(small.model, "llm", LAST) == decoder
        for name, module in small.model.named_modules():
            if isinstance(module, nn.Linear):
                assert type(module) is (KINDS[quantization] if name in decoder else nn.Linear), name
        kept = dict(plain.model.named_parameters())
        arrays = {name for name in kept if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))}
        assert len(arrays) == (2 * plain.num_layers if nano_checkpoint[0] in nano.EXPERTS else 0)
        for name, weight in small.model.named_parameters():
            if name not in arrays and name.removesuffix(".weight") not in decoder:
                assert torch.equal(weight, kept[name]), name
                continue
            whole = whole_weight(weight, torch.float32)
            assert whole.shape == kept[name].shape
            error = (whole - kept[name]).abs().max() / kept[name].abs().max()
            assert 0 < error < MOST_ERROR[quantization], name
        assert (small.dtype, small.device.type, small.quantization) == (torch.float32, "cpu", quantization)
        taken = [
            sum(weight.nbytes for weight in each.model.language_model.layers.parameters()) for each in (plain, small)
        ]
        assert taken[1] < {"8bit": 0.27, "4bit": 0.145}[quantization] * taken[0]  # of 4 bytes; and a few whole weights

    def test_features_are_those_of_the_rounded_weights(self, kind_checkpoint, untouched, mixed_examples, quantization):
        small = untouched(kind_checkpoint[1], quantization)
        wanted = round_weights(load(kind_checkpoint[1]), small).encode(mixed_examples, TAPS)
        assert_close(small.encode(mixed_examples, TAPS), wanted)
        assert_close(small.encode(mixed_examples, TAPS, share_prefixes=False), wanted)
        alone = np.concatenate([small.encode([example], TAPS) for example in mixed_examples])
        assert_close(alone, wanted)

    def test_every_layout_of_experts_is_quantised_alike(self, nano_folder, untouched, tmp_path, quantization):
        wanted = dict(untouched(nano_folder("qwen3_vl_moe"), quantization).model.named_parameters())
        folder = shutil.copytree(nano_folder("qwen3_vl_moe"), tmp_path / "swapped")
        weights = load_file(folder / "model.safetensors")
        swapped = {name: array.transpose(1, 2).contiguous() for name, array in weights.items() if ".experts." in name}
        save_file(weights | swapped, folder / "model.safetensors", metadata={"format": "pt"})
        for name, weight in load(folder, quantization=quantization).model.named_parameters():
            assert torch.equal(weight, wanted[name]), name

    def test_bfloat16(self, checkpoint, mixed_examples, quantization):
        narrow, exact = (load(checkpoint, quantization=quantization, dtype=kind) for kind in ("bfloat16", "float32"))
        assert narrow.dtype == torch.bfloat16
        distance = cosine_distance(narrow.encode(mixed_examples, TAPS), exact.encode(mixed_examples, TAPS))
        assert distance.max() < 0.05

    def test_fewer_layers_are_the_same_layers(self, checkpoint, mixed_examples, quantization):
        part, whole = (load(checkpoint, quantization=quantization, num_layers=number) for number in (2, None))
        assert part.num_layers == 2
        assert part.fingerprint == whole.fingerprint
        taps = [Tap(2, "mean")]
        np.testing.assert_array_equal(part.encode(mixed_examples, taps), whole.encode(mixed_examples, taps))

    def test_a_weight_that_is_missing_is_noticed(self, tmp_path, quantization):
        folder = nano.make_checkpoint("qwen3_vl", tmp_path / "checkpoint")
        weights = load_file(folder / "model.safetensors")
        removed = weights.pop("model.language_model.layers.1.mlp.up_proj.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="1 missing weight"):
            load(folder, quantization=quantization)
        more = {
            **weights,
            "model.language_model.layers.1.mlp.up_proj.weight": removed,
            "model.visual.extra": removed.clone(),
        }
        save_file(more, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"1 unexpected weight\(s\), first model.visual.extra"):
            load(folder, quantization=quantization)


def test_a_pass_leaves_quantised_experts_as_they_are(nano_folder):
    """Another thread may use the model meanwhile."""
    backbone = load(nano_folder("qwen3_vl_moe"), quantization="4bit")
    experts = backbone.model.language_model.layers[1].mlp.experts
    seen: list[torch.dtype] = []
    experts.act_fn.register_forward_pre_hook(lambda *_: seen.extend(weight.dtype for weight in experts.parameters()))
    backbone.encode([Example(None, "a text")], [LAST])
    assert set(seen) == {torch.uint8}


class TestIdentity:
    """A quantised backbone is a backbone of its own."""

    def test_fingerprints_differ(self, checkpoint):
        assert len({load(checkpoint, quantization=kind).fingerprint for kind in (None, *QUANTIZATIONS)}) == 3

    @pytest.mark.soak
    def test_another_process_agrees(self, checkpoint, tmp_path, fresh):
        code = (
            "import sys, numpy, torch; torch.set_num_threads(int(sys.argv[3]))\n"
            "from qwen_vl_classifier import Backbone, Example, Tap\n"
            "for quantization in sys.argv[4:]:\n"
            "    backbone = Backbone.load(sys.argv[1], device='cpu', dtype='float32', quantization=quantization)\n"
            "    seen = backbone.encode([Example(None, 'a text')], [Tap(-1, 'mean')])\n"
            "    numpy.save(f'{sys.argv[2]}/{quantization}.npy', seen)\n"
            "    print(backbone.fingerprint)"
        )
        printed = fresh.run(code, checkpoint, tmp_path, torch.get_num_threads(), *QUANTIZATIONS)
        assert not printed.stderr  # no advice of bitsandbytes, no report of transformers
        for quantization, fingerprint in zip(QUANTIZATIONS, printed.stdout.split(), strict=True):
            backbone = load(checkpoint, quantization=quantization)
            assert fingerprint == backbone.fingerprint
            wanted = backbone.encode([Example(None, "a text")], [LAST])
            seen = np.load(tmp_path / f"{quantization}.npy")
            np.testing.assert_allclose(seen, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


class TestTraining:
    """Such weights train through an adapter alone."""

    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5_moe"])
    def test_gradients_are_those_over_the_rounded_weights(
        self, family, nano_folder, scene_rows, quantization, checkpointing
    ):
        plain, small = (load(nano_folder(family), quantization=kind) for kind in (None, quantization))
        round_weights(plain, small)
        found = []
        for backbone in (small, plain):
            add_adapter(backbone, towers="llm+vision", tap=LAST, rank=4, alpha=8)
            weights = adapter_weights(backbone.model, backbone.adapter)
            torch.manual_seed(0)
            for weight in weights.values():
                weight.data += torch.randn_like(weight) * 0.1
            if checkpointing:
                backbone.enable_gradient_checkpointing()
            backbone.model.train()
            features = backbone.encode_batch(backbone.processor(scene_rows[:2]), [LAST])
            (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
            found.append({name: weight.grad for name, weight in weights.items()})
        seen, wanted = found
        largest = max(float(gradient.abs().max()) for gradient in wanted.values())
        for name, gradient in wanted.items():
            assert (seen[name] - gradient).abs().max() <= 1e-5 * largest, name

    def test_whole_weights_are_not_kept_for_gradients(self, nano_folder, scene_rows):
        backbone = load(nano_folder("qwen3_5_moe"), quantization="4bit")
        add_adapter(backbone, towers="llm", tap=LAST, rank=4, alpha=8)
        kept: list[tuple[int, ...]] = []

        def keep(saved: torch.Tensor) -> torch.Tensor:
            kept.append(tuple(sorted(saved.shape)))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            backbone.encode_batch(backbone.processor(scene_rows[:2]), [LAST])
        assert kept
        assert not {(8, 64, 96), (8, 48, 64)} & set(kept)  # the arrays of experts, in any order of axes

    def test_an_adapter_over_it_is_written_and_read(self, checkpoint, mixed_examples, tmp_path):
        backbone, again = (load(checkpoint, quantization="4bit") for _ in range(2))
        add_adapter(backbone, towers="llm", tap=LAST, rank=4, alpha=8)
        for weight in adapter_weights(backbone.model, backbone.adapter).values():
            weight.data += 0.05
        backbone.mark_changed()
        write_adapter(backbone, tmp_path / "adapter")
        read_adapter(again, tmp_path / "adapter")
        assert again.fingerprint == backbone.fingerprint
        np.testing.assert_array_equal(again.encode(mixed_examples, TAPS), backbone.encode(mixed_examples, TAPS))

    def test_what_would_need_whole_weights_is_refused(self, checkpoint, tmp_path):
        backbone = load(checkpoint, quantization="8bit")
        with pytest.raises(ConfigError, match="train an adapter"):
            train_towers(backbone, "llm", LAST)
        with pytest.raises(ConfigError, match="load it without quantization"):
            backbone.save(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        add_adapter(backbone, towers="llm", tap=LAST, rank=2, alpha=4)
        with pytest.raises(ConfigError, match="cannot hold the sum"):
            merge_adapter(backbone)
        assert backbone.adapter is not None


class TestRefusals:
    def test_another_number_of_bits(self, checkpoint):
        with pytest.raises(ConfigError, match="quantization '3bit': expected 8bit, 4bit or None"):
            load(checkpoint, quantization="3bit")

    @pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
    def test_without_what_it_needs_the_extra_is_named(self, checkpoint, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=r"qwen-vl-classifier\[finetune\]"):
            load(checkpoint, quantization="4bit")

    @pytest.mark.parametrize("error", [RuntimeError("no kernel image"), NotImplementedError(), OSError(2, "libbnb")])
    def test_hardware_on_which_it_does_not_run(self, checkpoint, monkeypatch, error):
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", fail)
        with pytest.raises(ConfigError) as caught:
            load(checkpoint, quantization="4bit")
        assert str(caught.value) == (
            f"quantization '4bit': bitsandbytes does not run on cpu here ({type(error).__name__}); "
            "use a GPU that it supports, or load without quantization"
        )


class TestQuantisedCheckpoints:
    """A checkpoint whose weights are quantised already is refused by its configuration, before any weight is read."""

    METHODS = (
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes, 4 bit"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bit"),
        ({"load_in_4bit": True}, "bitsandbytes, 4 bit"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
        ({"quant_algo": "FP8", "producer": {"name": "modelopt"}}, "FP8"),
        ({"quant_method": "not_invented_yet"}, "not_invented_yet"),
        ({"bits": 3}, "by an unknown method"),
        ("int8", "by an unknown method"),
    )

    @pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config", "vision_config"])
    @pytest.mark.parametrize(("settings", "said"), METHODS, ids=lambda value: str(value)[:30])
    def test_by_configuration(self, checkpoint, tmp_path, settings, said, place):
        folder = tmp_path / "quantised"
        folder.mkdir()
        config = json.loads((checkpoint / "config.json").read_text())
        if place in ("quantization_config", "compression_config"):
            config[place] = settings
        else:
            config[place] = {**config.get(place, {}), "quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(config))  # and no other file is there to be read
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        advice = "load the unquantised checkpoint, with --quantization 4bit if memory is short"
        assert str(caught.value) == f"{folder}: is already quantised ({said}); {advice}"

    @pytest.mark.parametrize("settings", [None, {}])
    def test_no_quantisation_is_none(self, checkpoint, tmp_path, settings):
        folder = shutil.copytree(checkpoint, tmp_path / "copy")
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(config))
        assert load(folder).quantization is None

    @pytest.mark.parametrize("kind", ["awq", "fp8", "int8"])
    def test_by_weights_where_the_configuration_is_silent(self, checkpoint, tmp_path, kind):
        folder = shutil.copytree(checkpoint, tmp_path / "copy")
        name = "model.layers.1.mlp.up_proj"
        weights = load_file(folder / "model.safetensors")
        weight = weights.pop(f"{name}.weight")
        weights |= {
            "awq": {f"{name}.qweight": torch.zeros(64, 16, dtype=torch.int32), f"{name}.scales": torch.zeros(1, 128)},
            "fp8": {f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": torch.ones(1, 1)},
            "int8": {f"{name}.weight": weight.to(torch.int8), f"{name}.SCB": torch.ones(128)},
        }[kind]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"is already quantised \(model.safetensors has {name}\."):
            load(folder)
