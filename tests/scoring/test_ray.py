"""The Ray engine: two actors on this machine do every shard once, whatever is killed."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.errors import ConfigError, DataError, ScoringError
from qwen_vl_classifier.scoring import ray as engine
from qwen_vl_classifier.scoring import run
from qwen_vl_classifier.scoring.driver import STALL_TIMEOUT, Driver
from qwen_vl_classifier.scoring.jobs import Pulse, Shard, ShardReport, Task
from qwen_vl_classifier.scoring.ray import Pool, RayEngine, connected
from qwen_vl_classifier.scoring.run import score
from qwen_vl_classifier.scoring.schedule import MOST_DEATHS
from qwen_vl_classifier.scoring.workers import ScoreJob, ScoreWorker
from tests import crash_points, waiting
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
POOL = Pool(workers=2)
ROWS = 8  # of a shard


class Stub:
    """A job and its worker, which writes one line for each row, and says who did what.

    Args:
        folder: Where it writes.
        deadly: Rows that end its process.
        gated: Whether every shard waits for a file, once it is begun.
        halt: Moment, target and barrier at which it stops (see `tests/crash_points.py`).
    """

    def __init__(
        self,
        folder: Path,
        deadly: frozenset[int] = frozenset(),
        *,
        gated: bool = False,
        halt: tuple[str, str, Path] | None = None,
    ) -> None:
        self.folder = folder
        self.deadly = deadly
        self.gated = gated
        self.pulse = Pulse()
        self.halt = halt

    def worker(self) -> Stub:
        return self

    def note(self, what: str) -> None:
        with (self.folder / "log").open("a") as file:
            file.write(f"{os.getpid()} {what}\n")

    def load(self) -> None:
        if self.halt:
            crash_points.halt(*self.halt)

    def compute(self, task: Task, rows: range) -> list[str]:
        lines = []
        for position in rows:
            row = task.shard.first_row + position
            if position in task.excluded:
                lines.append(f"{row} {task.excluded[position].code}\n")
                continue
            if row in self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            lines.append(f"{row}\n")
        return lines

    def run_all(self, tasks: Iterable[Task], *, endless: bool) -> Iterator[ShardReport]:
        for task in tasks:
            shard = task.shard
            self.note(f"run {shard.index}")
            if self.gated:
                until((self.folder / "gate").exists, "the gate to open")
            lines = self.compute(task, range(shard.rows))
            partial = self.folder / f".shard-{shard.index}.{os.getpid()}.partial"
            with partial.open("wb") as file:
                file.write("".join(lines).encode())
            partial.replace(self.folder / f"shard-{shard.index}")
            yield ShardReport(shard.index, shard.rows, len(task.excluded))

    def probe(self, task: Task) -> None:
        self.note(f"probe {task.shard.index} {task.probe.start}:{task.probe.stop}")
        self.compute(task, task.probe)

    def remove_partial_files(self, shards: Iterable[Shard]) -> None:
        for shard in shards:
            for path in self.folder.glob(f".shard-{shard.index}.*.partial"):
                path.unlink()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch) -> None:
    """Look often at what the tests wait for between two answers."""
    monkeypatch.setattr(engine, "_TICK", 0.02)


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder for what a cluster leaves that nobody ends: it holds sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    modules = [sys.modules[__name__], crash_points, waiting]  # workers need not find these files
    with connected(POOL) as ray:
        for module in modules:
            ray.cloudpickle.register_pickle_by_value(module)
        yield ray
        for module in modules:
            ray.cloudpickle.unregister_pickle_by_value(module)


def shards(count: int) -> list[Shard]:
    return [Shard(index, ROWS * index, ROWS, ()) for index in range(count)]


def do(
    ray,
    job: Stub,
    todo: Iterable[Shard],
    should_stop: Callable[[], bool] = lambda: False,
    pool: Pool = POOL,
    stall_timeout: float = STALL_TIMEOUT,
) -> list[ShardReport]:
    reports: list[ShardReport] = []
    with contextlib.closing(RayEngine(ray, pool)) as engine:
        Driver(engine, [job] * pool.workers, todo, reports.append, should_stop, stall_timeout).run()
    return reports


def log(folder: Path) -> list[tuple[int, str]]:
    """Who did what: process id, and what."""
    path = folder / "log"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line.split(maxsplit=1) for line in lines if line.endswith("\n")]
    return [(int(pid), what.strip()) for pid, what in whole]


def at_work(folder: Path) -> list[int]:
    """The actors that have begun a shard, in the order in which they did."""
    return list(dict.fromkeys(pid for pid, what in log(folder) if what.startswith("run")))


def row_numbers(index: int) -> range:
    return range(ROWS * index, ROWS * (index + 1))


def content(folder: Path) -> list[str]:
    """All lines, in the order of the shards."""
    files = sorted(folder.glob("shard-*"), key=lambda path: int(path.name.split("-")[1]))
    return [line for path in files for line in path.read_text().splitlines()]


def test_two_actors_share_the_shards(ray, tmp_path):
    def open_once_both_are_at_work() -> bool:
        if len(at_work(tmp_path)) == 2:
            # Beside programs that compute, actors of a lower priority would hardly begin.
            assert {psutil.Process(pid).nice() for pid in at_work(tmp_path)} == {psutil.Process().nice()}
            (tmp_path / "gate").touch()
        return False

    reports = do(ray, Stub(tmp_path, gated=True), shards(8), open_once_both_are_at_work)
    assert sorted(report.index for report in reports) == list(range(8))
    assert content(tmp_path) == [str(row) for row in range(8 * ROWS)]
    assert len(at_work(tmp_path)) == 2


@pytest.mark.parametrize(
    "moment",
    [
        *("in the middle", "after the rename"),
        *(pytest.param(moment, marks=pytest.mark.soak) for moment in ("before the first byte", "before the rename")),
    ],
)
def test_an_actor_that_is_killed_costs_its_shard_only(ray, tmp_path, moment):
    barrier = tmp_path / "barrier"
    killed: list[int] = []

    def kill_one() -> bool:
        if not killed and barrier.exists():
            killed.append(crash_points.kill_at(barrier))
        return False

    reports = do(ray, Stub(tmp_path, halt=(moment, "shard-3", barrier)), shards(6), kill_one)
    assert len(killed) == 1
    assert sorted(report.index for report in reports) == list(range(6))
    assert content(tmp_path) == [str(row) for row in range(6 * ROWS)]
    runs = sorted(what for _, what in log(tmp_path) if what.startswith("run"))
    # Once more the shard that it was at, and the one before if that was done and not yet told.
    assert set(runs) == {f"run {index}" for index in range(6)}
    assert runs.count("run 3") == 2
    assert len(runs) in (7, 8)
    assert list(tmp_path.glob("*.partial")) == []


def test_a_row_that_kills_its_worker_is_found(ray, tmp_path):
    pairs = [Shard(index, 2 * index, 2, ()) for index in range(3)]
    reports = do(ray, Stub(tmp_path, frozenset({3})), pairs)
    assert {report.index: report.errors for report in reports} == {0: 0, 1: 1, 2: 0}
    expected = [f"{row} crashed" if row == 3 else str(row) for row in range(6)]
    assert content(tmp_path) == expected
    # One more where the first death came before the end of the shard before it was told.
    assert sum(what == "run 1" for _, what in log(tmp_path)) - (MOST_DEATHS + 1) in (0, 1)


def test_tasks_are_done_in_the_order_in_which_they_were_given(ray, tmp_path):
    """Else the death of a worker would be blamed on another task, and a shard could be taken for done."""
    engine = RayEngine(ray, POOL)
    actor = engine.start(Stub(tmp_path))
    for shard in shards(20):
        engine.give(actor, Task(shard))
    done: list[int] = []
    while len(done) < 20:
        done += [answer["report"]["index"] for _, answer in engine.answers() if "report" in answer]
    engine.stop([actor])
    assert done == list(range(20))
    assert [what for _, what in log(tmp_path)] == [f"run {index}" for index in range(20)]


def test_workers_that_die_while_loading_end_the_run(ray, tmp_path):
    class Broken(Stub):
        def load(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ScoringError, match=r"^workers do not start: 3 in a row died while they loaded"):
        do(ray, Broken(tmp_path), shards(1))


def test_an_expected_error_arrives_as_it_was_raised(ray, tmp_path):
    class Changed(Stub):
        def run_all(self, tasks, *, endless):
            raise DataError("rows.jsonl has changed since it was planned")

    with pytest.raises(DataError) as caught:
        do(ray, Changed(tmp_path), shards(3))
    assert type(caught.value) is DataError
    assert str(caught.value) == "rows.jsonl has changed since it was planned"


def test_after_a_stop_no_shard_is_begun_and_those_begun_are_kept(ray, tmp_path):
    def open_once_both_are_at_work() -> bool:
        if len(at_work(tmp_path)) == 2:
            (tmp_path / "gate").touch()
        return (tmp_path / "gate").exists()

    reports = do(ray, Stub(tmp_path, gated=True), shards(1000), open_once_both_are_at_work)
    assert len(reports) == 2
    # What an actor was at when its report came may be there too, but never in part.
    assert {line for report in reports for line in map(str, row_numbers(report.index))} <= {*content(tmp_path)}
    assert len(content(tmp_path)) in (2 * ROWS, 3 * ROWS, 4 * ROWS)
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.soak
def test_an_actor_that_is_stopped_is_replaced(ray, tmp_path, monkeypatch):
    """By one that does its shard, and it is ended though it hears nothing of what Ray tells it."""
    seconds = [0.0]
    monkeypatch.setattr("qwen_vl_classifier.scoring.driver.time", SimpleNamespace(monotonic=lambda: seconds[0]))
    stopped: list[int] = []

    def stop_one() -> bool:
        if not stopped and len(at_work(tmp_path)) == 2:
            stopped.append(at_work(tmp_path)[0])
            os.kill(stopped[0], signal.SIGSTOP)
            (tmp_path / "gate").touch()
        if stopped and not crash_points.has_ended(stopped[0]):
            seconds[0] += 5
        return False

    reports = do(ray, Stub(tmp_path, gated=True), shards(6), stop_one, stall_timeout=10)
    assert sorted(report.index for report in reports) == list(range(6))
    assert content(tmp_path) == [str(row) for row in range(6 * ROWS)]
    assert crash_points.has_ended(stopped[0])


def test_a_full_object_store_is_in_nobodys_way(ray, tmp_path):
    held = [ray.put(np.zeros(10_000_000, dtype=np.uint8)) for _ in range(12)]  # of 80 MB; the rest is on disk
    assert len(do(ray, Stub(tmp_path), shards(6))) == 6
    assert content(tmp_path) == [str(row) for row in range(6 * ROWS)]
    assert len(held) == 12


def test_no_place_for_any_actor_is_logged(ray, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(engine, "PATIENCE", 0.0)
    assert do(ray, Stub(tmp_path), shards(2), lambda: "has been placed" in caplog.text, Pool(2, cpus=64)) == []
    assert "each asks for 64 CPUs and 0 GPUs, the cluster has 2 and 0; waiting" in caplog.text


def test_a_cluster_of_its_own_listens_on_loopback_only(ray):
    listening = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # actors of the test before are about to end
            listening += [
                ipaddress.ip_address(connection.laddr.ip)
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
    assert listening
    assert all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address in listening)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("ray://127.0.0.1:1", ".*"),
        ("cluster", "it is not HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_told_at_once(address, why):
    with (
        pytest.raises(ConfigError, match=f"^ray_address '{address}': no cluster can be reached there \\(({why})"),
        connected(Pool(1, address)),
    ):
        pass


def test_no_actor_is_left(ray, tmp_path):
    do(ray, Stub(tmp_path), shards(2))
    assert not any(psutil.pid_exists(pid) for pid in at_work(tmp_path))


DRIVER = """
import os, sys, threading
from qwen_vl_classifier.scoring.driver import Driver
from qwen_vl_classifier.scoring.jobs import Pulse, Shard
from qwen_vl_classifier.scoring.ray import Pool, RayEngine, connected

