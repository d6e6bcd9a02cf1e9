"""Measure what docs/figures/results.md shows: every rung of the ladder on real data sets, with intervals.

    python scripts/results.py --data FOLDER            # runs what is not done yet, prints the tables
    python scripts/results.py --data FOLDER --write    # and puts them into docs/figures/results.md

FOLDER holds one folder for each data set, with train.jsonl and dev.jsonl. What is done (runs.jsonl), the features and
the classifiers from which fine-tuning starts are kept in the folder of --work: the script can be stopped at any time
and goes on there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_intervals import METRICS, Bootstrap, Estimate, Scored
from results_runs import FEATURES, FINETUNES, METHODS, PROBES, START, DataSet, Run, RunFile, plan

from qwen_vl_classifier import Backbone, QwenVLClassifierError
from qwen_vl_classifier.errors import ConfigError

SETS = ("easyvqa_tiny", "nlvr", "pneumonia", "grocery", "coffee")  # from quick to slow to fine-tune
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "figures" / "results.md"
BEGIN, END = "<!-- tables begin -->\n", "<!-- tables end -->\n"
NAMES = {
    "majority": "majority",
    "zero-shot": "zero-shot",
    "recipe": "original recipe",
    "logistic": "logistic regression",
    "probe": "auto probe",
    "lora": "LoRA",
    "full": "full fine-tuning",
}
HEADINGS = {"accuracy": "accuracy", "auroc": "AUROC", "ece": "ECE"}
COMPARISONS = ((START, "recipe"), *((method, START) for method in FINETUNES))


@dataclass(frozen=True, slots=True)
class Measured:
    """What is done of one method on one set.

    Attributes:
        records: By seed, as the run file has them.
        minutes: Of training, the mean over seeds, with all that the method needs.
    """

    records: dict[int, dict[str, Any]]
    minutes: float

    def scored(self, seeds: Sequence[int] | None = None) -> Scored:
        """Return what the runs of some seeds, or all, said of the dev rows."""
        records = [self.records[seed] for seed in (seeds if seeds is not None else self.records)]
        return Scored(
            np.array([record["probabilities"] for record in records], dtype=np.float64),
            np.array([record["threshold"] for record in records], dtype=np.float64),
        )


def measured(name: str, runs: Sequence[Run], file: RunFile) -> dict[str, Measured]:
    """Gather what is done on one set, by method, in the order of `METHODS`."""
    done = {(run.method, run.seed): record for run in runs if run.set == name and (record := file.get(run))}
    needs = {**dict.fromkeys(PROBES, (FEATURES,)), **dict.fromkeys(FINETUNES, (FEATURES, START))}

    def seconds(method: str, seed: int) -> float:
        needed = (done.get((need, 0 if need == FEATURES else seed)) for need in needs.get(method, ()))
        return float(done[method, seed]["seconds"] + sum(record["seconds"] for record in needed if record))

    gathered = {}
    for method in METHODS:
        records = {seed: record for (other, seed), record in done.items() if other == method}
        if records:
            gathered[method] = Measured(records, float(np.mean([seconds(method, seed) for seed in records])) / 60)
    return gathered


def bootstrap_of(methods: dict[str, Measured]) -> Bootstrap:
    """Make the draws for a set from any of its records, which all have the same rows."""
    record = next(iter(next(iter(methods.values())).records.values()))
    return Bootstrap(np.array(record["labels"]), np.array(record["groups"]))


def overview(results: dict[str, dict[str, Measured]], bootstraps: dict[str, Bootstrap]) -> Iterator[str]:
    """Lay out the accuracy of all methods on all sets."""
    yield f"| method | {' | '.join(results)} |"
    yield "|---|" + "---:|" * len(results)
    for method in METHODS:
        cells = [
            f"{bootstraps[name].value('accuracy', methods[method].scored()):.3f}" if method in methods else ""
            for name, methods in results.items()
        ]
        if any(cells):
            yield f"| {NAMES[method]} | {' | '.join(cells)} |"


def set_table(methods: dict[str, Measured], bootstrap: Bootstrap) -> Iterator[str]:
    """Lay out one set: which method, how good, how sure, how many minutes."""
    yield f"| method | {' | '.join(HEADINGS[metric] for metric in METRICS)} | minutes | seeds | kept |"
    yield "|---|" + "---|" * len(METRICS) + "---:|---:|---|"
    for method, result in methods.items():
        estimates = bootstrap.estimate(result.scored())
        cells = (with_interval(estimates[metric]) for metric in METRICS)
        yield (
            f"| {NAMES[method]} | {' | '.join(cells)} | {result.minutes:.2f} | {len(result.records)} "
            f"| {kept(list(result.records.values()))} |"
        )


def kept(records: Sequence[dict[str, Any]]) -> str:
    """Say which taps and heads the seeds chose, and how often fine-tuning was no better than its start."""
    places = dict.fromkeys(f"`{record['tap']}` {record['head']}" for record in records if "tap" in record)
    in_vain = sum(not record.get("improved", True) for record in records)
    start = f"; {in_vain} of {len(records)} kept the probe" if in_vain else ""
    return ", ".join(places) + start


def comparison_table(
    method: str, other: str, results: dict[str, dict[str, Measured]], bootstraps: dict[str, Bootstrap]
) -> Iterator[str]:
    """Lay out how much better one method is than another on each set that has both."""
    yield f"| set | {' | '.join(HEADINGS[metric] for metric in METRICS)} | accuracy, in standard errors |"
    yield "|---|" + "---|" * len(METRICS) + "---:|"
    for name, methods in results.items():
        if method in methods and other in methods:
            seeds = sorted(methods[method].records.keys() & methods[other].records.keys())
            if not seeds:
                continue
            pair = (methods[method].scored(seeds), methods[other].scored(seeds))
            differences = bootstraps[name].difference(*pair)
            cells = (f"{differences[metric].value:+.3f} ± {differences[metric].error:.3f}" for metric in METRICS)
            accuracy = differences["accuracy"]
            ratio = f"{accuracy.value / accuracy.error:+.1f}" if accuracy.error else "none"
            yield f"| {name} | {' | '.join(cells)} | {ratio} |"


def with_interval(estimate: Estimate) -> str:
    """Write a score with its 95 % interval."""
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def page(sets: Sequence[str], runs: Sequence[Run], file: RunFile) -> str:
    """Lay out everything that is done, in Markdown."""
    results = {name: methods for name in sets if (methods := measured(name, runs, file))}
    if not results:
        return "Nothing is measured yet.\n"
    bootstraps = {name: bootstrap_of(methods) for name, methods in results.items()}
    lines = ["### Accuracy on all sets", "", *overview(results, bootstraps), ""]
    for name, methods in results.items():
        lines += [f"### {name}, {bootstraps[name].rows} dev rows", "", *set_table(methods, bootstraps[name]), ""]
    for method, other in COMPARISONS:
        table = [*comparison_table(method, other, results, bootstraps)]
        if len(table) > 2:  # more than its head
            heading = f"{NAMES[method]} against {NAMES[other]}"
            lines += [f"### {heading[0].upper()}{heading[1:]}", "", *table, ""]
    return "\n".join([*lines, made_with(results)]) + "\n"


def made_with(results: dict[str, dict[str, Measured]]) -> str:
    """Say what the runs were made with, all values where they differ."""
    records = [r for methods in results.values() for result in methods.values() for r in result.records.values()]
    threads = sorted({record["threads"] for record in records})
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for library, version in record["versions"].items():
            versions.setdefault(library, {})[version] = None
    listed = ", ".join(f"{library} {' and '.join(found)}" for library, found in versions.items())
    machines = ", ".join(sorted({record["machine"] for record in records}))
    return f"Threads: {' and '.join(map(str, threads))}, on {machines}. Made with {listed}."


def check_sets(data: Path, sets: Sequence[str]) -> None:
    """Make sure that all sets are there before anything is run.

    Raises:
        ConfigError: One is not.
    """
    for name in sets:
        missing = [part for part in ("train.jsonl", "dev.jsonl") if not (data / name / part).is_file()]
        if missing:
            raise ConfigError(
                f"{data / name} has no {' and no '.join(missing)}; expected a folder for each set with both; give "
                "--data the folder of the sets, or --sets those that are there"
            )


def perform(runs: Sequence[Run], file: RunFile, options: argparse.Namespace) -> list[str]:
    """Do the runs that are not done, keep each at once, and return what went wrong, a line for each."""
    problems: list[str] = []
    waiting = [run for run in runs if file.get(run) is None]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done", flush=True)
    if not waiting:
        return problems
    backbone = Backbone.load(options.model, dtype=options.dtype)
    features = options.features or options.work / "features"
    sets = {name: DataSet(options.data / name, options.work, features) for name in options.sets}
    for number, run in enumerate(waiting, start=1):
        print(f"== {number} of {len(waiting)}: {run}", flush=True)
        try:
            result = sets[run.set].perform(run, backbone)
        except QwenVLClassifierError as error:  # the other runs are worth having
            problems.append(f"{run}: {error}")
            print(problems[-1], file=sys.stderr, flush=True)
            continue
        file.add(run, result)
        print(f"{result['seconds']:.1f} s", flush=True)
    return problems


def parser() -> argparse.ArgumentParser:
    """Declare the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    made.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    made.add_argument("--work", type=Path, default=Path("runs"), help="folder of what is done (default: %(default)s)")
    made.add_argument("--features", type=Path, help="folder of kept features (default: one in that of --work)")
    made.add_argument("--sets", nargs="+", default=SETS, metavar="SET", help="which sets (default: all)")
    made.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="which methods (default: all)")
    made.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), metavar="N", help="(default: 0 1 2)")
    made.add_argument("--model", default="builtin:tiny", help="backbone (default: %(default)s)")
    made.add_argument(
        "--dtype",
        default="float32",
        choices=("auto", "float32", "bfloat16"),
        help="of the backbone; fine-tuning computes in float32, so that its start is the probe (default: %(default)s)",
    )
    made.add_argument("--limit", type=int, default=0, metavar="N", help="so many rows of each part, for a trial")
    made.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's choice)")
    made.add_argument("--no-run", action="store_true", help="lay out what is done, and run nothing")
    made.add_argument("--write", action="store_true", help="put the tables into docs/figures/results.md")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet and lay out everything.

    Returns:
        0; 1 where a run failed; 2 where nothing could be run.
    """
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = plan(
        options.sets, options.methods, options.seeds, model=options.model, dtype=options.dtype, limit=options.limit
    )
    problems = []
    try:
        if not options.no_run:
            check_sets(options.data, options.sets)
            options.work.mkdir(parents=True, exist_ok=True)
        file = RunFile(options.work / "runs.jsonl")
        if not options.no_run:
            problems = perform(runs, file, options)
    except QwenVLClassifierError as error:
        print(error, file=sys.stderr)
        return 2
    tables = page(options.sets, runs, file)
    print(tables)
    if options.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
        DOCUMENT.write_text(text[:before] + tables + text[after:], encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
