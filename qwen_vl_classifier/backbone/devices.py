"""Choose device, number type and token budget of a model, and handle running out of memory."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_vl_classifier.config.fields import DEVICES
from qwen_vl_classifier.errors import ConfigError, OutOfMemoryError
from qwen_vl_classifier.files.bounded import read_file

DType: TypeAlias = Literal["auto", "float32", "bfloat16"]

_log = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MOST_TOKENS = {"cpu": 2048, "mps": 4096}  # in a batch; more bring no speed
_MOST_TOKENS_OF_GPUS = 16384  # an H100 encoded 2 % faster with twice as many, and slower with four times as many
_FEWEST_TOKENS = 256
_SPREAD = "spread"
_CONTAINER = Path("/sys/fs/cgroup")  # where a container sees its own limits
_MOST_CONTAINER_BYTES = 65_536
_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is ARM's name
_MISSING = {  # by type of device: what torch does not see, and what to do
    "cuda": "GPU here; give cpu, or install a CUDA or ROCm build of torch",
    "mps": "GPU of Apple silicon here; give cpu",
    "xpu": "Intel GPU here; give cpu, or install an XPU build of torch",
}
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "MPS backend out of memory", "Invalid buffer size")  # plain RuntimeErrors


def gpu_names() -> list[str]:
    """Return the names of the GPUs that torch can compute on here, such as "cuda:0" and "cuda:1", or "mps".

    ROCm calls its GPUs cuda too.
    """
    if torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return ["mps"]
    return [f"xpu:{number}" for number in range(torch.xpu.device_count())] if torch.xpu.is_available() else []


def every_gpu() -> list[str]:
    """Return the names of all GPUs, for one process on each.

    Raises:
        ConfigError: There is none.
    """
    gpus = gpu_names()
    if not gpus:
        raise ConfigError(f"device 'all': torch sees no {_MISSING['cuda']}")
    return gpus


def choose_device(device: str) -> torch.device:
    """Return the device of a name: "auto", "cpu", "cuda", "cuda:N", "mps", "xpu" or "xpu:N".

    Raises:
        ConfigError: There is no such device here.
    """
    gpus = gpu_names()
    if device == "auto":
        # Without its number, this is the GPU that a launcher of several processes has chosen.
        return torch.device(gpus[0].partition(":")[0] if gpus else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r}: give {DEVICES}") from None
    if chosen.type == "cpu":
        return chosen
    if chosen.type not in _MISSING:
        raise ConfigError(f"device {device!r}: give {DEVICES}")
    if not any(name.startswith(chosen.type) for name in gpus):
        raise ConfigError(f"device {device!r}: torch sees no {_MISSING[chosen.type]}")
    if (chosen.index or 0) >= len(gpus):
        raise ConfigError(f"device {device!r}: torch sees {len(gpus)} GPU(s) here; count from 0")
    return chosen


def choose_devices(device: str) -> tuple[torch.device, ...]:
    """Return the device of a name, or several: of "spread" all GPUs, of "spread:cuda:0,cuda:1" the listed ones.

    Raises:
        ConfigError: There is no such device here, or devices of several kinds are listed.
    """
    if "," in device and not device.startswith(_SPREAD):
        raise ConfigError(
            f"device {device!r}: a list means one process for each device, which only score, extract and serve "
            f"support; give one device, or {_SPREAD}:{device} to divide one model among them"
        )
    if device != _SPREAD and not device.startswith(f"{_SPREAD}:"):
        return (choose_device(device),)
    listed = device.removeprefix(_SPREAD).removeprefix(":")
    names = [name.strip() for name in listed.split(",")] if listed else gpu_names()
    if not names:
        raise ConfigError(f"device {device!r}: torch sees no {_MISSING['cuda']}")
    chosen = tuple(choose_device(name) for name in names)
    if len({one.type for one in chosen}) > 1:
        raise ConfigError(f"device {device!r}: list devices of one kind, such as {_SPREAD}:cuda:0,cuda:1")
    return chosen


def spelled_devices(devices: Sequence[torch.device]) -> str:
    """Return what `choose_devices` takes for these devices."""
    names = ",".join(map(str, devices))
    return names if len(devices) == 1 else f"{_SPREAD}:{names}"


def device_name(device: torch.device) -> str:
    """Return the maker's name of a device, or its type where torch does not know the name."""
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name(device))
    return {"mps": "Apple silicon"}.get(device.type, "CPU")


