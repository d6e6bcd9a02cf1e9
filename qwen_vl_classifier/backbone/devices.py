"""Where a model runs, and in which type of number."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_vl_classifier.errors import ConfigError, OutOfMemoryError

DType: TypeAlias = Literal["auto", "float32", "bfloat16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MOST_TOKENS = {"cpu": 2048, "cuda": 16384}  # at once, however much memory is free
_FEWEST_TOKENS = 256
_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is what ARM calls it


def choose_device(device: str) -> torch.device:
    """Return the device that a name stands for: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: There is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r}: give auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r}: give auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch sees no GPU here; give cpu, or install a CUDA build of torch")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {device!r}: torch sees {torch.cuda.device_count()} GPU(s) here; count from 0")
    return chosen


def choose_dtype(dtype: DType | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type that a name stands for; "auto" is bfloat16 where the device computes in it, else float32.

    Raises:
        ConfigError: Another type; float16 overflows in these models.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")  # type: ignore[assignment]
    if dtype == "auto":
        # The function is newer than the oldest torch that works.
        capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        native = device.type == "cuda" or any(capabilities.get(name) for name in _NATIVE_BFLOAT16)
        return torch.bfloat16 if native else torch.float32
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r}: give auto, float32 or bfloat16 (float16 overflows in these models)")
    return _DTYPES[str(dtype)]


def aligned(array: npt.NDArray[np.float32]) -> Tensor:
    """Copy an array to where torch puts tensors.

    numpy puts arrays anywhere, and the order of sums in a matrix product depends on where its operands begin: two
    processes would differ in the last bit.
    """
    return torch.tensor(array)


def settle_kernels() -> None:
    """Let MKL choose its kernels for sine and cosine in one thread.

    It does so on the first call, and two threads that are first together may get different ones: rotary positions of
    the first batch then differed in the last bit between one process and the next.
    """
    one = torch.zeros(1)
    one.cos()
    one.sin()


def free_memory(device: torch.device) -> int:
    """Return how many bytes a device can still give, what torch keeps for reuse included."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reusable
    import psutil  # GPUs tell for themselves

    return int(psutil.virtual_memory().available)


def choose_token_budget(config: Any, device: torch.device, dtype: torch.dtype, *, sharing: int = 1) -> int:
    """Return how many tokens to encode at once: as many as are of use, in half of the memory that is free.

    Args:
        config: Configuration of the model, both towers.
        device: Where it runs.
        dtype: Type of its weights.
        sharing: Processes that share what is free.
    """
    text, vision = config.get_text_config(), config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    # What a layer holds of one token at its widest: inputs, queries, keys and values, and the hidden layer of its MLP
    # twice; a picture's token is four patches in the vision tower, and its pixels are float32.
    decoder = 8 * text.hidden_size + 3 * text.intermediate_size
    patches = vision.spatial_merge_size**2
    tower = patches * (8 * width + 3 * getattr(vision, "intermediate_size", 4 * width))
    pixels = patches * 3 * vision.temporal_patch_size * vision.patch_size**2 * 4
    token_bytes = max(decoder, tower) * dtype.itemsize + pixels
    fitting = free_memory(device) // 2 // sharing // token_bytes
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS[device.type], int(fitting)))


def release_memory(device: torch.device) -> None:
    """Give back what torch keeps for reuse, after it ran out."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether torch ran out of memory: the CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def memory_advice(doing: str) -> Iterator[None]:
    """Turn an out-of-memory error of the CPU or a GPU into `OutOfMemoryError` with what to do next."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"out of memory while {doing}: pass fewer examples at once or a smaller token_budget, lower "
                'max_pixels, use dtype="bfloat16", or choose a smaller checkpoint'
            ) from error
        raise


def keep_freed_memory() -> None:
    """Let this process keep what torch frees on the CPU, where the C library is glibc; elsewhere, do nothing.

    By default, glibc gives every large block back to the system at once, and the next step pays for its pages anew.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names in malloc.h
        for option, size in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_threshold, 2**30)):
            library.mallopt(option, size)
