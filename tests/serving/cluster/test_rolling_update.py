"""A cluster that goes on between two commands: updates, deaths and failures under load."""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from qwen_vl_classifier import Classifier, Example
from tests.serving.cluster.callers import TEXTS, Callers
from tests.serving.server_process import ROOT
from tests.waiting import LIMIT, until

pytestmark = pytest.mark.soak  # Ray takes many seconds to start

MAIN = "import sys; from qwen_vl_classifier.cli.main import main; sys.exit(main(sys.argv[1:]))"
VERSIONS = ("first", "second")


@dataclass
class Cluster:
    """Ray, as `ray start --head` starts it.

    Attributes:
        head: Its process.
        environment: What others need to reach it.
        address: Where.
        url: Where the service listens, once it is deployed.
    """

    head: subprocess.Popen[bytes]
    environment: dict[str, str]
    address: str
    url: str

    def command(self, *options: str) -> list[str]:
        """Return the command that deploys."""
        port = self.url.rpartition(":")[2]
        where = ("--engine", "ray", "--ray-address", self.address, "--port", port)
        return [sys.executable, "-c", MAIN, "serve", *options, *where, "--device", "cpu", "--deadline", str(LIMIT)]

    def serve(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        return subprocess.run(
            self.command(*options), env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
        )

    def deploy(self, folder: Path, *options: str) -> None:
        """Deploy, and make sure that it worked."""
        done = self.serve(str(folder), *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"loading claims at {self.url}\nready: claims at {self.url}\n"

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of replicas."""
        found = []
        for process in psutil.Process(self.head.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ServeReplica" in "".join(process.cmdline()):
                    found.append(process)
        return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    port, environment = (
        free_port(),
        {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a cluster on loopback
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_worker_niceness": "0",
            "RAY_worker_register_timeout_seconds": "600",
        },
    )
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        options = {
            "port": port,
            "node-ip-address": "127.0.0.1",
            "num-cpus": 8,
            "object-store-memory": 80_000_000,
            "include-dashboard": "false",
            "dashboard-agent-listen-port": 0,
            "temp-dir": folder,
        }
        command = [sys.executable, str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
        with log.open("wb") as file:
            head = subprocess.Popen(
                [*command, *(f"--{name}={value}" for name, value in options.items())],
                env=environment,
                stdout=file,
                stderr=file,
            )
        try:
            until(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None, "a cluster")
            assert head.poll() is None, log.read_text()
            yield Cluster(head, environment, f"127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}")
        finally:
            processes = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes)
            head.wait()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> dict[str, Path]:
    """Two versions of a classifier, which say other things of the same texts."""
    other = copy.copy(tiny_classifier)
    other.temperature = 0.2 * tiny_classifier.temperature
    root = tmp_path_factory.mktemp("versions")
    made = zip(VERSIONS, (tiny_classifier, other), strict=True)
    return {name: Path(classifier.save(root / name / "claims")) for name, classifier in made}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """What each version says of each text."""
    said = {
        name: Classifier.load(folder, device="cpu").predict_proba([Example(None, text) for text in TEXTS])[:, 1]
        for name, folder in folders.items()
    }
    return {name: dict(zip(TEXTS, map(float, scores), strict=True)) for name, scores in said.items()}


def matches(scores: set[float], *allowed: float) -> bool:
    return all(any(score == pytest.approx(one, abs=1e-5) for one in allowed) for score in scores)


def test_an_update_under_load_loses_no_request(cluster, folders, expected) -> None:
    """With a single replica too: it ends once its successor is ready."""
    cluster.deploy(folders["first"])
    callers = Callers(cluster.url)
    callers.go_on()
    cluster.deploy(folders["second"])
    during = {text: set(scores) for text, scores in callers.scores.items()}
    callers.go_on()
    callers.finish()
    assert callers.failures == []
    assert set(callers.statuses) == {200}, callers.problems
    for text in TEXTS:
        both = [expected[version][text] for version in VERSIONS]
        assert abs(both[0] - both[1]) > 1e-3
        assert matches(callers.scores[text], *both)
        assert any(matches({score}, both[0]) for score in during[text])
    after = Callers(cluster.url)
    after.go_on()
    after.finish()
    assert all(matches(after.scores[text], expected["second"][text]) for text in TEXTS)


def test_a_replica_that_is_killed_costs_what_it_was_at_only(cluster, folders, expected) -> None:
    cluster.deploy(folders["first"], "--replicas", "2")
    callers = Callers(cluster.url)
    callers.go_on()
    before = cluster.replicas()
    assert len(before) == 2
    os.kill(before[0].pid, signal.SIGKILL)
    callers.go_on()
    until(lambda: len({one.pid for one in cluster.replicas()} - {before[0].pid}) == 2, "another replica")
    callers.go_on()
    callers.finish()
    assert callers.failures == []
    assert set(callers.statuses) <= {200, 503}
    assert set(callers.problems) <= {"replica_lost"}
    assert callers.statuses[503] <= 4  # a request of each caller
    assert all(matches(callers.scores[text], expected["first"][text]) for text in TEXTS)


def test_an_update_that_cannot_be_loaded_leaves_the_old_version(cluster, folders, expected, tmp_path: Path) -> None:
    cluster.deploy(folders["first"])
    (tmp_path / "claims").mkdir()
    callers = Callers(cluster.url)
    callers.go_on()
    failed = cluster.serve(str(tmp_path / "claims"))
    assert failed.returncode == 2
    assert "no classifier.json in it" in failed.stderr.splitlines()[-1]
    assert failed.stdout == f"loading claims at {cluster.url}\n"
    callers.go_on()
    callers.finish()
    assert set(callers.statuses) == {200}, callers.problems
    assert all(matches(callers.scores[text], expected["first"][text]) for text in TEXTS)


def test_another_address_than_that_of_the_running_proxy_is_told(cluster, folders) -> None:
    cluster.deploy(folders["first"])
    other = Cluster(cluster.head, cluster.environment, cluster.address, f"http://127.0.0.1:{free_port()}")
    failed = other.serve(str(folders["first"]))
    assert failed.returncode == 2
    assert "Ray Serve already runs on this cluster, with port" in failed.stderr


def test_a_signal_ends_the_command_and_not_the_service(cluster, folders) -> None:
    cluster.deploy(folders["first"])
    callers = Callers(cluster.url)
    callers.go_on()
    command = cluster.command(str(folders["second"]))
    with subprocess.Popen(
        command, env=cluster.environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as deploying:
        assert deploying.stdout.readline().startswith(b"loading claims at ")
        deploying.terminate()
        assert deploying.wait(LIMIT) == 128 + signal.SIGTERM
    callers.go_on()
    callers.finish()
    assert callers.failures == []
    assert set(callers.statuses) == {200}, callers.problems


BARE = """
import sys, ray
from ray import serve
ray.init(sys.argv[1])
serve.shutdown()
if sys.argv[2:]:
    port, deadline = sys.argv[2:]
    options = {"host": "127.0.0.1", "port": int(port), "request_timeout_s": float(deadline), "keep_alive_timeout_s": 5}
    serve.start(http_options=options)
"""


def test_a_proxy_without_the_limits_of_this_package_is_told(cluster, folders) -> None:
    def run(*options: str) -> None:
        command = [sys.executable, "-c", BARE, cluster.address, *options]
        subprocess.run(command, env=cluster.environment, check=True, timeout=LIMIT)

    run(cluster.url.rpartition(":")[2], str(LIMIT))
    try:
        failed = cluster.serve(str(folders["first"]))
    finally:
        run()
    assert failed.returncode == 2
    assert "its proxies lack the limits of this package" in failed.stderr.splitlines()[-1]


def test_a_key_that_replicas_do_not_find_is_an_error(cluster, folders) -> None:
    """The variable counts on the machines of the cluster, not on that of the one who deploys."""
    mine = {**cluster.environment, "QWEN_VL_CLASSIFIER_API_KEY": "of-this-machine"}
    failed = Cluster(cluster.head, mine, cluster.address, cluster.url).serve(str(folders["first"]))
    assert failed.returncode == 2
    assert "a replica found no API key" in failed.stderr.splitlines()[-1]
