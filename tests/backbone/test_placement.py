"""Which part of a model lies on which device, and that hidden states, masks and positions follow.

There is no second device here. What a device holds is checked with the meta device as the second one, and every move
between devices with torch's fake tensors, which have no values, but refuse operations on tensors of two devices as
GPUs do. Values are compared with one device listed twice. Not covered: the copies themselves.
"""

from __future__ import annotations

import pytest
import torch

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.backbone.placement import place

FRONT = {"visual.blocks.0.mlp.weight": 30, "language_model.embed_tokens.weight": 70}
A, B, C = (torch.device("cuda", number) for number in range(3))


def weights(*layers: int) -> dict[str, int]:
    """Bytes of a vision tower and embeddings (100), of decoder layers, and of the last norm (0)."""
    parts = {f"language_model.layers.{number}.{part}": size // 2 for number, size in enumerate(layers) for part in "ab"}
    return {**FRONT, **parts, "language_model.norm.weight": 0}


def layers_on(placed: dict[str, torch.device], count: int) -> list[int | None]:
    return [placed[f"language_model.layers.{number}"].index for number in range(count)]


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