def choose_dtype(dtype: DType | torch.dtype, devices: Sequence[torch.device]) -> torch.dtype:
    """Return the type of a name; "auto" is bfloat16 if all devices compute in it natively, else float32.

    Raises:
        ConfigError: Another type, float16 overflows in these models; or bfloat16 where the device does not have it.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")  # type: ignore[assignment]
    if dtype == "auto":
        lacking = [device for device in devices if not _computes_in_bfloat16(device)]
        for device in lacking:
            if device.type != "cpu":
                _say_once(
                    f"{device_name(device)} ({device}) does not compute in bfloat16 natively: float32 is used, which "
                    "takes twice the memory (float16 overflows in these models)"
                )
        return torch.float32 if lacking else torch.bfloat16
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r}: give auto, float32 or bfloat16 (float16 overflows in these models)")
    if dtype == "bfloat16" and not all(_computes_in_bfloat16(device) for device in devices if device.type == "mps"):
        raise ConfigError("dtype 'bfloat16': mps has it from macOS 14 on; update macOS, or give float32")
    return _DTYPES[str(dtype)]


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Tell whether a device computes in bfloat16 by itself; older GPUs only imitate it, slowly."""
    if device.type == "cpu":
        # The function is newer than the oldest torch that works.
        capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name) for name in _NATIVE_BFLOAT16)
    if device.type == "mps":
        return _multiplies_in_bfloat16(device)
    module = torch.get_device_module(device)
    with module.device(device):  # torch answers for the current one
        return bool(module.is_bf16_supported(including_emulation=False))


@cache
def _multiplies_in_bfloat16(device: torch.device) -> bool:
    try:
        ones = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
        return (ones @ ones).float().tolist() == [[2.0, 2.0], [2.0, 2.0]]
    except (RuntimeError, TypeError):  # before macOS 14
        return False


@cache
def _say_once(message: str) -> None:
    _log.warning(message)


def aligned(array: npt.NDArray[np.float32]) -> Tensor:
    """Copy an array into a tensor with torch's memory alignment.

    numpy aligns arrays less strictly, and the order of sums in a matrix product depends on the alignment of its
    operands: two processes would differ in the last bit.
    """
    return torch.tensor(array)


def settle_kernels() -> None:
    """Let MKL choose its kernels for sine and cosine while only one thread calls them.

    It chooses on the first call, and two threads that call first at the same time may get different kernels: rotary
    positions of the first batch then differed in the last bit between one process and the next.
    """
    one = torch.zeros(1)
    one.cos()
    one.sin()


def free_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes, including what torch keeps for reuse."""
    if device.type == "mps":  # the memory of CPU and GPU is one, and Metal lets a process have a part of it
        allocated = torch.mps.current_allocated_memory()
        reusable = torch.mps.driver_allocated_memory() - allocated
        return min(torch.mps.recommended_max_memory() - allocated, _free_main_memory() + reusable)
    if device.type == "cpu":
        return _free_main_memory()
    module = torch.get_device_module(device)
    reserved, allocated = int(module.memory_reserved(device)), int(module.memory_allocated(device))
    try:
        free = int(module.mem_get_info(device)[0])
    except RuntimeError:  # some Intel GPUs do not tell
        free = int(module.get_device_properties(device).total_memory) - reserved
    return free + reserved - allocated


def _free_main_memory() -> int:
    import psutil  # not needed for GPUs

    return min(int(psutil.virtual_memory().available), _left_in_container())


def _left_in_container() -> int:
    """Return what the limit of a container leaves, in bytes (cgroup v2); the system's own limit if there is none."""
    try:
        limit, used, kinds = (
            read_file(_CONTAINER / name, most=_MOST_CONTAINER_BYTES).decode().split()
            for name in ("memory.max", "memory.current", "memory.stat")
        )
        sizes = dict(zip(kinds[::2], map(int, kinds[1::2]), strict=True))
        # What is kept of files is given back when memory is short.
        return int(limit[0]) - int(used[0]) + sizes["active_file"] + sizes["inactive_file"]
    except (OSError, ValueError, LookupError):  # no container, or "max": no limit
        return sys.maxsize


