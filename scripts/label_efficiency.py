"""Measure how many labels the `label` loop saves: rows that it chooses against rows at random, on real data sets.

    python scripts/label_efficiency.py --data FOLDER            # runs what is not done yet, prints the table
    python scripts/label_efficiency.py --data FOLDER --write    # and puts it into docs/explanation/labelling.md

FOLDER holds one folder for each data set, with train.jsonl, the pool, and dev.jsonl, the judge; an oracle answers from
the labels. What is done and the features are kept in the folder of --work: the script can be stopped at any time and
goes on there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from label_efficiency_runs import GAIN, ORDERS, Goal, LabelSet, RunFolder, needed
from results import BEGIN, END, SETS, check_sets

from qwen_vl_classifier import Backbone, FeatureStore, QwenVLClassifierError
from qwen_vl_classifier.training.probe.candidates import candidate_taps

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "explanation" / "labelling.md"
FIGURES = ("accuracy", "auroc")


def table(sets: Sequence[str], records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lay out a line for each set."""
    yield (
        "| set | rows | AUROC before any label | with all labels | to reach | labels at random | labels by the loop "
        "| loop / random | seeds |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name in sets:
        own = {(one["order"], one["seed"]): one for one in records if one["set"] == name}
        if not own:
            continue
        first = next(iter(own.values()))
        goal, seeds = Goal(**first["goal"]), sorted({seed for _, seed in own})
        start, full = f"{goal.start:.3f}", "{:.3f} ({:.3f} to {:.3f})".format(*goal.full)
        head = f"| {name} | {first['rows']} | {start} | {full} "
        if goal.exists:
            both = [seed for seed in seeds if all((order, seed) in own for order in ORDERS)]
            random, loop = ([needed(own[order, seed]) for seed in both] for order in ("random", "loop"))
            cells = f"{_labels(random)} | {_labels(loop)} | {_ratio(loop, random)} | {len(both)}"
            yield f"{head}| {goal.target:.3f} | {cells} |"
        elif goal.full[1] > 0.5:
            yield f"{head}| {goal.target:.3f} | 0 | 0 | zero-shot is there already | {len(seeds)} |"
        else:
            yield f"{head}| nothing to gain | | | | {len(seeds)} |"


def _labels(counts: Sequence[int | None]) -> str:
    known = [count for count in counts if count is not None]
    if len(known) < len(counts) or not known:
        return f"reached by {len(known)} of {len(counts)}"
    return f"{np.median(known):.0f} ({min(known)} to {max(known)})"


def _ratio(loop: Sequence[int | None], random: Sequence[int | None]) -> str:
    if None in loop or None in random or not loop or not random:
        return ""
    return f"{np.median(np.array(loop)) / np.median(np.array(random)):.2f}"


def coverage_table(sets: Sequence[str], records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lay out how often the interval of the live estimate holds what dev says, and what the machine takes."""
    yield "| set | estimates | hold dev's accuracy | hold dev's AUROC | time per answer, median | 95th percentile |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name in sets:
        own = [record for record in records if record["set"] == name and record["order"] == "loop"]
        if own:
            yield f"| {name} {_covered(own)} {_times(own)} |"
    loops = [record for record in records if record["order"] == "loop"]
    if loops:
        yield f"| all {_covered(loops)} {_times(loops)} |"


def _covered(records: Sequence[dict[str, Any]]) -> str:
    held: dict[str, list[bool]] = {figure: [] for figure in FIGURES}
    for point in (point for record in records for point in record["points"] if "estimate" in point):
        for figure in FIGURES:
            if point["estimate"][figure] is not None:
                _, low, high = point["estimate"][figure]
                held[figure].append(low <= point[figure] <= high)
    shares = " ".join(f"| {np.mean(held[figure]):.0%}" if held[figure] else "|" for figure in FIGURES)
    return f"| {len(held[FIGURES[0]])} {shares}"


def _times(records: Sequence[dict[str, Any]]) -> str:
    seconds = np.concatenate([record["seconds"] for record in records])
    if not len(seconds):
        return "| |"
    return f"| {np.median(seconds):.2f} s | {np.quantile(seconds, 0.95):.2f} s"


def page(sets: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """Lay out everything that is done, in Markdown."""
    if not records:
        return "Nothing is measured yet.\n"
    made = next(iter(records))
    versions = ", ".join(f"{library} {version}" for library, version in made["versions"].items())
    lines = [
        f"Labels until {GAIN:.0%} of the gain over chance is reached on dev: median over seeds (lowest to highest).",
        "",
        *table(sets, records),
        "",
        "How often the interval of the live estimate holds what dev says, over all runs and numbers of labels, and the "
        "machine's time:",
        "",
        *coverage_table(sets, records),
        "",
        f"Times are seconds of one processor thread, for choice and refit together. Threads: {made['threads']}, on "
        f"{made['machine']}. Made with {versions}.",
    ]
    return "\n".join(lines) + "\n"


def perform(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Do the runs that are not done, keep each at once, and return all."""
    backbone = Backbone.load(options.model)
    taps = candidate_taps(options.taps, backbone)
    settings = {
        "model": options.model,
        "taps": [str(tap) for tap in taps],
        "random_share": options.random_share,
    }
    folder = RunFolder(options.work / "runs", settings)
    store = FeatureStore(options.features or options.work / "features")
    records = []
    for name in options.sets:
        data, goal = LabelSet(options.data / name, backbone, taps, store), None
        for seed, order in itertools.product(range(options.seeds), ORDERS):
            record = folder.get(name, order, seed)
            if record is None and not options.no_run:
                goal = goal or data.goal()
                if goal.exists or order == "loop":  # there is no number of labels to compare otherwise
                    record = data.label(order, seed, goal, random_share=options.random_share)
                    folder.add(record)
                    print(f"{name} {order} {seed}: {needed(record)} labels", file=sys.stderr, flush=True)
            if record is not None:
                records.append(record)
    return records


def parser() -> argparse.ArgumentParser:
    """Declare the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    made.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    made.add_argument(
        "--work", type=Path, default=Path("label-efficiency"), help="folder of what is done (default: %(default)s)"
    )
    made.add_argument("--features", type=Path, help="folder of kept features (default: one in that of --work)")
    made.add_argument("--sets", nargs="+", default=SETS, metavar="SET", help="which sets (default: all)")
    made.add_argument("--seeds", type=int, default=5, metavar="N", help="how many seeds (default: %(default)s)")
    made.add_argument("--model", default="builtin:tiny", help="backbone (default: %(default)s)")
    made.add_argument("--taps", default="auto", help="where a head may read (default: those of `label`)")
    made.add_argument(
        "--random-share", type=float, default=0.25, metavar="FRACTION", help="of the loop (default: %(default)s)"
    )
    made.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: %(default)s)")
    made.add_argument("--no-run", action="store_true", help="lay out what is done, and run nothing")
    made.add_argument("--write", action="store_true", help="put the tables into docs/explanation/labelling.md")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet and lay out everything.

    Returns:
        0; 2 where something cannot be run.
    """
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        check_sets(options.data, options.sets)
        tables = page(options.sets, perform(options))
    except QwenVLClassifierError as error:
        print(error, file=sys.stderr)
        return 2
    print(tables)
    if options.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
        DOCUMENT.write_text(text[:before] + tables + text[after:], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
