"""The local engine: shards over processes that are killed, crash, or hold a row that kills them."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.errors import ArtifactError, ConfigError, ScoringError
from qwen_vl_classifier.scoring import local
from qwen_vl_classifier.scoring.jobs import Shard, ShardReport, Span
from qwen_vl_classifier.scoring.shards import ShardFolder
from tests import crash_points
from tests.scoring.stub_worker import MANIFEST, StubJob
from tests.waiting import LIMIT, until

STUB = Path(__file__).with_name("stub_worker.py")
ROWS = 8  # of a shard


@pytest.fixture(autouse=True)
def stub(monkeypatch, tmp_path) -> Path:
    """Let workers be stubs; the file in which they note what they begin."""
    monkeypatch.setattr(local, "WORKER", (sys.executable, "-P", str(STUB)))
    monkeypatch.setattr(local, "_TICK", 0.02)  # as long waits here are for what tests do between two looks
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture
def gate(monkeypatch, tmp_path) -> Path:
    """The file for which every shard waits once it is begun."""
    monkeypatch.setenv("STUB_GATE", str(tmp_path / "gate"))
    return tmp_path / "gate"


@pytest.fixture
def job(tmp_path) -> StubJob:
    ShardFolder(tmp_path / "out", MANIFEST).open()
    return StubJob(out=str(tmp_path / "out"))


def shards(count: int) -> list[Shard]:
    return [Shard(index, ROWS * index, ROWS, ()) for index in range(count)]


def do(job: StubJob, todo, workers: int = 1, should_stop=lambda: False, **options) -> list[ShardReport]:
    reports: list[ShardReport] = []
    local.run(job, todo, ScoreConfig(workers=workers, **options), reports.append, should_stop)
    assert children() == []
    return reports


def children() -> list[int]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # among them zombies: of those that are about to end
            if str(STUB) in child.cmdline():
                found.append(child.pid)
    return found


def found(job: StubJob) -> list[tuple[int, str | None]]:
    """The row and the error code of each row, shard by shard."""
    files = sorted(Path(job.out, "shards").iterdir())
    assert [path.suffix for path in files] == [".parquet"] * len(files)
    return [(row["row"], row["error_code"]) for path in files for row in pq.read_table(path).to_pylist()]


def notes(log: Path) -> list[tuple[int, str]]:
    """What workers have begun: process id, and shard."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [line.split(maxsplit=1) for line in lines if line.endswith("\n")]
    return [(int(pid), what.strip()) for pid, what in whole]


def begun(log: Path) -> list[str]:
    return [what for _, what in notes(log)]


def at_work(log: Path) -> set[int]:
    return {pid for pid, _ in notes(log)}


def test_workers_share_the_shards(job, stub, gate):
    def open_once_both_are_at_work() -> bool:
        if len(at_work(stub)) == 2:
            gate.touch()
        return False

    reports = do(job, shards(10), workers=2, should_stop=open_once_both_are_at_work)
    assert sorted(report.index for report in reports) == list(range(10))
    assert sum(report.rows for report in reports) == 10 * ROWS
    assert found(job) == [(row, None) for row in range(10 * ROWS)]
    assert len(at_work(stub)) == 2
    assert sorted(begun(stub), key=int) == [str(index) for index in range(10)]


def test_no_more_workers_than_shards(job, stub):
    assert len(do(job, shards(1), workers=3)) == 1
    assert do(job, []) == []


