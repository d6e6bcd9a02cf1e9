"""Place a model: which of its parts lies on which device.

The vision tower and the embeddings lie on the first device, and decoder layers follow in their order, so that hidden
states cross from one device to the next once. `backbone/encoder.py` moves them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import nn

from qwen_vl_classifier.extras import require

_ON_THE_FIRST = ("visual", "language_model.embed_tokens", "language_model.rotary_emb")
_LAYERS, _NORM = "language_model.layers", "language_model.norm"
_HALVINGS = 40  # of the range in which the least share of the memory is looked for

DeviceMap = dict[str, torch.device]
"""From names of modules to devices, as transformers' `from_pretrained` and accelerate take it."""


def place(weights: Mapping[str, int], devices: Sequence[torch.device], room: Sequence[int]) -> DeviceMap:
    """Choose the device of each part of a model, so that the fullest device is as empty as possible.

    Args:
        weights: Bytes of each weight, by name.
        devices: In the order of the layers.
        room: Bytes that are free on each of them.
    """
    if len(devices) == 1:
        return {"": devices[0]}
    count = len({_layer(name) for name in weights} - {None})
    sizes = [0] * count
    for name, size in weights.items():
        number = _layer(name)
        if number is not None:
            sizes[number] += size
    before = sum(weights.values()) - sum(sizes)
    least, most = 0.0, sum(weights.values()) / max(1, min(room))
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        fits = _fill(before, sizes, [int(middle * free) for free in room]) is not None
        least, most = (least, middle) if fits else (middle, most)
    chosen = _fill(before, sizes, [int(most * free) + 1 for free in room])
    assert chosen is not None
    placed = dict.fromkeys(_ON_THE_FIRST, devices[0])
    placed |= {f"{_LAYERS}.{number}": devices[device] for number, device in enumerate(chosen)}
    return placed | {_NORM: devices[chosen[-1]]}


def _layer(name: str) -> int | None:
    """Return the number of the decoder layer that a weight belongs to."""
    return int(name.removeprefix(f"{_LAYERS}.").split(".")[0]) if name.startswith(f"{_LAYERS}.") else None


def _fill(before: int, sizes: Sequence[int], room: Sequence[int]) -> list[int] | None:
    """Give each layer a device, in order, filling one after the other; `None` if they do not all fit.

    Args:
        before: Bytes of what lies on the first device beside layers.
        sizes: Bytes of each layer.
        room: Bytes that may be used on each device.
    """
    device, used = 0, before
    chosen = []
    for size in sizes:
        while used + size > room[device] or used > room[device]:
            device, used = device + 1, 0
            if device == len(room):
                return None
        used += size
        chosen.append(device)
    return chosen


def loads_to_devices(devices: Sequence[torch.device]) -> bool:
    """Tell whether transformers can load weights straight to devices, with accelerate; else they are moved afterwards.

    Raises:
        MissingExtraError: There are several devices, and accelerate is not installed.
    """
    if len(devices) > 1:
        require("accelerate", extra="finetune")
        return any(device.type != "cpu" for device in devices)
    # Processes of a launcher may share weights out in ways that do not go with it.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return devices[0].type != "cpu" and alone and find_spec("accelerate") is not None


def remove_hooks(model: nn.Module) -> None:
    """Remove what accelerate puts around the forward of a model's modules to move their inputs.

    The encoder moves what is needed, once for each device, and layers may be replaced by faster ones.
    """
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for name in [name for name, value in vars(model).items() if hasattr(value, "__wrapped__")]:
        delattr(model, name)  # `to` and its like, which would warn


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """Return the devices of a model, in the order of its parts; inputs go to the first."""
    return tuple(dict.fromkeys(_devices(model)))


def _devices(model: nn.Module) -> Iterator[torch.device]:
    for parameter in model.parameters():
        yield parameter.device
