"""Many tensors in one copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen_vl_classifier.backbone.layers.transfer import in_one_copy, to_device


@dataclass(frozen=True, slots=True)
class Held:
    name: str
    tensors: tuple[torch.Tensor | None, ...]
    inner: Held | None = None


def tensors_of_many_types() -> list[torch.Tensor]:
    return [
        torch.tensor(3),
        torch.arange(7, dtype=torch.uint8),
        torch.zeros(0, 4),
        torch.arange(12).view(3, 4).t(),
        torch.tensor([True, False, True]),
        torch.randn(5, 3, dtype=torch.float64),
        torch.randn(3).bfloat16(),
    ]


def test_views_of_one_copy_hold_the_same():
    tensors = tensors_of_many_types()
    copies = in_one_copy(tensors, torch.device("cpu"))
    for tensor, copied in zip(tensors, copies, strict=True):
        assert copied.dtype == tensor.dtype
        assert torch.equal(copied, tensor)
        assert copied.data_ptr() % 64 == 0 or not copied.numel()
    assert len({copied.untyped_storage().data_ptr() for copied in copies}) == 1


def test_structures_are_kept_and_the_same_tensor_is_copied_once():
    tensor = torch.arange(3)
    value = {"held": Held("a", (tensor, None), Held("b", (tensor,))), "numbers": [1, 2]}
    moved = to_device(value, torch.device("meta"))
    assert moved["held"].name == "a"
    assert moved["held"].tensors[1] is None
    assert moved["held"].tensors[0].device.type == "meta"
    assert moved["held"].tensors[0] is moved["held"].inner.tensors[0]
    assert moved["numbers"] is value["numbers"]
    assert tensor.device.type == "cpu"


def test_what_is_there_already_is_not_copied():
    value = (Held("a", (torch.arange(3),)), tuple(tensors_of_many_types()))
    assert to_device(value, torch.device("cpu")) is value