@pytest.mark.parametrize(
    ("moment", "workers"),
    [
        *((moment, 1) for moment in ("before the first byte", "after the rename")),
        ("in the middle", 2),
        *(pytest.param(moment, 1, marks=pytest.mark.soak) for moment in ("in the middle", "before the rename")),
    ],
)
def test_a_worker_that_is_killed_costs_its_shard_alone(job, stub, monkeypatch, tmp_path, caplog, moment, workers):
    """And leaves nothing half written, although only the engine is there to clear up."""
    barrier = tmp_path / "barrier"
    for name, value in crash_points.settings((moment, "000003.parquet", barrier)).items():
        monkeypatch.setenv(name, value)
    killed: list[int] = []

    def kill_one() -> bool:
        if not killed and barrier.exists():
            killed.append(crash_points.kill_at(barrier))
        return False

    with caplog.at_level(logging.WARNING):
        reports = do(job, shards(8), workers=workers, should_stop=kill_one)
    assert len(killed) == 1
    assert sorted(report.index for report in reports) == list(range(8))
    assert found(job) == [(row, None) for row in range(8 * ROWS)]
    assert sorted(begun(stub), key=int) == ["0", "1", "2", "3", "3", "4", "5", "6", "7"]
    assert "a worker died (killed by signal 9 (SIGKILL)) at shard 3" in caplog.text


def test_rows_that_kill_are_found_and_excluded(job, stub, monkeypatch):
    """One when it is scored, the other when it is read."""
    monkeypatch.setenv("STUB_DEADLY", f"{ROWS + 3}")
    monkeypatch.setenv("STUB_READ_DEADLY", f"{ROWS + 4}")
    reports = do(job, shards(3))
    assert {report.index: report.errors for report in reports} == {0: 0, 1: 2, 2: 0}
    deadly = (ROWS + 3, ROWS + 4)
    assert found(job) == [(row, "crashed" if row in deadly else None) for row in range(3 * ROWS)]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds of the driver's clock, which nothing but the test moves."""
    seconds = [0.0]
    monkeypatch.setattr("qwen_vl_classifier.scoring.driver.time", SimpleNamespace(monotonic=lambda: seconds[0]))
    return seconds


def test_a_worker_that_is_stopped_is_replaced(job, stub, gate, clock):
    """And its shard is done by another one, though it takes in nothing of what it is told."""
    stopped: list[int] = []

    def stop_one() -> bool:
        if not stopped and len(at_work(stub)) == 2:
            stopped.append(min(at_work(stub)))
            os.kill(stopped[0], signal.SIGSTOP)
            gate.touch()
        if stopped and psutil.pid_exists(stopped[0]):
            clock[0] += 5
        return False

    names = tuple(f"{number:0100}.png" for number in range(2000))  # more than a pipe holds
    todo = [Shard(index, ROWS * index, ROWS, (Span("", 0, ROWS, 1, names),)) for index in range(6)]
    reports = do(job, todo, workers=2, should_stop=stop_one, stall_timeout=10)
    assert sorted(report.index for report in reports) == list(range(6))
    assert found(job) == [(row, None) for row in range(6 * ROWS)]
    assert not psutil.pid_exists(stopped[0])


def test_a_row_at_which_workers_hang_becomes_an_error(job, stub, monkeypatch, clock):
    monkeypatch.setenv("STUB_HANGING", f"{ROWS + 3}")

    def let_time_pass() -> bool:
        hung = [pid for pid, what in notes(stub) if what == f"hang {ROWS + 3}"]
        if hung and psutil.pid_exists(hung[-1]):
            clock[0] += 5
        return False

    reports = do(job, shards(3), should_stop=let_time_pass, stall_timeout=10)
    assert {report.index: report.errors for report in reports} == {0: 0, 1: 1, 2: 0}
    assert found(job) == [(row, "timed_out" if row == ROWS + 3 else None) for row in range(3 * ROWS)]


def test_a_process_that_cannot_be_ended_is_left_behind(job, stub, gate, monkeypatch, caplog):
    """The system keeps one that waits for a network mount even when it is killed."""
    monkeypatch.setattr(local, "_SECONDS_TO_END", 0.0)
    engine = local.LocalEngine()
    process = engine.start(job)
    with monkeypatch.context() as patch:
        patch.setattr(process, "kill", lambda: None)
        engine.stop([process])
    assert f"process {process.pid} was killed but has not ended, as it hangs in the operating system" in caplog.text
    process.kill()
    process.wait()


