"""Where the time of `Backbone.encode` goes, stage by stage.

What happens before the pass is timed on its own, picture after picture. Vision tower and decoder are timed inside
`encode`, from the beginning to the end of their modules. What is left is packing, cutting pictures into patches, copies
and pooling; it is less than nothing where stages run at the same time. An encoder that computes without calling the
modules shows no time for them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from encoder_rows import Workshop
from pictures import examples
from racing import race, synchronise
from torch import nn

from qwen_vl_classifier import Example
from qwen_vl_classifier.images.opening import open_image

STAGES = ("decode", "resize", "tokenise", "vision", "decoder", "pooling and the rest", "encode")
_INSIDE = ("vision", "decoder")


@dataclass(slots=True)
class _Clock:
    """Sums up the time inside modules."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def watching(self, stage: str, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Add the time of modules, none inside another, to a stage."""
        started = 0.0

        def begin(*_: Any) -> None:
            nonlocal started
            synchronise()
            started = time.perf_counter()

        def end(*_: Any) -> None:
            synchronise()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

        hooks = [hook for module in modules for hook in _hooks(module, begin, end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _hooks(module: nn.Module, begin: Any, end: Any) -> list[Any]:
    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def profile(shop: Workshop, dtype: str) -> dict[str, float]:
    """Return milliseconds a picture for each stage, and for `encode` as a whole."""
    rows = examples(shop.sizes.pictures, [shop.picture_size], (16, 16))
    backbone = shop.backbone(dtype)
    processor, model = backbone.processor, backbone.model
    opened = [Example(open_image(row.images[0]), row.text) for row in rows]
    pictures = [processor.read_pictures(row) for row in opened]
    clock = _Clock()
    inside: dict[str, list[float]] = {stage: [] for stage in _INSIDE}

    def encode() -> None:
        clock.seconds.clear()
        shop.encode(dtype, rows)
        for stage in _INSIDE:
            inside[stage].append(clock.seconds.get(stage, 0.0))

    decoder: Any = model.language_model
    with clock.watching("vision", [model.visual]), clock.watching("decoder", [*decoder.layers, decoder.norm]):
        times = race(
            {
                "decode": lambda: [open_image(row.images[0]) for row in rows],
                "resize": lambda: [processor.read_pictures(row, identify=False) for row in opened],
                "tokenise": lambda: [processor.encode(row, read) for row, read in zip(opened, pictures, strict=True)],
                "encode": encode,
            },
            repeats=shop.sizes.repeats,
        )
    seconds = {stage: taken.median for stage, taken in times.items()}
    seconds |= {stage: statistics.median(rounds[1:]) for stage, rounds in inside.items()}
    seconds["pooling and the rest"] = 2 * seconds["encode"] - sum(seconds.values())
    return {stage: 1000 * seconds[stage] / len(rows) for stage in STAGES}


def profile_table(profiles: dict[str, dict[str, float]]) -> list[str]:
    """Lay profiles out, a column of milliseconds and one of shares for each dtype."""
    lines = [
        "| stage | " + " | ".join(f"{dtype}, ms a picture | share" for dtype in profiles) + " |",
        "|---|" + "---|---|" * len(profiles),
    ]
    for stage in STAGES:
        cells = [f"{done[stage]:.1f} | {done[stage] / done['encode']:.0%}" for done in profiles.values()]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return lines
