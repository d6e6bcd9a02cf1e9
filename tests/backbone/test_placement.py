"""Which part of a model lies on which device, and that hidden states, masks and positions follow.

There is no second device here. What a device holds after loading is checked with the meta device as the second one. The
pass runs on tensors that have values and say that they lie on one of two devices (`tests/two_devices.py`). Not covered:
the copies between two GPUs themselves, and kernels that only GPUs have.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from qwen_vl_classifier import Backbone, Example, Tap
from qwen_vl_classifier.backbone.adapters import add_adapter
from qwen_vl_classifier.backbone.encoder import pooled_states
from qwen_vl_classifier.backbone.packing import pack, pack_together
from qwen_vl_classifier.backbone.placement import loads_to_devices, place
from qwen_vl_classifier.errors import MissingExtraError
from tests.two_devices import GPUs, put

FRONT = {"visual.blocks.0.mlp.weight": 30, "language_model.embed_tokens.weight": 70}
FIRST, SECOND = torch.device("lazy", 0), torch.device("lazy", 1)
A, B, C = (torch.device("cuda", number) for number in range(3))


def weights(*layers: int) -> dict[str, int]:
    """Bytes of a vision tower and embeddings (100), of decoder layers, and of the last norm (0)."""
    parts = {f"language_model.layers.{number}.{part}": size // 2 for number, size in enumerate(layers) for part in "ab"}
    return {**FRONT, **parts, "language_model.norm.weight": 0}


def layers_on(placed: dict[str, torch.device], count: int) -> list[int | None]:
    return [placed[f"language_model.layers.{number}"].index for number in range(count)]


def test_without_accelerate_a_model_is_on_one_device(sound, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"accelerate.*qwen-vl-classifier\[finetune\]"):
        Backbone.load(sound, device="spread:cpu,cpu")
    assert Backbone.load(sound, device="cpu").devices == (torch.device("cpu"),)


def test_weights_go_straight_to_a_gpu_where_accelerate_can_do_it(monkeypatch):
    assert loads_to_devices([A])
    assert loads_to_devices([A, B])
    assert not loads_to_devices([torch.device("cpu")])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not loads_to_devices([A])
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert not loads_to_devices([A])


class TestPlan:
    def test_one_device_has_everything(self):
        assert place(weights(10, 10), [B], [1000]) == {"": B}

    @pytest.mark.parametrize(
        ("devices", "room", "wanted"),
        [
            ([A, B], [1000, 1000], [0] * 5 + [1] * 7),  # 100 + 5 * 50 beside 7 * 50
            ([A, B, C], [1000] * 3, [0] * 3 + [1] * 5 + [2] * 4),
            ([A, B], [1000, 300], [0] * 9 + [1] * 3),
            ([A, B], [120, 1000], [1] * 12),  # nothing beside the vision tower fits
        ],
    )
    def test_layers_fill_devices_in_order_by_their_room(self, devices, room, wanted):
        placed = place(weights(*[50] * 12), devices, room)
        assert layers_on(placed, 12) == wanted
        assert placed["visual"] == placed["language_model.embed_tokens"] == placed["language_model.rotary_emb"] == A
        assert placed["language_model.norm"] == devices[wanted[-1]]

    def test_where_memory_is_short_the_fullest_is_as_empty_as_possible(self):
        assert layers_on(place(weights(*[50] * 12), [A, B], [10, 10]), 12) == [0] * 5 + [1] * 7

    def test_layers_of_many_digits_are_told_apart(self):
        placed = place(weights(*[50] * 120), [A, B], [10**6] * 2)
        assert layers_on(placed, 120) == sorted(layers_on(placed, 120))
        assert set(layers_on(placed, 120)) == {0, 1}


def test_weights_are_loaded_where_they_stay(kind_checkpoint, monkeypatch):
    """On the CPU and the meta device, with room for half of the layers each."""
    _, folder = kind_checkpoint
    whole = Backbone.load(folder, device="cpu", dtype="bfloat16").model
    layers = sum(parameter.nbytes for parameter in whole.language_model.layers.parameters()) // 2
    room = {"cpu": sum(parameter.nbytes for parameter in whole.parameters()) - layers, "meta": layers}
    pair = [torch.device(kind) for kind in room]
    monkeypatch.setattr("qwen_vl_classifier.backbone.backbone.choose_devices", lambda _: pair)
    monkeypatch.setattr("qwen_vl_classifier.backbone.checkpoint.model.free_memory", lambda device: room[device.type])
    backbone = Backbone.load(folder, device="spread", dtype="bfloat16")
    model = backbone.model
    assert backbone.device.type == "cpu"
    assert [device.type for device in backbone.devices] == ["cpu", "meta"]
    on = [next(layer.parameters()).device.type for layer in model.language_model.layers]
    assert on == ["cpu", "cpu", "meta", "meta"]
    for name, parameter in model.named_parameters():
        part, _, rest = name.partition("layers.")
        expected = on[int(rest.split(".")[0])] if part == "language_model." else "cpu"
        assert parameter.device.type == ("meta" if name == "language_model.norm.weight" else expected), name
        assert parameter.device.type == "meta" or torch.equal(parameter, whole.get_parameter(name)), name
    for name, module in model.named_modules():  # nothing of accelerate is around the layers
        assert not hasattr(module, "_hf_hook"), name
    assert "to" not in vars(model)


def spread(backbone: Backbone, second: torch.device = SECOND) -> None:
    """Put the first two layers on one device and the others on another, both with values; changed in place."""
    behind = ("language_model.layers.2.", "language_model.layers.3.", "language_model.norm.")
    put(backbone.model, lambda name: second if name.startswith(behind) else FIRST)


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch) -> None:
    """Autocast does not know the devices of these tests; nothing here turns it on."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@torch.no_grad()
