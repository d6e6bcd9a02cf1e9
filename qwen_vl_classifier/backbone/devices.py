"""Where a model runs, and in which type of number."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch

from qwen_vl_classifier.errors import ConfigError

DType: TypeAlias = Literal["auto", "float32", "bfloat16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
