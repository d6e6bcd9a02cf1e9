"""The local engine: shards over processes that are killed, crash, or hold a row that kills them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from qwen_vl_classifier.config import ScoreConfig
from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.errors import ArtifactError, ConfigError, ScoringError
from qwen_vl_classifier.scoring import local
from qwen_vl_classifier.scoring.parts import Shard
from qwen_vl_classifier.scoring.scorer import Job, ShardReport
from qwen_vl_classifier.scoring.shards import ScoreManifest, ShardFolder
from qwen_vl_classifier.scoring.sources import SourceSpec

STUB = Path(__file__).with_name("stub_worker.py")
ROWS = 8  # of a shard
MANIFEST = ScoreManifest((("spam", "a" * 64),), data="d" * 64, options={})
SPEC = SourceSpec("jsonl", "rows.jsonl", "line", Columns("image", "text", "label", "id"))


@pytest.fixture(autouse=True)
def stub(monkeypatch, tmp_path) -> Path:
    """Let workers be stubs; the file in which they note what they begin."""
    monkeypatch.setattr(local, "WORKER", (sys.executable, "-P", str(STUB)))
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def job(tmp_path) -> Job:
    ShardFolder(tmp_path / "out", MANIFEST).open()
    return Job(classifiers=("spam",), device="cpu", source=SPEC, out=str(tmp_path / "out"), manifest=MANIFEST.to_json())


def shards(count: int) -> list[Shard]:
    return [Shard(index, ROWS * index, ROWS, ()) for index in range(count)]


def do(job: Job, todo, workers: int = 1, should_stop=lambda: False) -> list[ShardReport]:
    reports: list[ShardReport] = []
    local.run(job, todo, ScoreConfig(workers=workers), reports.append, should_stop)
    assert children() == []
    return reports


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children() if str(STUB) in child.cmdline()]


def found(job: Job) -> list[tuple[int, str | None]]:
    """The row and the error code of each row, shard by shard."""
    files = sorted(Path(job.out, "shards").iterdir())
    assert [path.suffix for path in files] == [".parquet"] * len(files)
    return [(row["row"], row["error_code"]) for path in files for row in pq.read_table(path).to_pylist()]


def begun(log: Path) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()]


def test_workers_share_the_shards(job, stub, monkeypatch):
    monkeypatch.setenv("STUB_SLOW", "0.05")
    reports = do(job, shards(10), workers=2)
    assert sorted(report.index for report in reports) == list(range(10))
    assert sum(report.rows for report in reports) == 10 * ROWS
    assert found(job) == [(row, None) for row in range(10 * ROWS)]
    assert len({line.split()[0] for line in stub.read_text().splitlines()}) == 2
    assert sorted(begun(stub), key=int) == [str(index) for index in range(10)]


def test_no_more_workers_than_shards(job, stub):
    assert len(do(job, shards(1), workers=3)) == 1
    assert do(job, []) == []


def test_a_worker_that_is_killed_costs_its_shard_alone(job, stub, monkeypatch, caplog):
    monkeypatch.setenv("STUB_SLOW", "0.2")
    killed: list[int] = []

    def kill_one() -> bool:
        if not killed and stub.exists() and len(begun(stub)) >= 3:
            killed.append(children()[0])
            os.kill(killed[0], signal.SIGKILL)
        return False

    with caplog.at_level(logging.WARNING):
        reports = do(job, shards(8), workers=2, should_stop=kill_one)
    assert sorted(report.index for report in reports) == list(range(8))
    assert found(job) == [(row, None) for row in range(8 * ROWS)]
    assert 8 <= len(begun(stub)) <= 9
    assert "a worker died (killed by signal 9 (SIGKILL)) at shard" in caplog.text


@pytest.mark.parametrize("variable", ["STUB_DEADLY", "STUB_READ_DEADLY"])
def test_rows_that_kill_are_found_and_blamed(job, stub, monkeypatch, variable):
    monkeypatch.setenv(variable, f"{ROWS + 3},{ROWS + 4}")
    reports = do(job, shards(3))
    assert {report.index: report.errors for report in reports} == {0: 0, 1: 2, 2: 0}
    deadly = (ROWS + 3, ROWS + 4)
    assert found(job) == [(row, "crashed" if row in deadly else None) for row in range(3 * ROWS)]


def test_a_crash_that_no_row_explains_ends_the_run(job, monkeypatch):
    monkeypatch.setenv("STUB_DEADLY", "0")
    monkeypatch.setattr("qwen_vl_classifier.scoring.schedule.MOST_CULPRITS", 0)
    with pytest.raises(ScoringError, match=r"killed by signal 11 \(SIGSEGV\)"):
        do(job, shards(1))
    assert children() == []


def test_workers_that_die_while_loading_end_the_run(job, monkeypatch):
    monkeypatch.setenv("STUB_LOAD", "die")
    with pytest.raises(ScoringError, match=r"workers do not start: 3 in a row .* \(killed by signal 9 \(SIGKILL\)\)"):
        do(job, shards(1))


def test_an_expected_error_arrives_as_it_was_raised(job, monkeypatch):
    monkeypatch.setenv("STUB_LOAD", "refuse")
    with pytest.raises(ArtifactError) as caught:
        do(job, shards(1))
    assert str(caught.value) == "spam: no classifier here"
    assert children() == []


def test_a_defect_of_a_worker_keeps_its_traceback(job, monkeypatch):
    monkeypatch.setenv("STUB_SLOW", "no number")
    with pytest.raises(RuntimeError, match=r"(?s)a worker failed:\nTraceback .*ValueError: could not convert"):
        do(job, shards(1))


def test_a_disk_that_is_full_ends_the_run_in_one_line(job, monkeypatch):
    Path(job.out, "shards").write_text("in the way")
    with pytest.raises(ConfigError, match=r"^.*: scores cannot be written here \(.*\); give a folder .*[^\n]$"):
        do(job, shards(1))


def test_a_stop_finishes_what_is_begun_and_no_more(job, stub, monkeypatch):
    monkeypatch.setenv("STUB_SLOW", "0.3")
    reports = do(job, shards(1000), workers=2, should_stop=lambda: stub.exists() and len(begun(stub)) >= 2)
    assert 2 <= len(reports) <= 4
    assert len(found(job)) == len(reports) * ROWS


def test_a_stop_before_anything_began_begins_nothing(job):
    assert do(job, shards(3), should_stop=lambda: True) == []


def test_an_interrupt_leaves_no_worker(job, stub, monkeypatch):
    monkeypatch.setenv("STUB_SLOW", "5")

    def interrupt() -> bool:
        if stub.exists():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        do(job, shards(3), workers=2, should_stop=interrupt)
    assert children() == []


def test_workers_take_no_notice_of_signals_meant_for_the_driver(job, stub, monkeypatch):
    monkeypatch.setenv("STUB_SLOW", "0.3")
    sent: list[int] = []

    def signal_all() -> bool:
        if not sent and stub.exists():
            for pid in children():
                os.kill(pid, signal.SIGINT)
                os.kill(pid, signal.SIGTERM)
                sent.append(pid)
        return False

    assert len(do(job, shards(3), should_stop=signal_all)) == 3
    assert len(sent) == 1
    assert len(begun(stub)) == 3


DRIVER = """
import sys
from qwen_vl_classifier.config import ScoreConfig
from qwen_vl_classifier.scoring import local
from tests.scoring.test_local import MANIFEST, SPEC, STUB, shards
from qwen_vl_classifier.scoring.scorer import Job
local.WORKER = (sys.executable, "-P", str(STUB))
job = Job(classifiers=("spam",), device="cpu", source=SPEC, out=sys.argv[1], manifest=MANIFEST.to_json())
local.run(job, shards(1000), ScoreConfig(workers=2), print, lambda: False)
"""


@contextlib.contextmanager
def driver(job: Job) -> Iterator[subprocess.Popen]:
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", DRIVER, job.out], cwd=root, stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_workers_end_with_their_driver_however_it_ends(job, stub, monkeypatch):
    monkeypatch.setenv("STUB_SLOW", "0.1")
    with driver(job) as process:
        process.stdout.readline()
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert alive == []
    left = len(begun(stub))
    time.sleep(0.3)
    assert len(begun(stub)) == left


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "threads", "expected"),
    [
        ("auto", 0, 0, 0, [("auto", 8, 1)]),
        ("cpu", 4, 2, 0, [("cpu", 4, 2)] * 2),
        ("auto", 2, 0, 0, [("cuda:0", 4, 1), ("cuda:1", 4, 1)]),
        ("cuda", 2, 3, 5, [("cuda:0", 5, 2), ("cuda:1", 5, 2), ("cuda:0", 5, 2)]),
        ("cuda:1", 2, 0, 0, [("cuda:1", 8, 1)]),
        ("cpu", 0, 20, 0, [("cpu", 1, 20)] * 20),
    ],
)
def test_devices_memory_and_cores_are_shared_out(job, monkeypatch, device, gpus, workers, threads, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    jobs = local.worker_jobs(
        Job(classifiers=(), device=device, source=SPEC, out="", manifest={}),
        ScoreConfig(workers=workers, threads=threads),
    )
    assert [(each.device, each.threads, each.sharing) for each in jobs] == expected
