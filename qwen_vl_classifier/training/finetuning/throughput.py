"""How fast a run trains, and the memory that it takes."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Throughput:
    """How fast a run trained, and the memory that it took.

    Attributes:
        tokens_per_second: Tokens of all rows in all processes for each second of training, time for validation and
            checkpoints left out. A picture that several rows share counts for each of them.
        peak_memory: Most bytes of one process: on a GPU those that torch held in tensors, else all of the process.
        device: What the peak is of: "cuda", "xpu" or "cpu".
        vision_tokens: What is kept of the vision tower, in words.
    """

    tokens_per_second: float
    peak_memory: int
    device: str
    vision_tokens: str = ""

    def __str__(self) -> str:
        kept = f"; {self.vision_tokens}" if self.vision_tokens else ""
        where = "process" if self.device == "cpu" else self.device
        return (
            f"{self.tokens_per_second:,.0f} tokens a second; peak memory of the {where}: "
            f"{self.peak_memory / 1e9:.2f} GB{kept}"
        )


class StepClock:
    """Count tokens, and the seconds that steps take with what is prepared for them."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._lap = (0, 0.0)
        self._started: float | None = None

    def begin(self) -> None:
        """Begin a step, before its batch is waited for."""
        self._started = time.perf_counter()

    def end(self, tokens: int) -> None:
        """End a step.

        Args:
            tokens: The number of tokens that it trained on.
        """
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self.tokens += tokens
            self._started = None

    @property
    def rate(self) -> float:
        """Tokens a second since the first step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def lap(self) -> float:
        """Return tokens a second since the last call."""
        tokens, seconds = self.tokens - self._lap[0], self.seconds - self._lap[1]
        self._lap = self.tokens, self.seconds
        return tokens / seconds if seconds else 0.0


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of a GPU's memory; that of a process cannot be reset."""
    module = _with_peak(device)
    if module is not None:
        module.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Return the most bytes so far, and what they are of: "cuda" or "xpu", or "cpu" for the whole process."""
    module = _with_peak(device)
    if module is not None:
        return int(module.max_memory_allocated(device)), device.type
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "cpu"  # Linux counts in KiB


def _with_peak(device: torch.device) -> Any:
    return torch.get_device_module(device) if device.type in ("cuda", "xpu") else None
