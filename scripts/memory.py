"""Compute the tables of docs/models.md: how much memory each published checkpoint takes, and which GPU holds it.

    python scripts/memory.py            # prints the tables
    python scripts/memory.py --write    # and puts them into docs/models.md

Nothing is downloaded and no GPU is needed: memory_checkpoints.py has the sizes, memory_formula.py the formula.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from memory_checkpoints import CHECKPOINTS, Checkpoint
from memory_formula import active, adapter_bytes, build, count, full_bytes, reading_bytes, weight_bytes

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- {} begins -->\n", "<!-- {} ends -->\n"
GPUS = (8, 12, 16, 24, 32, 48, 80, 96, 141)
"""Sizes of GPUs, as they are sold."""

USABLE = 0.9
"""Share of a GPU that is counted on; the rest is for CUDA, its libraries, and gaps between tensors."""

Model: TypeAlias = tuple[Checkpoint, Any]
"""A checkpoint, and its model without data."""

_GIB = 2**30
_NEWEST = ("qwen3_5", "qwen3_5_moe")


def fits(size: int, gpu: int) -> bool:
    """Tell whether a GPU holds so many bytes."""
    return size <= USABLE * gpu * _GIB


def smallest_gpu(size: int) -> str:
    """Return the smallest GPU that holds so many bytes, or a dash where none does."""
    return next((str(gpu) for gpu in GPUS if fits(size, gpu)), "–")


def loading_table(models: Sequence[Model]) -> Iterator[str]:
    """Lay out weights as they are loaded, and the GPU on which features are read."""
    yield "| checkpoint | weights, 10⁹ | 16 bit, GiB | 8 bit | 4 bit | features on a GPU of: 16 bit | 8 bit | 4 bit |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for checkpoint, model in models:
        ways = (None, "8bit", "4bit")
        loaded = [f"{weight_bytes(model, way) / _GIB:.1f}" for way in ways]
        gpus = [smallest_gpu(reading_bytes(model, way)) for way in ways]
        weights = f"{count(model) / 1e9:.2f}"
        if "moe" in checkpoint.family:
            weights += f" ({active(model) / 1e9:.1f} active)"
        yield f"| {checkpoint.title} | {weights} | {' | '.join(loaded)} | {' | '.join(gpus)} |"


def training_table(models: Sequence[Model]) -> Iterator[str]:
    """Lay out what fine-tuning takes, and the GPU that holds it."""
    ways = ("LoRA", "LoRA, checkpointing", "QLoRA, checkpointing", "full, checkpointing")
    yield f"| checkpoint | {' | '.join(ways)} |"
    yield "|---|" + "---:|" * len(ways)
    for checkpoint, model in models:
        needs = (
            adapter_bytes(model, checkpointing=False).total,
            adapter_bytes(model, checkpointing=True).total,
            adapter_bytes(model, "4bit", checkpointing=True).total,
            full_bytes(model, checkpointing=True).total,
        )
        cells = (f"{need / _GIB:,.1f} → {smallest_gpu(need)}" for need in needs)
        yield f"| {checkpoint.title} | {' | '.join(cells)} |"


def gpus_table(models: Sequence[Model]) -> Iterator[str]:
    """Lay out the largest of the newest checkpoints that each GPU holds."""
    ways: dict[str, Callable[[Any], int]] = {
        "features, 16 bit": reading_bytes,
        "features, 4 bit": lambda model: reading_bytes(model, "4bit"),
        "LoRA, checkpointing": lambda model: adapter_bytes(model, checkpointing=True).total,
        "QLoRA, checkpointing": lambda model: adapter_bytes(model, "4bit", checkpointing=True).total,
        "full, checkpointing": lambda model: full_bytes(model, checkpointing=True).total,
    }
    newest = [entry for entry in models if entry[0].family in _NEWEST]
    by_size = sorted(newest, key=lambda entry: count(entry[1]), reverse=True)
    needs = {way: [(need(model), checkpoint) for checkpoint, model in by_size] for way, need in ways.items()}
    yield f"| GPU, GB | {' | '.join(ways)} |"
    yield "|---:|" + "---|" * len(ways)
    for gpu in GPUS:
        largest = [next((checkpoint.short for need, checkpoint in needs[way] if fits(need, gpu)), "–") for way in ways]
        yield f"| {gpu} | {' | '.join(largest)} |"


def tables(checkpoints: Sequence[Checkpoint] = CHECKPOINTS) -> dict[str, list[str]]:
    """Compute all tables, as lines, by the names of their marks in the page."""
    models = [(checkpoint, build(checkpoint)) for checkpoint in checkpoints]
    return {
        "loading": [*loading_table(models)],
        "training": [*training_table(models)],
        "gpus": [*gpus_table(models)],
    }


def filled(text: str, computed: dict[str, list[str]]) -> str:
    """Return a page with the tables between their marks."""
    for name, lines in computed.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, after = text.index(begin) + len(begin), text.index(end)
        text = text[:before] + "\n".join(lines) + "\n" + text[after:]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, and write them where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/models.md")
    options = parser.parse_args(arguments)
    computed = tables()
    for lines in computed.values():
        print("\n".join(lines), end="\n\n")
    if options.write:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), computed), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
