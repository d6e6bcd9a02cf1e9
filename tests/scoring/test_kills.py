"""Real processes on real data: killed at any moment, they end as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.scoring import local
from qwen_vl_classifier.scoring.run import score
from tests import crash_points
from tests.waiting import until

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).with_name("faulty_worker.py")


@pytest.fixture
def classifier(tmp_path, tiny_classifier) -> Path:
    return tiny_classifier.save(tmp_path / "spam")


def make_data(folder: Path, rows: int) -> Path:
    """Write rows about 40 pictures, one in twenty of them damaged."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes()[:500])
    (folder / "20.png").write_text("no picture")
    path = folder / "rows.jsonl"
    lines = ({"id": f"row {row}", "image": f"{row * 7 % 40}.png", "text": f"Text {row}."} for row in range(rows))
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.soak
def test_a_process_on_each_of_two_devices_writes_what_one_process_does(tmp_path, classifier):
    data = make_data(tmp_path / "data", 60)
    config = ScoreConfig(shard_size=5, threads=1, token_budget=1024)
    found = {}
    for device in ("cpu", "cpu,cpu"):
        score(classifier, data, tmp_path / device, config=config, device=device, progress=False)
        found[device] = [path.read_bytes() for path in sorted((tmp_path / device / "shards").iterdir())]
    assert len(found["cpu"]) == 12
    assert found["cpu,cpu"] == found["cpu"]


