"""GPUs that are not there: tensors with values, which refuse what tensors of two devices refuse.

A tensor here says that it lies on a GPU, and its values lie in main memory. An operation whose tensors lie on several
devices is an error, as it is on GPUs; only numbers of no dimensions may come from the CPU. Autograd, modules and
hooks are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only


class OnGPU(Tensor):
    """A tensor that lies on a GPU as far as torch can see."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> OnGPU:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
        )
        tensor.values = values
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"OnGPU({self.values}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class GPUs(TorchDispatchMode):
    """Within it, tensors can be made on GPUs, and what is run on them is counted in `moves`.

    Attributes:
        moves: From and to which devices tensors were copied, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[tuple[torch.device, torch.device]] = []

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {}, self.moves)


def run(function: Any, args: Any, kwargs: dict[str, Any], moves: list[Any] | None = None) -> Any:
    """Run an operation on the values of its tensors, and say where its results lie."""
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, (args, kwargs))
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    places = {tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
    if len(places) > 1 and not copies:
        raise RuntimeError(
            f"{function}: expected all tensors to be on the same device, found {sorted(map(str, places))}"
        )
    if copies and tensors:
        before, after = (tensors[1].device, tensors[0].device) if len(tensors) > 1 else (tensors[0].device, device)
        if moves is not None and after not in (None, before):
            moves.append((before, after))
    if device is None:
        device = tensors[0].device if copies and tensors else next(iter(places), torch.device("cpu"))
    if device.type != "cpu" and "device" in kwargs:
        kwargs = (
            {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
            if "pin_memory" in kwargs
            else {
                **kwargs,
                "device": torch.device("cpu"),
            }
        )
    values = tree_map(lambda part: part.values if isinstance(part, OnGPU) else part, (args, kwargs))
    result = function(*values[0], **values[1])
    by_values = {id(tensor.values): tensor for tensor in tensors if isinstance(tensor, OnGPU)}

    def placed(part: Any) -> Any:
        if not isinstance(part, Tensor) or device.type == "cpu":
            return part
        return by_values.get(id(part)) if id(part) in by_values else OnGPU(part, device)

    return tree_map(placed, result)


def put(model: nn.Module, device_of: Callable[[str], torch.device]) -> None:
    """Move the weights and buffers of a model to such devices, by name; changed in place."""
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            place = device_of(f"{name}.{key}".lstrip("."))
            module.register_parameter(key, nn.Parameter(OnGPU(parameter.detach(), place), parameter.requires_grad))
        for key, buffer in module.named_buffers(recurse=False):
            module.register_buffer(key, OnGPU(buffer, device_of(f"{name}.{key}".lstrip("."))), persistent=False)
