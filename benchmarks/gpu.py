"""Measure on one GPU, in eight minutes, all that docs/figures/performance.md says about GPUs: goals beside every row.

    PYTHONPATH=. python benchmarks/gpu.py                        # JSON lines as it goes, a table at the end
    PYTHONPATH=. python benchmarks/gpu.py --out run.jsonl        # and the lines in a file, for a run that is cut off
    PYTHONPATH=. python benchmarks/gpu.py --parts product large  # some parts only
    python benchmarks/gpu.py --from run.jsonl --write            # put a run into docs/figures/performance.md
    python benchmarks/gpu.py --device cpu --dry                  # every row with tiny shapes: times mean nothing

Nothing is downloaded. Weights are drawn on the card: the shape of Qwen/Qwen2.5-VL-3B-Instruct where the card has 40 GB,
half of its layers from 20 GB on, and 59 million weights on smaller ones. Pictures are drawn and written as JPEG files.
What is compared took turns within the run, after a round that is not counted; medians are shown. Each part has a time
box, and parts for which no time is left are named. Parts need the package's own dependencies, training also peft and
accelerate, serving the extra "serve"; where they are missing, the row says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from gpu_table import KERNELS, TABLE, kernel_table, read_lines, table

if TYPE_CHECKING:
    from gpu_bench import Bench
    from gpu_rows import Reading


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a run.

    Attributes:
        module: Where it is measured: modules that need torch are imported when a run begins.
        function: What measures it, and yields its rows.
        box: Seconds that its races may take.
        least: Seconds that must be left for it to begin.
    """

    module: str
    function: str
    box: float
    least: float


PARTS = {
    "product": Part("gpu_rows", "product", 2, 5),
    "exactness": Part("gpu_rows", "exactness", 60, 30),
    "large": Part("gpu_rows", "large", 45, 30),
    "small": Part("gpu_rows", "small", 30, 25),
    "texts": Part("gpu_rows", "shared_texts", 30, 25),
    "host": Part("gpu_profile", "host", 15, 15),  # later: a profiler may slow launches for the rest of a process
    "training": Part("gpu_training", "training", 80, 60),
    "score": Part("gpu_around", "scoring", 20, 20),
    "serve": Part("gpu_around", "serving", 40, 60),
    "budgets": Part("gpu_rows", "budgets", 25, 30),
    "start": Part("gpu_around", "start", 45, 45),
}
"""In the order of a run: what matters most comes first."""


def measure(bench: Bench, parts: list[str], until: float) -> Iterator[dict[str, Any]]:
    """Measure parts one after the other, and yield a line for each row, or for a part that gives none.

    A part that fails is reported, and the others are measured all the same.

    Args:
        bench: What to measure on.
        parts: Their names.
        until: The moment of the monotonic clock by which the run is to be done.
    """
    for name in parts:
        part, left = PARTS[name], until - time.monotonic()
        if left < part.least and not bench.dry:
            yield {"part": name, "skipped": f"skipped: {left:.0f} s left, and it needs {part.least:.0f}"}
            continue
        began = time.monotonic()
        try:
            work: Callable[[Bench, float], Iterator[Reading]] = getattr(
                importlib.import_module(part.module), part.function
            )
            for reading in work(bench, min(part.box, left)):
                yield {"row": reading.row, "value": reading.value, "notes": reading.notes}
        except ImportError as error:
            reason = f"{error.name} is not installed" if error.name else str(error)
            yield {"part": name, "skipped": f"skipped: {reason}"}
        except (Exception, SystemExit) as error:  # whatever happens in one part, the others count
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield {"part": name, "skipped": f"failed: {reason[:200]}"}
        bench.free_memory()
        yield {"part": name, "seconds": round(time.monotonic() - began, 1)}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all parts, print their lines as they come, and return them."""
    import torch
    import transformers
    from gpu_bench import Bench, describe_machine, temporary_folder

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu.py: torch sees no GPU here; expected one, or --device cpu --dry")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    lines: list[dict[str, Any]] = []
    began = psutil.Process().create_time()
    until = time.monotonic() - (time.time() - began) + 60 * options.minutes

    def report(line: dict[str, Any]) -> None:
        lines.append({**line, "at": round(time.time() - began, 1)})
        written = json.dumps(lines[-1])
        print(written, flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(written + "\n")

    with temporary_folder(options.device) as folder:
        bench = Bench(options.device, Path(folder), dry=options.dry)
        report({"machine": describe_machine(bench)})
        for line in measure(bench, [name for name in PARTS if name in (options.parts or PARTS)], until):
            report(line)
    return lines


def main() -> None:
    """Measure, or read what was measured, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--minutes", type=float, default=8, help="from the start on (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu with --dry (default: %(default)s)"
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to see that every row works")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file too")
    parser.add_argument("--from", type=Path, dest="read", metavar="FILE", help="measure nothing; read these JSON lines")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/figures/performance.md")
    options = parser.parse_args()
    if options.read:
        lines = read_lines(options.read)
    else:
        if options.device == "cpu" and not options.dry:
            parser.error("--device cpu: there is only a dry run of it; give --dry too")
        lines = run(options)
    tables = {TABLE: table(lines), KERNELS: kernel_table(lines)}
    for content in tables.values():
        print("", *content, sep="\n")
    if options.write:
        from tables import PERFORMANCE_PAGE, put_table

        for part, content in tables.items():
            put_table(PERFORMANCE_PAGE, part, content)


if __name__ == "__main__":
    main()