CLI = """
import sys
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.scoring import local
local.WORKER = (sys.executable, "-P", sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def start(
    classifier: Path, data: Path, out: Path, shard_size: int, workers: int, halts: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Start `score` with workers that halt where they are told."""
    options = ["--shard-size", shard_size, "--workers", workers, "--threads", 1, "--device", "cpu"]
    command = [sys.executable, "-c", CLI, FAULTY, "score", classifier, data, "--out", out, *options]
    return subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        env={**os.environ, **(halts or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def workers_of(run: subprocess.Popen) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(run.pid).children() if str(FAULTY) in child.cmdline()]
    except psutil.Error:
        return []


def shards_in(out: Path) -> int:
    return len(list((out / "shards").glob("0*"))) if (out / "shards").exists() else 0


def content(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def score_here(classifier: Path, data: Path, out: Path, shard_size: int) -> dict:
    config = ScoreConfig(shard_size=shard_size)
    return score(Classifier.load(classifier, device="cpu"), data, out, config=config, progress=False)


def check(out: Path, whole: Path, rows: int) -> None:
    """Make sure that every row is there once, in order, and that nothing tells of the kills."""
    assert content(out) == content(whole)
    found = [row for path in sorted((out / "shards").iterdir()) for row in pq.read_table(path).to_pylist()]
    assert [row["id"] for row in found] == [f"row {row}" for row in range(rows)]
    assert [row["row"] for row in found] == list(range(rows))
    codes = {0: "image_damaged", 20: "image_format"}
    assert [row["error_code"] for row in found] == [codes.get(row * 7 % 40) for row in range(rows)]


def wait_for(shards: int, run: subprocess.Popen, out: Path) -> None:
    until(lambda: shards_in(out) >= shards or run.poll() is not None, f"{shards} shards, or the end of the run")


def partial_files(out: Path) -> list[str]:
    return [path.name for path in out.rglob("*.partial")]


@pytest.mark.long
@pytest.mark.parametrize(
    ("moment", "worker_dies"),
    [("in the middle", False), *(pytest.param(one, True, marks=pytest.mark.soak) for one in crash_points.MOMENTS)],
)
def test_a_run_that_is_killed_ends_as_if_it_were_not(tmp_path, classifier, one_thread, moment, worker_dies):
    """Killed is the driver, while a shard is being written, and before that a worker."""
    data, out = make_data(tmp_path / "data", 120), tmp_path / "out"
    score_here(classifier, data, tmp_path / "whole", 10)
    first, second = tmp_path / "first", tmp_path / "second"
    crashes = [(moment, "000006.parquet", second)]
    if worker_dies:
        crashes.insert(0, (moment, "000003.parquet", first))
    run = start(classifier, data, out, 10, workers=1, halts=crash_points.settings(*crashes))
    victim = crash_points.kill_at(first) if worker_dies else 0
    until(second.exists, "a worker that has written six shards")
    assert int(second.read_text()) != victim
    run.kill()
    _, told = run.communicate()  # on return the worker has ended too: it held the same pipe
    assert ("a worker died (killed by signal 9 (SIGKILL)) at shard 3" in told.decode()) == worker_dies
    there = 6 + (moment == "after the rename")  # its digest is written before it
    assert shards_in(out) == there
    assert len(partial_files(out)) == (moment != "after the rename")  # of the last worker; the driver was gone
    summary = score_here(classifier, data, out, 10)
    assert summary == {"rows": 120, "errors": 6, "shards_written": 12 - there, "shards_there": there}
    check(out, tmp_path / "whole", 120)


@pytest.mark.soak
def test_twenty_kills_over_twenty_thousand_rows(tmp_path, classifier, one_thread):
    """At moments that chance chooses, to meet those that nobody thought of."""
    data, out = make_data(tmp_path / "data", 20_000), tmp_path / "out"
    score_here(classifier, data, tmp_path / "whole", 100)
    draws = random.Random(7)
    run = start(classifier, data, out, 100, workers=2)
    for number, whom in enumerate(["driver", "worker"] * 10, start=1):
        wait_for(200 * number // 21, run, out)
        time.sleep(draws.random() * 0.3)
        if whom == "driver":
            run.kill()
            run.communicate()
            run = start(classifier, data, out, 100, workers=2)
        elif victims := workers_of(run):
            with contextlib.suppress(psutil.NoSuchProcess):
                draws.choice(victims).kill()
    _, told = run.communicate()
    assert run.returncode == 0, told.decode()
    check(out, tmp_path / "whole", 20_000)


@pytest.mark.soak
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_shards_in_work(tmp_path, classifier, number, status):
    data, out, barrier = make_data(tmp_path / "data", 2000), tmp_path / "out", tmp_path / "barrier"
    halts = crash_points.settings(("in the middle", "000001.parquet", barrier))
    run = start(classifier, data, out, 50, workers=1, halts=halts)
    until(barrier.exists, "a shard that is being written")
    workers = workers_of(run)
    run.send_signal(number)
    crash_points.release(barrier)
    _, told = run.communicate()
    assert run.returncode == status, told.decode()
    kept = shards_in(out)
    assert 2 <= kept < 40
    assert re.search(
        rf"{re.escape(str(out))}: stopped; \d+ of 40 shards are kept; run again to continue\n", told.decode()
    )
    assert not any(worker.is_running() for worker in workers)
    assert partial_files(out) == []


@pytest.mark.soak
@pytest.mark.parametrize(("name", "code"), [("deadly.png", "crashed"), ("hanging.png", "timed_out")])
def test_a_picture_that_ends_or_keeps_the_process_becomes_an_error(tmp_path, classifier, monkeypatch, name, code):
    monkeypatch.setattr(local, "WORKER", (sys.executable, "-P", str(FAULTY)))
    data = make_data(tmp_path / "data", 40)
    (data.parent / "9.png").rename(data.parent / name)
    data.write_text(data.read_text().replace('"9.png"', f'"{name}"'))
    deadly = next(row for row in range(40) if row * 7 % 40 == 9)
    config = ScoreConfig(shard_size=10, workers=2, threads=1, stall_timeout=30)
    summary = score(classifier, data, tmp_path / "out", config=config, device="cpu", progress=False)
    assert summary == {"rows": 40, "errors": 3, "shards_written": 4, "shards_there": 0}
    found = pq.read_table(tmp_path / "out" / "shards").to_pylist()
    assert [row["row"] for row in found if row["error_code"] == code] == [deadly]
    assert found[deadly]["probability"] is None
