"""Measure the encoder on a CPU against the loop that most scripts write, each row as a ratio within one run.

    python benchmarks/encoder.py                                # prints JSON lines and tables
    python benchmarks/encoder.py --write                        # and puts the tables into docs/figures/performance.md
    python benchmarks/encoder.py --rows unique --dtypes bfloat16
    python benchmarks/encoder.py --family qwen3_5 qwen2_5_vl    # families side by side, one layer in six or so
    python benchmarks/encoder.py --quick                        # a few seconds, to see that it works

On a GPU, benchmarks/gpu.py measures.

The checkpoint has random weights and is made in a temporary folder, in the hub's layout. The shape "59m" has 59.4
million parameters: a decoder of 12 layers, hidden size 512, intermediate size 1,408, 8 heads and 2 heads of keys and
values; a vision tower of 12 layers, hidden size 384, intermediate size 1,024, 6 heads, windows of 112 pixels and full
attention in layers 2, 5, 8 and 11; tied embeddings of the built-in tokeniser. Widths, depths and heads are in the
proportions of the published 3B, but for the decoder's intermediate size, which is 2.75 instead of 5.4 times the hidden
size, and for the vocabulary of 1,339 tokens, with which the plain loop's language head costs next to nothing. The shape
"3b" is that of Qwen/Qwen2.5-VL-3B-Instruct, vocabulary included.

Pictures are 364 x 364 pixels (3b: 896 x 896, which are 1,024 tokens), JPEG files of smooth noise, decoded anew in every
round by both sides.

With --family, the checkpoints have the widths of published ones and four decoder layers, as family_checkpoints.py says,
and the rows are those of encoder_families.py: transformers runs one example at a time, and in padded batches. Pictures
are 512 x 512 pixels. A mixture of experts takes 7 GB in float32, as both sides have its weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import SHAPES, write_checkpoint
from encoder_families import FAMILY_ROWS, TARGETS, FamilyMeasured, FamilySizes, family_table, measure_family
from encoder_profile import profile, profile_table
from encoder_rows import CHOSEN_DTYPE, ROWS, Measured, Sizes, Workshop
from family_checkpoints import FAMILY_SHAPES, narrow
from tables import PERFORMANCE_PAGE, put_table

from qwen_vl_classifier.backbone.devices import choose_dtype

PROFILE = "profile"
CHOICES = (*ROWS, PROFILE)
QUICK = Sizes(pictures=4, texts=4, training=12, repeats=1)


@dataclass(frozen=True, slots=True)
class Goal:
    """A row of the table.

    Attributes:
        row: Its name.
        dtype: What the work is done in; "auto" is what that stands for here.
        work: What is done, against what.
        target: What the ratio is to reach; `None` where it is only reported.
        at_most: Whether the ratio is to stay below the target.
    """

    row: str
    dtype: str
    work: str
    target: float | None
    at_most: bool = False

    def met(self, ratio: float) -> bool | None:
        """Tell whether a ratio reaches the target."""
        if self.target is None:
            return None
        return ratio <= self.target if self.at_most else ratio >= self.target


_PRODUCTS = "operations a second, as a share of the same matrix products alone"
GOALS = (
    Goal("unique", "float32", "unique pictures", 1.15),
    Goal("unique", "bfloat16", "unique pictures", 1.5),
    Goal("auto", "auto", "unique pictures, against the plain loop in float32", 3.0),
    Goal("shared", "float32", "8 texts for each picture", 6.0),
    Goal("shared", "bfloat16", "8 texts for each picture", 6.0),
    Goal("mixed", "float32", "mixed lengths: 8-400 text tokens, 3 picture sizes", 1.6),
    Goal("mixed", "bfloat16", "mixed lengths: 8-400 text tokens, 3 picture sizes", 1.6),
    Goal("training-first", "auto", "20 epochs of a head on a frozen base, first time", 15.0),
    Goal("training-kept", "auto", "20 epochs of a head on a frozen base, features kept", 200.0),
    Goal("taps", "float32", "all layers x 4 poolings, against one tap", 1.1, at_most=True),
    Goal("taps", "bfloat16", "all layers x 4 poolings, against one tap", 1.1, at_most=True),
    Goal("half", "float32", "half of the layers, against the full decoder", 0.62, at_most=True),
    Goal("half", "bfloat16", "half of the layers, against the full decoder", 0.62, at_most=True),
    Goal("products", "float32", _PRODUCTS, 0.8),
    Goal("products", "bfloat16", _PRODUCTS, 0.6),
    Goal("products-plain", "float32", f"the plain loop's {_PRODUCTS}", None),
    Goal("products-plain", "bfloat16", f"the plain loop's {_PRODUCTS}", None),
    Goal("sentence-transformers", "float32", "unique pictures, against sentence-transformers", None),
    Goal("sentence-transformers", "bfloat16", "unique pictures, against sentence-transformers", None),
)


def chip() -> str:
    """Name the CPU, with what matters for bfloat16."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line[:10] == "model name"]
        name = names[0] if names else name
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if capabilities.get(flag)]
    return f"{name} ({', '.join(native) or 'no native bfloat16'})"


