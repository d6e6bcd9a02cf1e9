"""Estimate what a million rows cost on one H200, from the operations that a pass takes: nothing is run.

    python benchmarks/scale_costs.py
    python benchmarks/scale_costs.py --utilisation 0.25 --dollars 2.5
    python benchmarks/scale_costs.py --write          # and puts the table into docs/how-to/scale.md

Operations are counted by `flops.py`, whose count of linear layers is tested against torch's. A row has a text of 64
tokens and 20 of template. What is assumed: the share of the peak that arrives, and the price of an hour.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from checkpoints import MERGE, PATCH, SHAPES, Shape, Tower
from flops import attention_flops, linear_flops, products
from tables import SCALE_PAGE, put_table

PEAK = 989e12
"""Operations a second of an H200 in bfloat16 without sparsity, by NVIDIA's data sheet (the same as an H100 SXM)."""

TEXT, TEMPLATE = 64, 20

# As in config.json of Qwen/Qwen2.5-VL-7B-Instruct.
SEVEN = replace(SHAPES["3b"], name="7b", text=Tower(28, 3584, 18944, 28, 4))


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of one kind.

    Attributes:
        what: For the table.
        shape: Of the model.
        side: Of the square picture, in pixels; 0 for texts alone.
        texts: About each picture.
    """

    what: str
    shape: Shape
    side: int
    texts: int = 1


def row_flops(case: Case) -> float:
    """Return the operations of one row; texts about one picture share its pass."""
    grid = case.side // PATCH
    patches = grid**2
    prefix = TEMPLATE + patches // MERGE**2
    once = attention_flops(case.shape, [(grid, grid)] if grid else [], [prefix])
    # A text looks at the prefix and at itself, not at the other texts.
    each = attention_flops(case.shape, [], [prefix + TEXT]) - attention_flops(case.shape, [], [prefix])
    whole = linear_flops(products(case.shape, patches, prefix + TEXT * case.texts)) + once + each * case.texts
    return whole / case.texts


def half(shape: Shape) -> Shape:
    """Return a model of which a tap at half of the depth needs no more."""
    return replace(shape, text=replace(shape.text, layers=shape.text.layers // 2))


CASES = (
    Case("3B, text alone", SHAPES["3b"], 0),
    Case("3B, 448 x 448 (256 tokens)", SHAPES["3b"], 448),
    Case("3B, 896 x 896 (1,024 tokens)", SHAPES["3b"], 896),
    Case("3B, 896 x 896, tap at half of the layers", half(SHAPES["3b"]), 896),
    Case("3B, 896 x 896, 8 texts about each picture", SHAPES["3b"], 896, texts=8),
    Case("7B, 896 x 896", SEVEN, 896),
)


def table(utilisation: float, dollars: float) -> list[str]:
    """Write what rows of each kind cost."""
    lines = [
        f"Assumed: {utilisation:.0%} of {PEAK / 1e12:.0f} TFLOP/s in bfloat16, {dollars:g} dollars an hour. Computed: "
        "everything else.",
        "",
        "| rows | TFLOP a row | ms a row | rows a second | hours a million | dollars a million | GPU-years a billion |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        flops = row_flops(case)
        seconds = flops / (PEAK * utilisation)
        hours = seconds * 1e6 / 3600
        lines.append(
            f"| {case.what} | {flops / 1e12:.2f} | {seconds * 1000:.1f} | {1 / seconds:.0f} | {hours:.1f} | "
            f"{hours * dollars:.0f} | {hours * 1000 / 24 / 365:.2f} |"
        )
    return lines


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak (default: %(default)s)")
    parser.add_argument("--dollars", type=float, default=3.5, help="of an hour of one H200 (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/how-to/scale.md")
    options = parser.parse_args()
    lines = table(options.utilisation, options.dollars)
    print("\n".join(lines))
    if options.write:
        put_table(SCALE_PAGE, "costs", lines)


if __name__ == "__main__":
    main()
