"""Keep memory that torch frees, for long runs on CPUs."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Let this process keep the memory that torch frees on the CPU, if the C library is glibc.

    By default, glibc returns every large block to the system at once, and the next step has to map its pages again.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names in malloc.h
        for option, size in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_threshold, 2**30)):
            library.mallopt(option, size)