def judged(measured: Measured, goals: Sequence[Goal]) -> dict[str, Any]:
    """Write a measurement as a JSON-able object, beside its target where it has one."""
    goal = next((goal for goal in goals if (goal.row, goal.dtype) == (measured.row, measured.dtype)), None)
    return {**asdict(measured), **({"target": goal.target, "met": goal.met(measured.ratio)} if goal else {})}


def table(goals: Sequence[Goal], done: dict[tuple[str, str], Measured], machine: dict[str, Any]) -> list[str]:
    """Lay measurements out beside their targets."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "",
        "| work | dtype | target | ratio | met | baseline, s | encoder, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for goal in goals:
        target = "" if goal.target is None else f"{'≤' if goal.at_most else '≥'} {goal.target:g}"
        start = f"| {goal.work} | {goal.dtype} | {target} |"
        if measured := done.get((goal.row, goal.dtype)):
            met = {True: "yes", False: "no", None: ""}[goal.met(measured.ratio)]
            start += f" {measured.ratio:.2f} | {met} | {measured.baseline:.2f} | {measured.ours:.2f} |"
        else:
            start += " not measured | | | |"
        lines.append(start)
    return lines


def compare_families(
    options: argparse.Namespace, dtypes: Sequence[str], report: Callable[[dict[str, Any]], None]
) -> list[FamilyMeasured]:
    """Measure the rows of several families.

    Args:
        options: Of the command line.
        dtypes: What to compute in.
        report: Gets each row as soon as it is measured.
    """
    shapes = [FAMILY_SHAPES[family] for family in options.family]
    pictures = max(4, options.pictures // 4)
    sizes = FamilySizes(pictures, options.side, 4 * pictures, options.baseline_batch, options.repeats)
    if options.quick:
        shapes, sizes = [narrow(shape) for shape in shapes], FamilySizes(4, 84, 4, 4, 1)
    done = []
    for shape in shapes:
        for measured in measure_family(shape, options.rows or list(FAMILY_ROWS), dtypes, sizes):
            done.append(measured)
            report({**asdict(measured), "target": TARGETS.get(measured.row), "met": measured.met})
    return done


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=dict.fromkeys((*CHOICES, *FAMILY_ROWS)),
        help=f"default: all; {', '.join(FAMILY_ROWS)} with --family",
    )
    parser.add_argument("--family", nargs="+", choices=FAMILY_SHAPES, help="compare these families instead")
    parser.add_argument("--side", type=int, default=512, help="of pictures with --family (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: both")
    parser.add_argument("--shape", choices=SHAPES, default="59m", help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (default: %(default)s)")
    parser.add_argument(
        "--pictures",
        type=int,
        default=16,
        help="distinct pictures of a row, a quarter of that with --family (default: %(default)s)",
    )
    parser.add_argument("--training-rows", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--baseline-batch", type=int, default=8, help="examples in a batch (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny checkpoint and little work: times mean nothing")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/figures/performance.md")
    options = parser.parse_args()
    own = FAMILY_ROWS if options.family else CHOICES
    if others := set(options.rows or ()) - set(own):
        parser.error(f"--rows {' '.join(sorted(others))}: expected some of {' '.join(own)}")
    transformers.utils.logging.disable_progress_bar()
    sizes = QUICK if options.quick else Sizes(options.pictures, 64, options.training_rows, options.repeats)
    shape = SHAPES["nano" if options.quick else options.shape]
    dtypes = options.dtypes or ["float32", "bfloat16"]
    machine = {
        "chip": chip(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if not options.family:
        auto = choose_dtype("auto", [torch.device("cpu")])
        machine |= {"shape": shape.name, "auto": str(auto).removeprefix("torch.")}
    done: dict[tuple[str, str], Measured] = {}
    profiles: dict[str, dict[str, float]] = {}

    def report(content: dict[str, Any]) -> None:
        line = json.dumps({**content, **machine})
        print(line, flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    if options.family:
        lines = family_table(compare_families(options, dtypes, report), machine)
        print("\n".join(lines))
        if options.write:
            put_table(PERFORMANCE_PAGE, "families", lines)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape, Path(folder) / "checkpoint")
        shop = Workshop(Path(folder) / "checkpoint", shape, batch_size=options.baseline_batch, sizes=sizes)
        for name in options.rows or CHOICES:
            for dtype in ("auto",) if name in CHOSEN_DTYPE else dtypes:
                if name == PROFILE:
                    profiles[dtype] = profile(shop, dtype)
                    report({"row": PROFILE, "dtype": dtype, "milliseconds": profiles[dtype]})
                    continue
                try:
                    for measured in ROWS[name](shop, dtype):
                        done[measured.row, measured.dtype] = measured
                        report(judged(measured, GOALS))
                except ImportError as error:
                    if name != "sentence-transformers":
                        raise
                    print(f"{name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
                    break
    lines = table(GOALS, done, machine)
    print("\n".join(lines), end="\n\n")
    if options.write:
        put_table(PERFORMANCE_PAGE, "cpu", lines)
    if profiles:
        lines = profile_table(profiles)
        print("\n".join(lines))
        if options.write:
            put_table(PERFORMANCE_PAGE, "cpu profile", lines)


if __name__ == "__main__":
    main()