def test_a_crash_that_no_row_explains_ends_the_run(job, monkeypatch):
    monkeypatch.setenv("STUB_DEADLY", "0")
    monkeypatch.setattr("qwen_vl_classifier.scoring.schedule.MOST_CRASHING_ROWS", 0)
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
    monkeypatch.setenv("STUB_LOAD", "fail")
    with pytest.raises(RuntimeError, match=r"(?s)a worker failed:\nTraceback .*ValueError: a defect"):
        do(job, shards(1))


def test_a_disk_that_is_full_ends_the_run_in_one_line(job, monkeypatch):
    Path(job.out, "shards").write_text("in the way")
    with pytest.raises(ConfigError, match=r"^.*: scores cannot be written here \(.*\); give a folder .*[^\n]$"):
        do(job, shards(1))


def test_a_stop_finishes_what_is_begun_and_no_more(job, stub, gate):
    def stop_with_both_at_work() -> bool:
        if len(at_work(stub)) == 2:
            gate.touch()
        return gate.exists()

    reports = do(job, shards(1000), workers=2, should_stop=stop_with_both_at_work)
    assert len(reports) == 2
    rows = [row for row, _ in found(job)]
    assert {row // ROWS for row in rows} >= {report.index for report in reports}
    # What a worker was at when its report came may be there too, but never in part.
    assert len(rows) in (2 * ROWS, 3 * ROWS, 4 * ROWS)


@pytest.mark.parametrize("moment", crash_points.MOMENTS)
def test_a_run_that_is_broken_off_leaves_nothing_half_written(job, monkeypatch, tmp_path, moment):
    barrier = tmp_path / "barrier"
    for name, value in crash_points.settings((moment, "000001.parquet", barrier)).items():
        monkeypatch.setenv(name, value)

    def interrupt() -> bool:
        if barrier.exists():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        do(job, shards(4), should_stop=interrupt)
    there = 1 + (moment == "after the rename")
    assert found(job) == [(row, None) for row in range(there * ROWS)]


def test_a_stop_before_anything_began_begins_nothing(job):
    assert do(job, shards(3), should_stop=lambda: True) == []


def test_an_interrupt_leaves_no_worker(job, stub, gate):
    def interrupt() -> bool:
        if stub.exists():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        do(job, shards(3), workers=2, should_stop=interrupt)
    assert children() == []


def test_workers_take_no_notice_of_signals_meant_for_the_driver(job, stub, gate):
    sent: list[int] = []

    def signal_all() -> bool:
        if not sent and stub.exists():
            for pid in children():
                os.kill(pid, signal.SIGINT)
                os.kill(pid, signal.SIGTERM)
                sent.append(pid)
            gate.touch()
        return False

    assert len(do(job, shards(3), should_stop=signal_all)) == 3
    assert len(sent) == 1
    assert len(begun(stub)) == 3


DRIVER = """
import sys
from qwen_vl_classifier.scoring import local
from qwen_vl_classifier.scoring.driver import Driver
from qwen_vl_classifier.scoring.jobs import Shard
from tests.scoring.stub_worker import StubJob
local.WORKER = (sys.executable, "-P", sys.argv[2])
todo = (Shard(index, index, 1, ()) for index in range(1000))
Driver(local.LocalEngine(), [StubJob(out=sys.argv[1])] * 2, todo, print, lambda: False).run()
"""


@contextlib.contextmanager
def driver(job: StubJob) -> Iterator[subprocess.Popen]:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, job.out, str(STUB)], cwd=root, stdout=subprocess.PIPE
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("stopped", [False, True])
def test_workers_end_with_their_driver_however_it_ends(job, stub, gate, stopped):
    with driver(job) as process:
        until(lambda: len(at_work(stub)) == 2, "two workers that have begun a shard")
        workers = psutil.Process(process.pid).children()
        assert {worker.pid for worker in workers} == at_work(stub)
        if stopped:
            workers[0].suspend()
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=LIMIT)
        assert alive == []


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "threads", "expected"),
    [
        ("auto", 0, 0, 0, [("auto", 8, 1)]),
        ("cpu", 4, 2, 0, [("cpu", 4, 2)] * 2),
        ("auto", 2, 0, 0, [("cuda:0", 4, 1), ("cuda:1", 4, 1)]),
        ("cuda", 2, 3, 5, [("cuda:0", 5, 2), ("cuda:1", 5, 2), ("cuda:0", 5, 2)]),
        ("cuda:1", 2, 0, 0, [("cuda:1", 8, 1)]),
        ("spread", 2, 0, 0, [("spread", 8, 1)]),  # one model over all of them
        ("cpu", 0, 20, 0, [("cpu", 1, 20)] * 20),
        ("all", 2, 0, 0, [("cuda:0", 4, 1), ("cuda:1", 4, 1)]),
        ("cuda:1,cuda:0", 2, 0, 0, [("cuda:1", 4, 1), ("cuda:0", 4, 1)]),
        ("cuda:1, cuda:0", 2, 4, 0, [("cuda:1", 2, 2), ("cuda:0", 2, 2)] * 2),
        ("cpu,cpu", 0, 0, 0, [("cpu", 4, 2)] * 2),
        ("cpu,cuda:1,cpu", 2, 6, 1, [("cpu", 1, 4), ("cuda:1", 1, 2), ("cpu", 1, 4)] * 2),
    ],
)
def test_devices_memory_and_cores_are_shared_out(job, monkeypatch, device, gpus, workers, threads, expected):
    with_gpus(monkeypatch, gpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    jobs = local.worker_jobs(
        StubJob(out="", device=device),
        ScoreConfig(workers=workers, threads=threads),
    )
    assert [(each.device, each.threads, each.sharing) for each in jobs] == expected


@pytest.mark.parametrize(
    ("device", "workers", "message"),
    [
        ("cpu,cpu", 3, "device 'cpu,cpu' with workers 3: 2 devices cannot have the same number of workers each"),
        ("cpu,cpu", 1, "device 'cpu,cpu' with workers 1: 2 devices cannot have the same number of workers each"),
        ("cpu,cuda:2", 0, "device 'cuda:2': torch sees 2 GPU"),
        ("cuda:0,cuda", 0, "device 'cuda:0,cuda': 'cuda' does not say which device"),
        ("cpu,", 0, "device 'cpu,': '' does not say which device"),
        ("cpu,tpu", 0, "device 'tpu': give "),
    ],
)
def test_devices_that_cannot_be_shared_out(job, monkeypatch, device, workers, message):
    with_gpus(monkeypatch, 2)
    with pytest.raises(ConfigError) as caught:
        local.worker_jobs(StubJob(out="", device=device), ScoreConfig(workers=workers))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_all_gpus_of_a_machine_without_any(job, monkeypatch):
    with_gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match=r"^device 'all': torch sees no GPU here; give cpu, "):
        local.worker_jobs(StubJob(out="", device="all"), ScoreConfig())


def test_a_worker_that_is_killed_is_replaced_on_its_device(job, stub, gate, monkeypatch):
    with_gpus(monkeypatch, 2)
    started: list[tuple[int, str]] = []
    start = local.LocalEngine.start

    def noting(engine, job):
        process = start(engine, job)
        started.append((process.pid, job.device))
        return process

    monkeypatch.setattr(local.LocalEngine, "start", noting)
    killed: list[int] = []

    def kill_one() -> bool:
        if not killed and len(at_work(stub)) == 2:
            killed.append(started[1][0])
            os.kill(killed[0], signal.SIGKILL)
            gate.touch()
        return False

    reports = do(dataclasses.replace(job, device="cuda:0,cuda:1"), shards(6), workers=0, should_stop=kill_one)
    assert sorted(report.index for report in reports) == list(range(6))
    assert [device for _, device in started] == ["cuda:0", "cuda:1", "cuda:1"]
