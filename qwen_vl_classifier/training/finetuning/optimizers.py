"""The optimisers of fine-tuning."""

from __future__ import annotations

from typing import Any

import torch

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.extras import require

ADAMW, PAGED = "adamw", "paged-adamw-8bit"

_FUSED = ("cuda", "xpu")  # on CPUs torch's fused step rounds in another way, and steps are a small part of the work


def check_optimizer(name: str, device: torch.device) -> None:
    """Refuse an optimiser that does not run on a device, before any work.

    Raises:
        ConfigError: It does not.
        MissingExtraError: bitsandbytes is not installed, and it is needed.
    """
    if name != PAGED:
        return
    require("bitsandbytes", extra="finetune")
    if device.type != "cuda":
        raise ConfigError(
            f"{spelled('optimizer', PAGED)} on {device.type}: its paged memory is CUDA's; train on a CUDA GPU, or use "
            f"{spelled('optimizer', ADAMW)}"
        )


def make_optimizer(
    name: str, groups: list[dict[str, Any]], weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    """Make an optimiser.

    Args:
        name: "adamw" has two averages in float32 for each weight, and takes a step in one kernel on GPUs.
            "paged-adamw-8bit" has them in 8 bits, in memory that CUDA moves to the host where the GPU has no room
            (arXiv:2110.02861, arXiv:2305.14314).
        groups: Parameters and learning rates.
        weight_decay: Of all of them.
        device: Of the parameters.
    """
    if name == PAGED:
        paged = require("bitsandbytes.optim", extra="finetune").PagedAdamW8bit
        optimizer: torch.optim.Optimizer = paged(groups, weight_decay=weight_decay)
        return optimizer
    return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=device.type in _FUSED)
