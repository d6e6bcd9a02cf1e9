"""Measure LoRA with a frozen vision tower on any device: first epoch, later ones, and transformers' Trainer with PEFT.

    python benchmarks/finetuning.py --shape 59m --side 364 --rows 32 --batch 8 --threads 1

Rows, options and what both train are those of the GPU benchmark (`gpu_training.py`); a CPU takes a smaller shape.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from checkpoints import SHAPES
from gpu_bench import FULL, Bench, describe_machine, temporary_folder
from gpu_training import training


def main() -> None:
    """Run it and print one line for each figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="59m", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--side", type=int, default=364, help="of the pictures, in pixels (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=32, help="to learn from (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with temporary_folder(options.device) as folder:
        bench = Bench(options.device, Path(folder), dry=False)
        bench.shape = SHAPES[options.shape]
        bench.sizes = replace(FULL, small=options.side, training=options.rows, batch=options.batch)
        print(describe_machine(bench))
        for reading in training(bench, 0):
            notes = ", ".join(f"{name} {value:,.4g}" for name, value in reading.notes.items())
            print(f"{reading.row}: {reading.value:.2f} ({notes})", flush=True)


if __name__ == "__main__":
    main()
