"""Measure `score`: what it costs beside the backbone, what its engines are worth, and what kills and bad rows do to it.

    python benchmarks/scoring.py                  # everything
    python benchmarks/scoring.py --write          # and puts the tables into docs/how-to/scale.md
    python benchmarks/scoring.py throughput       # score against bare encode, on the same rows
    python benchmarks/scoring.py engines          # two processes or Ray actors against one process, same threads
    python benchmarks/scoring.py overhead         # time against the size of a shard
    python benchmarks/scoring.py kills            # 20 SIGKILLs over 20,000 rows, 5 % of them bad
    python benchmarks/scoring.py million          # a million rows, with a stub in place of the model
    python benchmarks/scoring.py --quick          # little of everything, to see that it works: figures mean nothing

Rows are drawn scenes of about 130 x 110 pixels with statements, or texts alone; the classifier is zero-shot on
`builtin:tiny` in float32. Figures that compare are ratios of contenders that took turns in one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from encoder import chip
from racing import race, timed
from scoring_data import make_classifier, write_rows, write_texts
from scoring_kills import ROOT, Scoring
from tables import SCALE_PAGE, put_table

from qwen_vl_classifier import Classifier, ScoreConfig, load_examples, score


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    rows: int  # with a picture each, for throughput and engines
    texts: int  # rows without pictures, for overhead
    shard_sizes: tuple[int, ...]
    killed_rows: int
    killed_shard: int
    kills: int
    million: int
    repeats: int
    threads: int  # where there is one process

    def times(self, share: float) -> Sizes:
        """Return the same with fewer rows."""
        rows = {name: round(share * getattr(self, name)) for name in ("rows", "texts", "killed_rows", "million")}
        return replace(self, **rows)


FULL = Sizes(1200, 2000, (10, 30, 100, 300, 1000), 20_000, 100, 20, 1_000_000, 3, 1)
QUICK = Sizes(40, 40, (10, 40), 240, 20, 2, 2000, 1, 1)
WORKERS = 2
BAD_EVERY = 20


class Bench:
    """A classifier and a folder to work in."""

    def __init__(self, place: Path, sizes: Sizes) -> None:
        self.place = place
        self.sizes = sizes
        self.folder = make_classifier(place / "classifier")
        self._numbers = itertools.count()

    def out(self) -> Path:
        """Return a folder that is not there yet."""
        return self.place / f"out-{next(self._numbers)}"

    def throughput(self) -> list[str]:
        """Race `score` against the backbone alone."""
        torch.set_num_threads(self.sizes.threads)
        data = write_rows(self.place / "unique", self.sizes.rows, per_picture=1)
        classifier = Classifier.load(self.folder, device="cpu")
        examples = load_examples(data)
        times = race(
            {
                "`Backbone.encode`": lambda: classifier.backbone.encode(examples, [classifier.tap]),
                "`score`": lambda: score(classifier, data, self.out(), progress=False),
            },
            self.sizes.repeats,
        )
        base = times["`Backbone.encode`"].median
        return [
            f"{self.sizes.rows} rows, one picture each; {self.sizes.threads} threads; "
            f"medians of {self.sizes.repeats} rounds.",
            "",
            "| what | seconds | rows a second | of bare encode |",
            "|---|---|---|---|",
            *(
                f"| {name} | {taken.median:.2f} | {self.sizes.rows / taken.median:.0f} | {base / taken.median:.3f} |"
                for name, taken in times.items()
            ),
        ]

    def engines(self) -> list[str]:
        """Race engines that share out the same threads."""
        data = write_rows(self.place / "engines", self.sizes.rows, per_picture=1)
        contenders = {
            f"local, 1 process x {WORKERS} threads": ("local", 1, WORKERS),
            f"local, {WORKERS} processes x 1 thread": ("local", WORKERS, 1),
            f"Ray, {WORKERS} actors x 1 thread": ("ray", WORKERS, 1),
        }
        shard = max(4, self.sizes.rows // 40)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(self.sizes.repeats):
            for name, (engine, workers, threads) in contenders.items():
                out = self.out()
                config = ScoreConfig(engine=engine, workers=workers, threads=threads, shard_size=shard)
                work = _scoring(self.folder, data, out, config)
                seconds[name].append(timed(work))
                rates[name].append(_steady_rate(out, shard, skip=2 * WORKERS))
        base = next(iter(rates.values()))
        lines = [
            f"{self.sizes.rows} rows, one picture each, {shard} in a shard; medians of {self.sizes.repeats} rounds. "
            f"The rate is that between the {2 * WORKERS}th shard and the last one: workers are loaded by then.",
            "",
            "| engine | rows a second | of one process | whole run, s |",
            "|---|---|---|---|",
        ]
        for name, values in rates.items():
            rate, ratio = statistics.median(values), statistics.median(values) / statistics.median(base)
            lines.append(f"| {name} | {rate:.0f} | {ratio:.2f} | {statistics.median(seconds[name]):.1f} |")
        return lines

    def overhead(self) -> list[str]:
        """Time shards of several sizes, and fit what a shard costs beside its rows."""
        torch.set_num_threads(self.sizes.threads)
        rows = self.sizes.texts
        data = write_texts(self.place / "texts.jsonl", rows)
        classifier = Classifier.load(self.folder, device="cpu")

        def contender(size: int) -> Callable[[], object]:
            return lambda: score(classifier, data, self.out(), config=ScoreConfig(shard_size=size), progress=False)

        times = race({str(size): contender(size) for size in self.sizes.shard_sizes}, self.sizes.repeats)
        shards = np.array([-(-rows // size) for size in self.sizes.shard_sizes])
        measured = np.array([taken.median for taken in times.values()])
        slope, level = np.polyfit(shards, measured, 1)
        return [
            f"{rows} rows without pictures, {self.sizes.threads} threads; medians of {self.sizes.repeats} rounds. "
            f"A straight line through them: {1000 * slope:.1f} ms for each shard, {1000 * level / rows:.2f} ms for "
            "each row. Part of it is that few rows make small batches.",
            "",
            "| rows in a shard | shards | seconds | rows a second | of the largest |",
            "|---|---|---|---|---|",
            *(
                f"| {size} | {count} | {taken:.2f} | {rows / taken:.0f} | {measured[-1] / taken:.2f} |"
                for size, count, taken in zip(self.sizes.shard_sizes, shards, measured, strict=True)
            ),
        ]

    def kills(self) -> list[str]:
        """Kill drivers, workers and actors at random, and compare with a run that was left alone."""
        sizes, workers = self.sizes, WORKERS
        data = write_rows(self.place / "killed", sizes.killed_rows, per_picture=10, bad_every=BAD_EVERY)
        scoring = Scoring(
            self.folder, data, shard_size=sizes.killed_shard, workers=workers, place=self.place / "scoring"
        )
        whole, broken = self.place / "unkilled", self.place / "with-kills"
        reference = scoring.run(whole, 0, engines=("local",))
        killed = scoring.run(broken, sizes.kills, engines=("local", "ray"))
        table = pq.read_table(broken / "shards")
        ids, expected = table["id"].to_pylist(), [f"row-{number}" for number in range(sizes.killed_rows)]
        errors = sum(error is not None for error in table["error"].to_pylist())
        scored = sum(value is not None for value in table["probability"].to_pylist())
        counts = ", ".join(f"{killed.kills.count(victim)} {victim}s" for victim in ("driver", "worker", "actor"))
        checks = {
            "SIGKILLs that hit": f"{len(killed.kills)}: {counts}",
            "starts of the command, by either engine at random": str(killed.starts),
            "every id once, in the order of the data": _yes(ids == expected),
            "all files the same, byte by byte, as those of a run that was left alone": _yes(
                _files(whole) == _files(broken)
            ),
            "rows scored + rows with an error = rows": f"{scored} + {errors} = {len(ids)}",
            "rows computed more than once": f"{killed.encoded - reference.encoded}, at most "
            f"{killed.most_wasted(sizes.killed_shard, workers)} (a shard for each worker that a kill ends)",
            "seconds, left alone and with kills": f"{reference.seconds:.0f}, {killed.seconds:.0f}",
        }
        return [
            f"{sizes.killed_rows:,} rows about {sizes.killed_rows // 10:,} pictures, {1 / BAD_EVERY:.0%} of them bad, "
            f"{sizes.killed_shard} in a shard; {workers} workers x 1 thread.",
            "",
            "| what | found |",
            "|---|---|",
            *(f"| {what} | {found} |" for what, found in checks.items()),
        ]

    def million(self) -> list[str]:
        """Plan and score many rows, with a stub in place of the model, in a process of their own."""
        data = write_texts(self.place / "million.jsonl", self.sizes.million)
        command = [sys.executable, str(ROOT / "benchmarks" / "scoring_memory.py"), str(data), str(self.out())]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603  # our own
        found = json.loads(done.stdout)
        return [
            f"{self.sizes.million:,} rows of JSONL, {data.stat().st_size / 1e6:.0f} MB, 1,000 in a shard; the backbone "
            "returns a constant.",
            "",
            "| what | found |",
            "|---|---|",
            f"| planning, seconds | {found['plan_seconds']:.1f} |",
            f"| memory that planning adds, MB | {found['plan_megabytes']:.0f} |",
            f"| scoring, seconds | {found['score_seconds']:.0f} |",
            f"| memory after a tenth of the rows, MB | {found['early_megabytes']:.0f} |",
            f"| most memory after that, MB | {found['most_megabytes']:.0f} |",
        ]


def _scoring(classifier: Path, data: Path, out: Path, config: ScoreConfig) -> Callable[[], object]:
    return lambda: score(classifier, data, out, config=config, device="cpu", progress=False)


def _steady_rate(out: Path, shard: int, *, skip: int) -> float:
    """Return rows a second after the first few shards, by the times at which files were written."""
    written = sorted(path.stat().st_mtime_ns for path in out.glob("shards/[0-9]*.parquet"))
    return shard * (len(written) - skip) / ((written[-1] - written[skip - 1]) / 1e9)


def _files(out: Path) -> dict[str, bytes]:
    """Return all but the lock, which names the process that held it last."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


PARTS: dict[str, Callable[[Bench], list[str]]] = {
    "throughput": Bench.throughput,
    "engines": Bench.engines,
    "overhead": Bench.overhead,
    "kills": Bench.kills,
    "million": Bench.million,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure (default: everything)")
    parser.add_argument("--quick", action="store_true", help="little of everything: figures mean nothing")
    parser.add_argument("--share", type=float, default=1.0, help="take this share of the rows (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/how-to/scale.md")
    options = parser.parse_args()
    machine = f"{chip()}, torch {torch.__version__}."
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), QUICK if options.quick else FULL.times(options.share))
        for name in options.parts or PARTS:
            lines = PARTS[name](bench)
            lines[0] = f"{machine} {lines[0]}"
            print(f"## {name}\n", *lines, sep="\n", end="\n\n", flush=True)
            if options.write:
                put_table(SCALE_PAGE, name, lines)


if __name__ == "__main__":
    main()