def choose_token_budget(config: Any, devices: Sequence[torch.device], dtype: torch.dtype, *, sharing: int = 1) -> int:
    """Return how many tokens to encode in one batch: as many as make it faster, within half of the free memory.

    Args:
        config: Configuration of the model, both towers.
        devices: The devices of the model; the fullest decides.
        dtype: Type of its weights.
        sharing: Number of processes that share the free memory.
    """
    fitting = min(map(free_memory, devices)) // 2 // sharing // token_bytes(config, dtype)
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS.get(devices[0].type, _MOST_TOKENS_OF_GPUS), int(fitting)))


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the memory of one token, in bytes, at the peak of a layer.

    In the decoder that is inputs, queries, keys and values, and the hidden layer of its MLP twice. An image token is
    four patches in the vision tower, and its pixels have the type of the weights.

    Args:
        config: Configuration of the model, both towers.
        dtype: Type of its weights.
    """
    text, vision = config.get_text_config(), config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    decoder = (8 * text.hidden_size + _mlp_numbers(text)) * dtype.itemsize + _delta_rule_bytes(text)
    patches = vision.spatial_merge_size**2
    tower = patches * (8 * width + 3 * getattr(vision, "intermediate_size", 4 * width)) * dtype.itemsize
    pixels = patches * 3 * vision.temporal_patch_size * vision.patch_size**2 * dtype.itemsize
    return int(max(decoder, tower) + pixels)


def _mlp_numbers(text: Any) -> int:
    """Return how many numbers the MLP of a decoder layer holds of one token; experts also copy their inputs."""
    chosen = getattr(text, "num_experts_per_tok", None)
    if chosen is None:
        return int(3 * text.intermediate_size)
    shared = getattr(text, "shared_expert_intermediate_size", 0)
    return int(chosen * (2 * text.hidden_size + 3 * text.moe_intermediate_size) + 3 * shared)


def _delta_rule_bytes(text: Any) -> int:
    """Return the memory of one token in the delta rule of a layer of linear attention, which computes in float32."""
    heads = getattr(text, "linear_num_value_heads", 0)
    if not heads:
        return 0
    chunk = 5 * 64  # products of pairs of tokens in a chunk
    return int(heads * (3 * text.linear_key_head_dim + 4 * text.linear_value_head_dim + chunk) * 4)


def state_tokens(config: Any, dtype: torch.dtype) -> int:
    """Return the memory of the state that a row's suffixes start from, as a number of tokens; 0 without such a state.

    One layer holds it at a time: in float32, before and after a chunk.
    """
    text = config.get_text_config()
    heads = getattr(text, "linear_num_value_heads", 0)
    if not heads:
        return 0
    state = 2 * heads * text.linear_key_head_dim * text.linear_value_head_dim * 4
    return -(-int(state) // token_bytes(config, dtype))


def release_memory(device: torch.device) -> None:
    """Return the memory that torch keeps for reuse to the device, after it ran out."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether torch ran out of memory: on CPUs and Apple's GPUs that is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


@contextmanager
def memory_advice(doing: str) -> Iterator[None]:
    """Turn an out-of-memory error of the CPU or a GPU into `OutOfMemoryError`, which says what to do."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"out of memory while {doing}: pass fewer examples at once or a smaller token_budget, lower "
                'max_pixels, use dtype="bfloat16", or choose a smaller checkpoint'
            ) from error
        raise
