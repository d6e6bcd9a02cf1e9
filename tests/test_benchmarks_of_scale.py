"""The benchmark of scoring runs, and the simulation agrees with what can be computed. Nothing is timed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Let the modules of the benchmarks be imported, as a script there does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def run(fresh) -> Callable[..., str]:
    """Run the benchmark of scoring and return what it prints."""

    def run(*arguments: str) -> str:
        done = fresh.run(ROOT / "benchmarks" / "scoring.py", "--quick", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def cluster(**options):
    from scale_simulation import Cluster

    return Cluster(**{"workers": 4, "row_seconds": 0.01, "shard_seconds": 1.0, "spread": 0.0} | options)


def test_without_losses_a_run_takes_its_rounds_of_shards():
    from scale_simulation import simulate

    course = simulate(cluster(), rows=1000, shard_size=100)  # 10 shards on 4 workers: 3 rounds of 2 s
    assert course.seconds == pytest.approx(6.0)
    assert (course.losses, course.wasted_seconds, course.down_seconds) == (0, 0, 0)
    assert course.idle_seconds == pytest.approx(2 * 2.0)


def test_losses_waste_what_the_exponential_law_says():
    from scale_simulation import simulate

    life, shard = 100.0, 41.0
    lossy = cluster(shard_seconds=1.0, row_seconds=0.4, hours_between_losses=life / 3600, restart_seconds=0.0)
    course = simulate(lossy, rows=200_000, shard_size=100)
    # A shard that takes T is lost exp(T/life) - 1 times before it is done once; each time, all of its time was
    # wasted up to the loss. Of all time at work, the shards that were done are T / (life * (exp(T/life) - 1)).
    useful = shard / (life * math.expm1(shard / life))
    at_work = 2000 * shard + course.wasted_seconds
    assert 2000 * shard / at_work == pytest.approx(useful, rel=0.03)
    assert course.losses == pytest.approx(2000 * math.expm1(shard / life), rel=0.08)
    assert course.wasted_seconds <= course.losses * shard


def test_a_loss_wastes_at_most_a_shard_and_the_place_is_down_until_it_is_filled():
    from scale_simulation import ideal_seconds, simulate

    lossy = cluster(hours_between_losses=0.02, restart_seconds=30.0)
    course = simulate(lossy, rows=100_000, shard_size=200)
    assert course.losses > 10
    assert 0 < course.wasted_seconds <= course.losses * 3.0
    assert course.down_seconds == 30.0 * course.losses
    assert course.seconds > ideal_seconds(lossy, 100_000)


def test_the_seed_decides():
    from scale_simulation import simulate

    lossy = cluster(hours_between_losses=0.02, spread=0.2)
    courses = [simulate(lossy, rows=20_000, shard_size=100, seed=seed) for seed in (0, 0, 1)]
    assert courses[0] == courses[1] != courses[2]


def test_the_simulation_has_a_row_for_each_size():
    from scale_simulation import table

    told = table(cluster(workers=8), 100_000, (100, 1000))
    rows = [line.split(" | ") for line in told if re.match(r"\| [\d,]+ \|", line)]
    assert [row[0] for row in rows] == ["| 100", "| 1,000"]
    assert [row[1] for row in rows] == ["1,000", "100"]
    assert "no worker is lost" in told[0]


def test_texts_about_one_picture_share_its_cost():
    from checkpoints import SHAPES
    from scale_costs import Case, row_flops

    alone, shared, text = (
        row_flops(Case("", SHAPES["3b"], side, texts)) for side, texts in ((896, 1), (896, 1000), (0, 1))
    )
    assert text < alone / 10
    assert text * 0.7 < shared < 2 * text


def test_the_benchmark_of_scoring_runs(run):
    told = run("throughput", "overhead")
    assert told.count("| `score` | ") == 1
    assert "| 10 | 4 | " in told


@pytest.mark.soak
def test_kills_and_engines_of_the_benchmark_run(run):
    told = run("kills", "engines", "million")
    assert re.search(r"\| SIGKILLs that hit \| [12]: ", told)  # the run may be over before the second
    assert "| NO |" not in told
    assert "| rows scored + rows with an error = rows | 228 + 12 = 240 |" in told
    assert "| Ray, 2 actors x 1 thread | " in told


def test_the_page_has_every_mark():
    page = (ROOT / "docs" / "how-to" / "scale.md").read_text(encoding="utf-8")
    for part in ("throughput", "engines", "overhead", "kills", "million", "costs", "simulation"):
        assert page.index(f"<!-- {part} begins -->\n") < page.index(f"<!-- {part} ends -->\n")
