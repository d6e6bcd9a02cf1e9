"""Simulate a run of `score` on many machines: time and wasted work against the size of a shard.

    python benchmarks/scale_simulation.py                                     # 1 billion rows on 256 H200
    python benchmarks/scale_simulation.py --rows 20000 --workers 2 --row-seconds 0.004 --shard-seconds 0.01
    python benchmarks/scale_simulation.py --write                             # puts the table into docs/how-to/scale.md

Workers are stubs that only take time; what they do next is decided by `scoring.schedule.Schedule`, the code that real
runs use. A shard takes a time that is constant for each shard and for each row, times a factor that is drawn
log-normally for each attempt. A worker is lost after a time that is drawn exponentially, with the shard that it is at,
and another takes its place later, when its machine has started and the model is loaded.
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tables import SCALE_PAGE, put_table

from qwen_vl_classifier.scoring.jobs import Shard
from qwen_vl_classifier.scoring.schedule import Schedule, Task

SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is simulated.

    Attributes:
        workers: How many work at a time.
        row_seconds: Time that a worker takes for a row.
        shard_seconds: Time that each shard takes beside that: listing, opening, writing.
        spread: Standard deviation of the logarithm of the factor on a shard's time.
        hours_between_losses: Mean time until a worker is lost; infinity loses none.
        restart_seconds: Time until another takes its place, the model loaded.
    """

    workers: int
    row_seconds: float
    shard_seconds: float
    spread: float = 0.1
    hours_between_losses: float = math.inf
    restart_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Course:
    """How a simulated run went.

    Attributes:
        seconds: From the first start to the last shard.
        losses: Workers that were lost before that.
        wasted_seconds: Work of theirs that had to be done again, summed over workers.
        down_seconds: Time in which a place had no worker, summed over places.
        idle_seconds: Time in which a worker found nothing to do while the last shards ran, summed over workers.
    """

    seconds: float
    losses: int
    wasted_seconds: float
    down_seconds: float
    idle_seconds: float


def shards_of(rows: int, size: int) -> Iterator[Shard]:
    """Cut rows into shards without sources."""
    for index in range(-(-rows // size)):
        first = index * size
        yield Shard(index, first, min(size, rows - first), ())


def simulate(cluster: Cluster, rows: int, shard_size: int, *, seed: int = 0) -> Course:
    """Run all shards, event by event.

    Args:
        cluster: What works.
        rows: How many there are.
        shard_size: How many of them are in a shard.
        seed: Of times and losses.
    """
    rng = np.random.default_rng([seed, shard_size])
    schedule = Schedule(shards_of(rows, shard_size))
    mean_life = cluster.hours_between_losses * 3600
    events: list[tuple[float, int, Task | None, bool, float]] = []  # when, place, task, if it ends well, its start
    ends_of_life = [
        rng.exponential(mean_life) if math.isfinite(mean_life) else math.inf for _ in range(cluster.workers)
    ]
    idle: dict[int, float] = {}  # places without a task, since when
    losses, wasted, down, last = 0, 0.0, 0.0, 0.0

    def start(place: int, now: float) -> None:
        task = schedule.next()
        if task is None:
            idle[place] = now
            return
        factor = rng.lognormal(-(cluster.spread**2) / 2, cluster.spread)
        end = now + factor * (cluster.shard_seconds + cluster.row_seconds * task.shard.rows)
        survives = end <= ends_of_life[place]
        heapq.heappush(events, (end if survives else max(now, ends_of_life[place]), place, task, survives, now))

    for place in range(cluster.workers):
        start(place, 0.0)
    while events:
        now, place, task, survives, began = heapq.heappop(events)
        if task is None:
            ends_of_life[place] = now + _lifetime(rng, mean_life)
        elif survives:
            schedule.done(task)
            last = now
        else:
            schedule.lost(task)
            losses += 1
            wasted += now - began
            down += cluster.restart_seconds
            heapq.heappush(events, (now + cluster.restart_seconds, place, None, True, now))
            waiting = min(idle, default=None)
            if waiting is not None:
                idle.pop(waiting)
                start(waiting, now)
            continue
        start(place, now)
    return Course(last, losses, wasted, down, sum(last - since for since in idle.values() if since < last))


def _lifetime(rng: np.random.Generator, mean: float) -> float:
    return rng.exponential(mean) if math.isfinite(mean) else math.inf


def ideal_seconds(cluster: Cluster, rows: int) -> float:
    """Return the time with no loss, no cost of shards and no waiting at the end."""
    return rows * cluster.row_seconds / cluster.workers


def table(cluster: Cluster, rows: int, sizes: Sequence[int], *, seed: int = 0) -> list[str]:
    """Simulate each size of shard, and write the courses as a table."""
    ideal = ideal_seconds(cluster, rows)
    losses = (
        "no worker is lost"
        if math.isinf(cluster.hours_between_losses)
        else f"a worker is lost every {cluster.hours_between_losses:g} hours on average and replaced "
        f"{cluster.restart_seconds:g} s later"
    )
    lines = [
        f"{rows:,} rows, {cluster.workers} workers, {cluster.row_seconds * 1000:g} ms a row, "
        f"{cluster.shard_seconds:g} s a shard, spread {cluster.spread:g}; {losses}; seed {seed}. "
        f"Without any of that: {ideal / 3600:.2f} hours.",
        "",
        "| rows a shard | shards | seconds a shard | hours | of ideal | losses | work done again | idle at the end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        course = simulate(cluster, rows, size, seed=seed)
        whole = course.seconds * cluster.workers
        seconds = cluster.shard_seconds + cluster.row_seconds * min(size, rows)
        lines.append(
            f"| {size:,} | {-(-rows // size):,} | {seconds:,.1f} | {course.seconds / 3600:.2f} | "
            f"{course.seconds / ideal:.3f} | {course.losses} | {course.wasted_seconds / whole:.2%} | "
            f"{course.idle_seconds / whole:.2%} |"
        )
    return lines


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000_000, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--row-seconds", type=float, default=0.0302, help="of a worker (default: %(default)s)")
    parser.add_argument("--shard-seconds", type=float, default=0.5, help="beside its rows (default: %(default)s)")
    parser.add_argument("--spread", type=float, default=0.1, help="of shard times (default: %(default)s)")
    parser.add_argument("--hours-between-losses", type=float, default=4.0, help="of a worker (default: %(default)s)")
    parser.add_argument("--restart-seconds", type=float, default=300.0, help="(default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="rows in a shard (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/how-to/scale.md")
    options = parser.parse_args()
    cluster = Cluster(
        options.workers,
        options.row_seconds,
        options.shard_seconds,
        options.spread,
        options.hours_between_losses,
        options.restart_seconds,
    )
    lines = table(cluster, options.rows, options.sizes, seed=options.seed)
    print("\n".join(lines))
    if options.write:
        put_table(SCALE_PAGE, "simulation", lines)


if __name__ == "__main__":
    main()
