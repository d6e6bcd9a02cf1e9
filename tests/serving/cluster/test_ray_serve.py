"""`serve --engine ray` on a Ray of its own, as a process: real replicas, real requests, real signals."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import trustme

from qwen_vl_classifier import Classifier, Example
from tests.serving.cluster.callers import TEXTS, Callers, body_of
from tests.serving.server_process import ServerProcess, running
from tests.waiting import LIMIT, until

pytestmark = pytest.mark.soak  # Ray takes many seconds to start

IGNORING = ("-W", "ignore::DeprecationWarning")  # Ray Serve itself uses what pydantic deprecates
KEY = "key-that-only-clients-know"
MAIN = "import sys; from qwen_vl_classifier.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> str:
    return str(tiny_classifier.save(tmp_path_factory.mktemp("classifiers") / "claims"))


def command(folder: str, *options: str) -> tuple[str, ...]:
    # Ray Serve itself uses what pydantic deprecates.
    return (
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        MAIN,
        "serve",
        folder,
        "--engine",
        "ray",
        "--port",
        "0",
        "--device",
        "cpu",
        *options,
    )


def replicas(server: ServerProcess) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if process.is_running() and "ServeReplica" in "".join(process.cmdline())
    ]


def until_all_serve(server: ServerProcess) -> None:
    """Return once all replicas are ready: `/readyz` tells of the one that answers."""
    assert server.process.stdout is not None
    assert server.process.stdout.readline().startswith("ready: "), server.log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder: str) -> Iterator[ServerProcess]:
    """Two replicas behind a key, which take few and small requests."""
    logs = tmp_path_factory.mktemp("logs")
    (logs / "key").write_text(KEY)
    limits = ("--max-batch", "2", "--queue-size", "4", "--max-body-bytes", "2000000", "--deadline", str(LIMIT))
    options = ("--replicas", "2", "--api-key-file", str(logs / "key"), *limits)
    with running(logs / "log", *command(folder, *options)) as server:
        until_all_serve(server)
        yield server
        server.send(signal.SIGTERM)
        assert server.finish() == 0, server.log.read_text()


def ask(server: ServerProcess, body: object, **headers: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}", **headers}
    return httpx.post(f"{server.url}/v1/classify", json=body, headers=headers, timeout=LIMIT, trust_env=False)


def test_probabilities_are_those_of_the_classifier(server: ServerProcess, tiny_classifier: Classifier) -> None:
    expected = tiny_classifier.predict_proba([Example(None, text) for text in TEXTS])[:, 1].tolist()
    for _ in range(3):  # by both replicas, sooner or later
        answers = [ask(server, body_of(text)).json()["data"][0]["score"] for text in TEXTS]
        assert answers == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3
    assert len(replicas(server)) == 2


def test_each_replica_tells_metrics_of_its_own(server: ServerProcess) -> None:
    seen: set[str] = set()

    def both() -> bool:
        text = server.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        found = set(re.findall('replica="([^"]+)"', text))
        assert len(found) == 1
        seen.update(found)
        return len(seen) == 2

    until(both, "metrics of both replicas")


def test_access_is_checked_behind_the_proxy(server: ServerProcess) -> None:
    assert ask(server, body_of("x"), Authorization="Bearer wrong").status_code == 401
    assert ask(server, body_of("x"), Host="attacker.example.org").status_code == 421
    assert ask(server, body_of("x"), **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert server.get("/v1/models").status_code == 401
    assert server.get("/livez").json() == {"status": "live"}
    assert server.get("/readyz").json() == {"status": "ready"}
    answer = ask(server, body_of("x"), **{"X-Request-ID": "of-the-client"})
    assert answer.headers.get_list("X-Request-ID") == ["of-the-client"]


def test_overload_is_answered_at_once_with_429(server: ServerProcess) -> None:
    begin = threading.Barrier(60)

    def call(number: int) -> httpx.Response:
        begin.wait(LIMIT)
        return ask(server, body_of(f"{number} " * 300))

    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(call, range(60)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["Retry-After"]) >= 1


def test_a_body_without_end_is_refused_and_not_kept(server: ServerProcess) -> None:
    (proxy,) = (
        process
        for process in psutil.Process(server.process.pid).children(recursive=True)
        if "ProxyActor" in "".join(process.cmdline())
    )
    before = proxy.memory_info().rss
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(400):
            yield b" " * 1_000_000
            sent += 1_000_000

    with httpx.Client(timeout=LIMIT, trust_env=False) as client:
        try:
            answer = client.post(
                f"{server.url}/v1/classify", content=chunks(), headers={"Authorization": f"Bearer {KEY}"}
            )
        except httpx.TransportError:
            assert sent < 400_000_000  # the connection was closed
        else:
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"
    assert proxy.memory_info().rss - before < 100_000_000


def test_others_cannot_call_a_replica_past_the_proxy(server: ServerProcess) -> None:
    """Ray's replicas listen on every address, for pickled calls."""
    ports = {
        connection.laddr.port
        for replica in replicas(server)
        for connection in replica.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip == "::"
    }
    assert len(ports) == 2
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=LIMIT)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


