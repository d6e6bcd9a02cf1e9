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

aten = torch.ops.aten


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
    asked: list[torch.device] = []
    tree_map_only(Tensor, tensors.append, (args, kwargs))
    tree_map_only(torch.device, asked.append, (args, kwargs))
    places = {tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
    if function is aten.copy_.default:
        device, before = tensors[0].device, tensors[1].device
    elif function.overloadpacket in (aten._to_copy, aten.to):
        before = tensors[0].device
        device = asked[0] if asked else tensors[-1].device if function is aten.to.other else before
    else:
        device = before = asked[0] if asked else next(iter(places), torch.device("cpu"))
        if len(places) > 1:
            raise RuntimeError(f"{function}: all tensors must be on one device, found {sorted(map(str, places))}")
    if moves is not None and device != before:
        moves.append((before, device))
    known = {id(tensor.values): tensor for tensor in tensors if isinstance(tensor, OnGPU)}
    values: Any = tree_map(_value, (args, kwargs))
    if function is aten.histc.default and not values[0][0].is_floating_point():  # which CPUs do not count
        result = function(values[0][0].double(), *values[0][1:], **values[1]).to(values[0][0].dtype)
    else:
        result = function(*values[0], **values[1])

    def placed(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        same = known.get(id(part))  # an operation in place
        if same is not None and same.device == device:
            return same
        return part if device.type == "cpu" else OnGPU(part, device)

    return tree_map(placed, result)


def _value(part: Any) -> Any:
    if isinstance(part, torch.device):
        return torch.device("cpu")
    return part.values if isinstance(part, OnGPU) else part


def put(model: nn.Module, device_of: Callable[[str], torch.device]) -> None:
    """Move the weights and buffers of a model to such devices, by name; changed in place."""
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            place = device_of(f"{name}.{key}".lstrip("."))
            module.register_parameter(key, nn.Parameter(OnGPU(parameter.detach(), place), parameter.requires_grad))
        for key, buffer in module.named_buffers(recurse=False):
            module.register_buffer(key, OnGPU(buffer, device_of(f"{name}.{key}".lstrip("."))), persistent=False)
