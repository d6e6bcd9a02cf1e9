"""Copy many small tensors to a device at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

_JOINING = ("cuda", "meta")  # Apple's GPUs do not read views everywhere; the meta device stands for GPUs in tests
_ALIGNMENT = 64  # bytes, as torch aligns memory on CPUs: kernels read whole vectors

T = TypeVar("T")


class Movable:
    """A dataclass whose tensors move to another device together, as `Tensor.to` moves one."""

    __slots__ = ()

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """Return the same with all tensors on a device; `non_blocking` is always true."""
        return to_device(self, torch.device(device))


def to_device(value: T, device: torch.device) -> T:
    """Copy all tensors within a value to a device; from the host to a GPU in one copy that it does not wait for.

    Each copy costs a call, and the host waits for one from memory that is not pinned.

    Args:
        value: A tensor, or a dataclass, tuple or mapping of such values; anything else stays as it is.
        device: The device of the result.

    Returns:
        A value of the same structure. What is there already, or holds no tensors, is the same object.
    """
    tensors = {id(tensor): tensor for tensor in _tensors(value) if tensor.device != device}
    joins = device.type in _JOINING
    together = {number: tensor for number, tensor in tensors.items() if joins and tensor.device.type == "cpu"}
    copies = {number: tensor.to(device) for number, tensor in tensors.items() if number not in together}
    if together:
        copies.update(zip(together, in_one_copy(list(together.values()), device), strict=True))
    return _rebuilt(value, copies)  # type: ignore[no-any-return]


def in_one_copy(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy tensors of any types from the CPU to a device, one after the other in one piece of memory.

    Args:
        tensors: Contiguous or not.
        device: The device of the result.

    Returns:
        Views of one tensor of bytes, with the types and shapes of `tensors`.
    """
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    # torch keeps pinned memory until the copy from it is done.
    joined = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, tensor in zip(_views(joined, starts, tensors), tensors, strict=True):
        place.copy_(tensor)
    return _views(joined.to(device, non_blocking=True), starts, tensors)


def _views(joined: Tensor, starts: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [
        joined[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for part in _parts(value).values():
        yield from _tensors(part)


def _rebuilt(value: Any, copies: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return copies.get(id(value), value)
    before = _parts(value)
    parts = {name: _rebuilt(part, copies) for name, part in before.items()}
    if all(parts[name] is part for name, part in before.items()):
        return value
    if isinstance(value, Mapping):
        return parts
    return tuple(parts.values()) if isinstance(value, tuple) else replace(value, **parts)


def _parts(value: Any) -> dict[Any, Any]:
    """Return what a dataclass, tuple or mapping holds, by name, number or key."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {}