def test_all_else_listens_on_loopback(server: ServerProcess) -> None:
    for process in psutil.Process(server.process.pid).children(recursive=True):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and "ServeReplica" not in "".join(process.cmdline()):
                assert connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1"), process.cmdline()


def test_a_replica_that_hangs_holds_nobody_past_the_deadline_and_is_replaced(tmp_path: Path, folder: str) -> None:
    with running(tmp_path / "log", *command(folder, "--deadline", "5")) as server:
        server.until_ready()
        (stuck,) = replicas(server)
        stuck.suspend()
        answer = httpx.post(f"{server.url}/v1/classify", json=body_of("x"), timeout=LIMIT, trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
        until(lambda: not stuck.is_running() or stuck.status() == psutil.STATUS_ZOMBIE, "the end of the replica")
        server.until_ready()


def test_sigterm_answers_what_was_accepted(tmp_path: Path, folder: str) -> None:
    with running(tmp_path / "log", *command(folder, "--grace", str(LIMIT))) as server:
        server.until_ready()
        callers = Callers(server.url)
        callers.go_on()
        server.send(signal.SIGTERM)
        until(lambda: callers.problems or callers.failures, "a server that takes no more")
        callers.finish()
        assert server.finish() == 0, server.log.read_text()
        assert set(callers.statuses) <= {200, 503}
        assert set(callers.problems) <= {"loading", "draining"}


def test_a_second_signal_ends_it_at_once(tmp_path: Path, folder: str) -> None:
    with running(tmp_path / "log", *command(folder)) as server:
        server.send(signal.SIGTERM)
        server.send(signal.SIGTERM)
        assert server.finish() in (0, 128 + signal.SIGTERM)  # 0 where the first was quicker


def test_a_cluster_that_dies_ends_the_server(tmp_path: Path, folder: str) -> None:
    with running(tmp_path / "log", *command(folder)) as server:
        until_all_serve(server)
        children = psutil.Process(server.process.pid).children(recursive=True)
        os.kill(next(child.pid for child in children if child.name() == "gcs_server"), signal.SIGKILL)
        assert server.finish() == 1
        assert "the Ray cluster on this machine has ended" in server.log.read_text()


def test_a_folder_that_holds_no_classifier_is_named(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    with running(tmp_path / "log", *command(str(tmp_path / "claims"))) as server:
        assert server.finish() == 2
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("qwen-vl-classifier serve: ")
    assert "no classifier.json in it" in last


def test_what_replicas_log_appears(server: ServerProcess) -> None:
    ask(server, body_of("x"), **{"X-Request-ID": "to-be-found"})
    until(lambda: "to-be-found" in server.log.read_text(), "the line of a request")
    line = next(line for line in server.log.read_text().splitlines() if "to-be-found" in line)
    assert json.loads(line[line.index("{") :])["replica"]


def test_every_replica_watches_a_folder(tmp_path: Path, tiny_classifier: Classifier) -> None:
    folder = tmp_path / "watched"
    tiny_classifier.save(folder / "claims")
    other = copy.copy(tiny_classifier)
    other.temperature = 0.2 * tiny_classifier.temperature
    expected = float(other.predict_proba([Example(None, TEXTS[0])])[0, 1])
    options = ("--engine", "ray", "--port", "0", "--device", "cpu", "--replicas", "2", "--watch", str(folder))
    with running(tmp_path / "log", *IGNORING, "-c", MAIN, "serve", *options) as server:
        server.until_ready()

        def score() -> float:
            return float(ask(server, body_of(TEXTS[0])).json()["data"][0]["score"])

        before = score()
        assert abs(before - expected) > 1e-3
        other.save(folder / "claims")
        until(lambda: [score() for _ in range(20)] == [pytest.approx(expected, abs=1e-5)] * 20, "the new version")


def test_replicas_follow_the_load(tmp_path: Path, folder: str) -> None:
    with running(tmp_path / "log", *command(folder, "--replicas", "1:2", "--max-batch", "1")) as server:
        server.until_ready()
        assert len(replicas(server)) == 1
        callers = Callers(server.url, count=12)
        until(lambda: len(replicas(server)) == 2, "a second replica")
        callers.finish()
        assert set(callers.statuses) <= {200, 429}
        assert callers.failures == []


def test_the_proxy_speaks_https(tmp_path: Path, folder: str) -> None:
    authority = trustme.CA()
    pem = tmp_path / "certificate.pem"
    certificate = authority.issue_cert("localhost")
    for blob in (certificate.private_key_pem, *certificate.cert_chain_pems):
        blob.write_to_path(str(pem), append=True)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with running(tmp_path / "log", *command(folder, "--tls-certificate", str(pem))) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        assert url.startswith("https://")

        def ready() -> bool:
            answer = httpx.get(f"{url}/readyz", verify=trusting, timeout=LIMIT, trust_env=False)
            return answer.status_code == 200

        until(ready, "a server that is ready")


def test_a_port_that_is_taken_is_told(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen_vl_classifier.cli.main import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", folder, "--engine", "ray", "--port", str(port)]) == 2
    assert "Address already in use" in capsys.readouterr().err
