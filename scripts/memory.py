"""Compute the tables of docs/models.md: how much memory each published checkpoint takes, and which GPU holds it.

    python scripts/memory.py            # prints the tables
    python scripts/memory.py --write    # and puts them into docs/models.md

Nothing is downloaded and no GPU is needed: memory_checkpoints.py has the sizes, memory_formula.py the formula.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memory_checkpoints import CHECKPOINTS, Checkpoint
from memory_formula import active, adapter_bytes, build, count, full_bytes, reading_bytes, weight_bytes

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- {} begins -->\n", "<!-- {} ends -->\n"
GPUS = (8, 12, 16, 24, 32, 48, 80, 96, 141)
"""Sizes of GPUs, as they are sold."""

USABLE = 0.9
"""Share of a GPU that is counted on; the rest is for CUDA, its libraries, and gaps between tensors."""

_GIB = 2**30
_WAYS = (None, "8bit", "4bit")
_NEWEST = ("qwen3_5", "qwen3_5_moe")


def fits(size: int, gpu: int) -> bool:
    """Tell whether a GPU holds so many bytes."""
    return size <= USABLE * gpu * _GIB


def smallest_gpu(size: int) -> str:
    """Return the smallest GPU that holds so many bytes, or a dash where none does."""
    return next((str(gpu) for gpu in GPUS if fits(size, gpu)), "–")


@dataclass(frozen=True, slots=True)
class Needs:
    """What one checkpoint takes, in bytes.

    Attributes:
        checkpoint: The checkpoint.
        weights: Number of its weights, and of those that one token passes through.
        loaded: Its weights in 16, 8 and 4 bits.
        reading: Reading features, likewise.
        training: Fine-tuning, by the headings of the table.
    """

    checkpoint: Checkpoint
    weights: tuple[int, int]
    loaded: tuple[int, ...]
    reading: tuple[int, ...]
    training: dict[str, int]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Needs:
        """Compute them on a model without data."""
        model = build(checkpoint)
        return cls(
            checkpoint,
            (count(model), active(model)),
            tuple(weight_bytes(model, way) for way in _WAYS),
            tuple(reading_bytes(model, way) for way in _WAYS),
            {
                "LoRA": adapter_bytes(model, checkpointing=False).total,
                "LoRA, checkpointing": adapter_bytes(model, checkpointing=True).total,
                "QLoRA, checkpointing": adapter_bytes(model, "4bit", checkpointing=True).total,
                "full, checkpointing": full_bytes(model, checkpointing=True).total,
                "full, checkpointing, paged": full_bytes(model, checkpointing=True, paged=True).total,
            },
        )


def loading_table(listed: Sequence[Needs]) -> Iterator[str]:
    """Lay out weights as they are loaded, and the GPU on which features are read."""
    yield "| checkpoint | weights, 10⁹ | 16 bit, GiB | 8 bit | 4 bit | features on a GPU of: 16 bit | 8 bit | 4 bit |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for needs in listed:
        every, passed = needs.weights
        weights = f"{every / 1e9:.2f}"
        if "moe" in needs.checkpoint.family:
            weights += f" ({passed / 1e9:.1f} active)"
        cells = [*(f"{size / _GIB:.1f}" for size in needs.loaded), *map(smallest_gpu, needs.reading)]
        yield f"| {needs.checkpoint.title} | {weights} | {' | '.join(cells)} |"


def training_table(listed: Sequence[Needs]) -> Iterator[str]:
    """Lay out what fine-tuning takes, and the GPU that holds it."""
    yield f"| checkpoint | {' | '.join(listed[0].training)} |"
    yield "|---|" + "---:|" * len(listed[0].training)
    for needs in listed:
        cells = (f"{size / _GIB:,.1f} → {smallest_gpu(size)}" for size in needs.training.values())
        yield f"| {needs.checkpoint.title} | {' | '.join(cells)} |"


def gpus_table(listed: Sequence[Needs]) -> Iterator[str]:
    """Lay out the largest of the newest checkpoints that each GPU holds."""
    newest = [needs for needs in listed if needs.checkpoint.family in _NEWEST]
    newest.sort(key=lambda needs: needs.weights, reverse=True)
    whole, _, smallest = range(len(_WAYS))
    sizes = [
        {"features, 16 bit": needs.reading[whole], "features, 4 bit": needs.reading[smallest], **needs.training}
        for needs in newest
    ]
    ways = [way for way in sizes[0] if way != "LoRA"]
    yield f"| GPU, GB | {' | '.join(ways)} |"
    yield "|---:|" + "---|" * len(ways)
    for gpu in GPUS:
        holds = (
            next(
                (needs.checkpoint.short for needs, size in zip(newest, sizes, strict=True) if fits(size[way], gpu)), "–"
            )
            for way in ways
        )
        yield f"| {gpu} | {' | '.join(holds)} |"


def tables(checkpoints: Sequence[Checkpoint] = CHECKPOINTS) -> dict[str, list[str]]:
    """Compute all tables, as lines, by the names of their marks in the page."""
    listed = [Needs.of(checkpoint) for checkpoint in checkpoints]
    return {
        "loading": [*loading_table(listed)],
        "training": [*training_table(listed)],
        "gpus": [*gpus_table(listed)],
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
