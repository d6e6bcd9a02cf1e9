"""The Ray engine: two actors on this machine do every shard once, whatever is killed."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config import ScoreConfig
from qwen_vl_classifier.errors import ConfigError, DataError, ScoringError
from qwen_vl_classifier.scoring.parts import Shard
from qwen_vl_classifier.scoring.ray import run_shards
from qwen_vl_classifier.scoring.ray_cluster import Pool, connected
from qwen_vl_classifier.scoring.schedule import MOST_DEATHS
from qwen_vl_classifier.scoring.score import score

ROOT = Path(__file__).resolve().parents[2]
POOL = Pool(workers=2)
ROWS = 8  # of a shard


@dataclass(frozen=True)
class Report:
    """What the driver passes on of a shard; the real one would load torch in every actor."""

    index: int
    errors: int


class Stub:
    """A worker that writes one line for each row, and says who did what."""

    def __init__(
        self, folder: Path, deadly: frozenset[int] = frozenset(), *, slow: float = 0.0, actors: int = 1
    ) -> None:
        self.folder = folder
        self.actors = actors  # that must be loaded before one begins
        self.deadly = deadly
        self.slow = slow

    def note(self, what: str) -> None:
        with (self.folder / "log").open("a") as file:
            file.write(f"{os.getpid()} {what}\n")

    def load(self) -> None:
        self.note("load")

    def look_at(self, shard: Shard, rows: range, blamed) -> list[str]:
        lines = []
        for position in rows:
            row = shard.first_row + position
            if position in blamed:
                lines.append(f"{row} {blamed[position].code}\n")
                continue
            if row in self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            lines.append(f"{row}\n")
        time.sleep(self.slow)
        return lines

    def run_all(self, tasks, *, endless: bool) -> Iterator[Report]:
        for shard, blamed in tasks:
            deadline = time.monotonic() + 100
            while (self.folder / "log").read_text().count("load") < self.actors and time.monotonic() < deadline:
                time.sleep(0.01)
            self.note(f"run {shard.index}")
            lines = self.look_at(shard, range(shard.rows), blamed)
            partial = self.folder / f"partial-{os.getpid()}"
            partial.write_text("".join(lines))
            partial.replace(self.folder / f"shard-{shard.index}")
            yield Report(shard.index, len(blamed))

    def probe(self, shard: Shard, rows: range, blamed=None) -> None:
        self.note(f"probe {shard.index} {rows.start}:{rows.stop}")
        self.look_at(shard, rows, blamed or {})


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    with connected(POOL) as ray:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file
        yield ray
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def shards(count: int) -> list[Shard]:
    return [Shard(index, ROWS * index, ROWS, ()) for index in range(count)]


def do(worker: Stub, todo, should_stop: Callable[[], bool] = lambda: False) -> list[Report]:
    reports: list[Report] = []
    run_shards(worker, todo, POOL, reports.append, should_stop)
    return reports


def log(folder: Path) -> list[tuple[int, str]]:
    lines = [line.split(maxsplit=1) for line in (folder / "log").read_text().splitlines()]
    return [(int(pid), what) for pid, what in lines]


def content(folder: Path) -> list[str]:
    """All lines, in the order of the shards."""
    files = sorted(folder.glob("shard-*"), key=lambda path: int(path.name.split("-")[1]))
    return [line for path in files for line in path.read_text().splitlines()]


def test_two_actors_share_the_shards(ray, tmp_path):
    reports = do(Stub(tmp_path, slow=0.05, actors=2), shards(8))
    assert sorted(report.index for report in reports) == list(range(8))
    assert content(tmp_path) == [str(row) for row in range(8 * ROWS)]
    assert len({pid for pid, what in log(tmp_path) if what.startswith("run")}) == 2


def test_an_actor_that_is_killed_costs_its_shard_only(ray, tmp_path):
    killed: list[int] = []

    def should_stop() -> bool:
        busy = [pid for pid, what in log(tmp_path) if what.startswith("run")] if (tmp_path / "log").exists() else []
        if busy and not killed:
            killed.append(busy[0])
            os.kill(busy[0], signal.SIGKILL)
        return False

    reports = do(Stub(tmp_path, slow=0.3, actors=2), shards(6), should_stop)
    assert sorted(report.index for report in reports) == list(range(6))
    assert content(tmp_path) == [str(row) for row in range(6 * ROWS)]
    assert len(killed) == 1
    runs = [what for _, what in log(tmp_path) if what.startswith("run")]
    # Once more the shard that it was at, and the one before if that was done and not yet told. Or neither: between two.
    assert len(runs) in (6, 7, 8)


def test_a_row_that_kills_its_worker_is_found(ray, tmp_path):
    reports = do(Stub(tmp_path, frozenset({ROWS + 3})), shards(3))
    assert {report.index: report.errors for report in reports} == {0: 0, 1: 1, 2: 0}
    expected = [f"{row} crashed" if row == ROWS + 3 else str(row) for row in range(3 * ROWS)]
    assert content(tmp_path) == expected
    # One more where the first death came before the end of the shard before it was told.
    assert sum(what == "run 1" for _, what in log(tmp_path)) - (MOST_DEATHS + 1) in (0, 1)


def test_workers_that_die_while_loading_end_the_run(ray, tmp_path):
    class Broken(Stub):
        def load(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ScoringError, match=r"^workers do not start: 3 in a row died while they loaded"):
        do(Broken(tmp_path), shards(1))


def test_an_expected_error_arrives_as_it_was_raised(ray, tmp_path):
    class Changed(Stub):
        def run_all(self, tasks, *, endless):
            raise DataError("rows.jsonl has changed since it was planned")

    with pytest.raises(DataError) as caught:
        do(Changed(tmp_path), shards(3))
    assert type(caught.value) is DataError
    assert str(caught.value) == "rows.jsonl has changed since it was planned"


def test_after_a_stop_no_shard_is_begun_and_those_begun_are_kept(ray, tmp_path):
    seen: list[int] = []

    def todo() -> Iterator[Shard]:
        for shard in shards(1000):
            seen.append(shard.index)
            yield shard

    reports = do(Stub(tmp_path, slow=0.05), todo(), lambda: len(content(tmp_path)) >= 4 * ROWS)
    assert 4 <= len(reports) <= 10
    assert len(seen) - len(reports) <= POOL.workers  # what was only read ahead
    assert len(content(tmp_path)) == len(reports) * ROWS


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


def await_end(pids: set[int]) -> None:
    deadline = time.monotonic() + 100
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_actor_is_left(ray, tmp_path):
    do(Stub(tmp_path), shards(2))
    await_end({pid for pid, _ in log(tmp_path)})


DRIVER = """
import os, sys, time
from qwen_vl_classifier.scoring.parts import Shard
from qwen_vl_classifier.scoring.ray import run_shards
from qwen_vl_classifier.scoring.ray_cluster import Pool