def pooled(backbone: Backbone, examples: Sequence[Example], taps: Sequence[Tap], *, share: bool = True) -> np.ndarray:
    """Read features in one batch; inference mode, which `encode` uses, does not take tensors of such devices."""
    encoded = backbone.prepare(examples)
    by_picture: dict[bytes, list[int]] = {}
    for number, item in enumerate(encoded):
        by_picture.setdefault(item.pictures.key if share else bytes([number]), []).append(number)
    batch = tuple(map(tuple, by_picture.values()))
    packed = pack(backbone.processor, encoded, batch, backbone.device, backbone.dtype)
    return pooled_states(backbone.model, packed, taps).cpu().numpy()


class TestPass:
    TAPS = (Tap(1, "mean"), Tap(2, "text"), Tap(3, "image"), Tap(4, "last"), Tap(-1, "mean"))

    @pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.soak)])
    def test_features_are_those_of_one_device(self, kind_checkpoint, mixed_examples, share):
        """Of every kind of layer, with features of earlier layers of the vision tower (Qwen3-VL) among them."""
        _, folder = kind_checkpoint
        features, moves = {}, {}
        for second in (FIRST, SECOND):
            backbone = Backbone.load(folder, device="cpu", dtype="float32")
            spread(backbone, second)
            assert backbone.devices == tuple(dict.fromkeys([FIRST, second]))
            with GPUs() as gpus:
                features[second] = pooled(backbone, mixed_examples, self.TAPS, share=share)
            moves[second] = set(gpus.moves)
        np.testing.assert_array_equal(features[SECOND], features[FIRST])
        assert moves[SECOND] - moves[FIRST] == {(FIRST, SECOND), (SECOND, FIRST)}

    def test_a_tap_on_the_first_device_does_not_need_the_second(self, sound, mixed_examples):
        backbone = Backbone.load(sound, device="cpu", dtype="float32")
        spread(backbone)
        with GPUs() as gpus:
            pooled(backbone, mixed_examples, [Tap(2, "mean")])
        assert gpus.moves
        assert not any(SECOND in move for move in gpus.moves)

    def test_gradients_of_an_adapter_are_those_of_one_device(self, sound, mixed_examples):
        gradients = []
        for second in (FIRST, SECOND):
            backbone = Backbone.load(sound, device="cpu", dtype="float32")
            add_adapter(backbone, towers="llm", tap=Tap(-1, "last"), rank=2, alpha=4)
            spread(backbone, second)
            encoded = backbone.prepare(mixed_examples[:3])
            with GPUs(), torch.enable_grad():
                packed, _ = pack_together(backbone.processor, encoded, backbone.device, backbone.hidden_size)
                pooled_states(backbone.model, packed, [Tap(-1, "last")]).square().mean().backward()
            trained = {name: weight for name, weight in backbone.model.named_parameters() if weight.requires_grad}
            assert all(weight.grad.device == weight.device for weight in trained.values())
            gradients.append({name: weight.grad.values for name, weight in trained.items()})
        assert {weight.device for weight in trained.values()} == {FIRST, SECOND}
        assert any(gradient.any() for gradient in gradients[0].values())
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name

    def test_a_fingerprint_and_saved_files_do_not_tell_that_it_was_spread(self, sound, tmp_path):
        written = []
        for name in ("whole", "spread"):
            backbone = Backbone.load(sound, device="cpu", dtype="float32")
            if name == "spread":
                spread(backbone)
            backbone.mark_changed()
            changed = backbone.fingerprint
            backbone.save(tmp_path / name)
            written.append((changed, backbone.fingerprint, (tmp_path / name / "model.safetensors").read_bytes()))
        assert written[0] == written[1]