class Slow:
    pulse = Pulse()

    def worker(self):
        return self

    def load(self):
        pass

    def run_all(self, tasks, endless):
        for task in tasks:
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\\n")
            threading.Event().wait()  # until it is killed

path, pool = sys.argv[1], Pool(2)
with connected(pool) as ray:
    shards = (Shard(index, index, 1, ()) for index in range(9))
    Driver(RayEngine(ray, pool), [Slow()] * 2, shards, print, lambda: False).run()
"""


@pytest.mark.soak
def test_a_driver_that_is_killed_leaves_no_actor(tmp_path, short_folder):
    log = tmp_path / "log"
    log.touch()
    command = [sys.executable, "-W", "error", "-c", DRIVER, str(log)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": short_folder}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as driver:
        until(lambda: len(log.read_text().split()) == 2 or driver.poll() is not None, "two actors at work")
        assert driver.poll() is None, driver.stderr.read()
        driver.kill()
        driver.wait()
        pids = [int(pid) for pid in log.read_text().split()]
        until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the end of all actors")


@pytest.mark.soak
@pytest.mark.parametrize(("process", "what"), [("gcs_server", "head"), ("raylet", "node")])
def test_a_cluster_that_is_gone_ends_the_run_in_one_line(tmp_path, short_folder, process, what):
    """Ray itself would wait for ever, or end the process without a word."""
    log = tmp_path / "log"
    log.touch()
    command = [sys.executable, "-c", DRIVER, str(log)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": short_folder}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as driver:
        until(lambda: len(log.read_text().split()) == 2 or driver.poll() is not None, "two actors at work")
        cluster = psutil.Process(driver.pid).children(recursive=True)
        next(one for one in cluster if one.name() == process).kill()
        _, told = driver.communicate()
    assert driver.returncode == 1
    assert re.search(rf"ScoringError: the Ray cluster is gone: its {what} at 127.0.0.1:\d+ does not answer", told)
    _, alive = psutil.wait_procs(cluster, timeout=waiting.LIMIT)
    assert alive == []


def make_data(folder: Path, pictures: int) -> Path:
    """Write three rows about each picture; every fifth picture is damaged, every seventh missing."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(pictures):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (56 + 28 * (number % 3), 84, 3), dtype=np.uint8)).save(path)
        if number % 5 == 4:
            path.write_bytes(path.read_bytes()[:60])
        if number % 7 == 6:
            path.unlink()
        rows += [{"image": path.name, "text": f"Text {text} about it."} for text in range(3)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(out: Path) -> dict[str, bytes]:
    """Return all but the lock, which names the process that held it last."""
    found = (path for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@dataclass(frozen=True, kw_only=True)
class HaltingJob(ScoreJob):
    """A job whose workers stop while they write a shard."""

    halt: tuple[str, str, Path]

    def worker(self) -> ScoreWorker:
        worker = ScoreWorker(self)
        load = worker.load

        def load_and_halt() -> None:
            crash_points.halt(*self.halt)
            worker.load = load
            load()

        worker.load = load_and_halt
        return worker


@pytest.mark.parametrize(("pictures", "workers"), [(12, 1), pytest.param(400, 2, marks=pytest.mark.soak)])
def test_scores_are_those_of_the_local_engine_bit_by_bit_though_actors_are_killed(
    ray, tmp_path, tiny_classifier, pictures, workers, one_thread, monkeypatch
):
    data, classifier = make_data(tmp_path / "data", pictures), tiny_classifier.save(tmp_path / "classifier")
    common = {"shard_size": 6, "threads": 1, "token_budget": 4096}  # by itself it follows free memory
    local = ScoreConfig(**common)  # the same code as in its processes
    expected = score(Classifier.load(classifier, device="cpu"), data, tmp_path / "local", config=local, progress=False)
    barrier = tmp_path / "barrier"
    killed: list[int] = []

    def kill_once() -> bool:
        if not killed and barrier.exists():
            killed.append(crash_points.kill_at(barrier))
        return False

    halt = ("in the middle", "000002.parquet", barrier)
    monkeypatch.setattr(run, "ScoreJob", functools.partial(HaltingJob, halt=halt))
    summary = score(
        classifier,
        data,
        tmp_path / "ray",
        config=ScoreConfig(engine="ray", workers=workers, **common),
        device="cpu",
        progress=False,
        should_stop=kill_once,
    )
    assert len(killed) == 1
    assert summary == expected
    assert summary["rows"] == 3 * pictures
    assert 0 < summary["errors"] < summary["rows"]
    assert files(tmp_path / "ray") == files(tmp_path / "local")