class Slow:
    def load(self):
        pass

    def run_all(self, tasks, endless):
        for shard, _ in tasks:
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\\n")
            time.sleep(1000)
            yield shard

path = sys.argv[1]
run_shards(Slow(), (Shard(index, index, 1, ()) for index in range(9)), Pool(2), print, lambda: False)
"""


def test_a_driver_that_is_killed_leaves_no_actor(tmp_path):
    log = tmp_path / "log"
    log.touch()
    command = [sys.executable, "-W", "error", "-c", DRIVER, str(log)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as driver:
        deadline = time.monotonic() + 100
        while len(log.read_text().split()) < 2:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        driver.kill()
        driver.wait()
        await_end({int(pid) for pid in log.read_text().split()})


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


@pytest.mark.parametrize("pictures", [24, pytest.param(400, marks=pytest.mark.soak)])
def test_scores_are_those_of_the_local_engine_bit_by_bit_though_actors_are_killed(
    ray, tmp_path, tiny_classifier, pictures, one_thread
):
    data, classifier = make_data(tmp_path / "data", pictures), tiny_classifier.save(tmp_path / "classifier")
    common = {"shard_size": 6, "threads": 1}
    local = ScoreConfig(**common)  # the same code as in its processes
    expected = score(Classifier.load(classifier, device="cpu"), data, tmp_path / "local", config=local, progress=False)
    killed: set[int] = set()

    def kill_once() -> bool:
        """Kill an actor that computes, once it has begun to write."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if (
                    not killed
                    and process.name().startswith("ray::_Actor")
                    and any((tmp_path / "ray").rglob("*.parquet"))
                ):
                    killed.add(process.pid)
                    process.kill()
        return False

    summary = score(
        classifier,
        data,
        tmp_path / "ray",
        config=ScoreConfig(engine="ray", workers=2, **common),
        device="cpu",
        progress=False,
        should_stop=kill_once,
    )
    assert len(killed) == 1
    assert summary == expected
    assert summary["rows"] == 3 * pictures
    assert 0 < summary["errors"] < summary["rows"]
    assert files(tmp_path / "ray") == files(tmp_path / "local")
