"""`serve` as a process of its own: a real server on a loopback port that the system chose, real HTTP, real signals."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from qwen_vl_classifier import Classifier, Example
from tests.crash_points import has_ended
from tests.serving.server_process import ServerProcess, conversation, running
from tests.waiting import LIMIT, run, soon, until

KEY = "key-that-only-clients-know"
SECRET = "words-that-stay-between-us"

# No limit that is met by being slow; SIGUSR1 puts the event loop's clock forward, beyond all of them.
PATIENT = f"""
import asyncio, signal, sys, threading
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.serving import batcher, service
from qwen_vl_classifier.serving.http import connections, server
from qwen_vl_classifier.serving.models import registry
from qwen_vl_classifier.serving.models.model_set import ModelSet
server._TRANSIT_SECONDS = server._CLOSE_SECONDS = server._EXIT_SECONDS = {LIMIT}
connections._LINGER_SECONDS = connections._UNREAD_SECONDS = {LIMIT}
steps = []
time = asyncio.BaseEventLoop.time
asyncio.BaseEventLoop.time = lambda loop: time(loop) + {2 * LIMIT} * len(steps)
def step(*_):
    steps.append(1)
    asyncio.get_running_loop().call_soon_threadsafe(int)  # wakes the loop, which nothing else may do
signal.signal(signal.SIGUSR1, step)
"""

MAIN = "sys.exit(main(sys.argv[1:]))"

# Classifiers without a model, which are loaded when the server is told to end: enough for signals.
WITHOUT_MODEL = """
ends = threading.Event()
drain = service.Service.drain
def drain_and_load(self):
    drain(self)
    ends.set()
service.Service.drain = drain_and_load
registry._load = lambda *_: ends.wait() and (ModelSet(), {})
"""

# A defect in the loop that makes batches, which a long text sets off.
WITH_A_DEFECT = """
take = batcher.Batcher._take
def fail(self):
    if any(work.cost > 1000 for work in self.queue.in_order()):
        raise LookupError("a defect of the loop")
    return take(self)
batcher.Batcher._take = fail
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_classifier: Classifier) -> str:
    return str(tiny_classifier.save(tmp_path_factory.mktemp("classifiers") / "claims"))


def command(*arguments: str, program: str = "") -> tuple[str, ...]:
    names = ("header-timeout", "body-timeout", "decode-timeout", "deadline", "grace")
    limits = [word for name in names for word in (f"--{name}", str(LIMIT))]
    return ("-c", PATIENT + program + MAIN, "serve", *arguments, *limits, "--device", "cpu", "--port", "0")


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (60 + number, 80), (20 * number, 0, 255 - 20 * number)).save(stream, "PNG")
    return stream.getvalue()


def body_of(number: int, text: str | None = None) -> dict[str, Any]:
    image = base64.b64encode(picture(number)).decode()
    return {"input": [{"image": image, "text": text or f"claim {number}"}]}


def client_of(server: ServerProcess, key: str | None = KEY) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"} if key else None
    return httpx.Client(base_url=server.url, timeout=LIMIT, trust_env=False, headers=headers)


@pytest.mark.soak
def test_sigterm_under_load(tmp_path: Path, folder: str, tiny_classifier: Classifier) -> None:
    terminate_under_load(tmp_path / "log", folder, tiny_classifier)


@pytest.mark.soak
def test_sigterm_under_load_many_times(tmp_path: Path, folder: str, tiny_classifier: Classifier) -> None:
    for number in range(20):
        terminate_under_load(tmp_path / f"log{number}", folder, tiny_classifier)


def terminate_under_load(log: Path, folder: str, classifier: Classifier) -> None:
    """Send SIGTERM while some requests are half sent, and others are asked one after the other until nobody listens."""
    numbers = range(8)
    expected = classifier.predict_proba([Example(picture(n), f"claim {n}") for n in numbers])[:, 1].tolist()
    assert len(set(expected)) == len(numbers)
    outcomes: Counter[int | str] = Counter()
    held = threading.Semaphore(0)
    terminated = threading.Event()

    def halves(body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        held.release()
        terminated.wait(LIMIT)
        yield body[len(body) // 2 :]

    def check(number: int, response: httpx.Response) -> None:
        assert response.status_code == 200
        assert response.json()["data"][0]["score"] == pytest.approx(expected[number], abs=1e-6)

    def ask_slowly(client: httpx.Client, number: int) -> None:
        body = json.dumps(body_of(number)).encode()
        headers = {"Content-Type": "application/json"}
        check(number, client.post("/v1/classify", content=halves(body), headers=headers))

    def ask_until_refused(server: ServerProcess, seed: int) -> None:
        chosen = random.Random(seed)
        with client_of(server, key=None) as client:
            while True:
                number = chosen.choice(numbers)
                try:
                    response = client.post("/v1/classify", json=body_of(number))
                except httpx.ConnectError:
                    outcomes["refused"] += 1
                    return
                outcomes[response.status_code] += 1
                if response.status_code != 503:
                    check(number, response)

    with (
        running(log, *command(folder, "--max-batch", "4")) as server,
        client_of(server, key=None) as client,
        ThreadPoolExecutor(2 * len(numbers)) as threads,
    ):
        server.until_ready()
        assert server.process.stdout is not None
        assert server.process.stdout.readline() == f"ready: claims at {server.url}\n", "which was 'loading' before"
        slow = [threads.submit(ask_slowly, client, number) for number in numbers]
        quick = [threads.submit(ask_until_refused, server, seed) for seed in numbers]
        try:
            for _ in numbers:
                assert held.acquire(timeout=LIMIT)
            until(lambda: outcomes[200] >= 20 or any(future.done() for future in (*slow, *quick)), "answers")
            assert not any(future.done() for future in (*slow, *quick))
            assert server.metric("classifier_in_flight") >= len(numbers)
            server.send(signal.SIGTERM)
            server.until_refused()
            for future in quick:
                future.result(timeout=LIMIT)
            assert server.process.poll() is None, "it did not wait for those that were half sent"
        finally:
            terminated.set()
        for future in slow:
            future.result(timeout=LIMIT)
        assert server.finish() == 0
        assert {line["level"] for line in server.lines()} == {"info"}
        answered = len(slow) + outcomes[200] + outcomes[503]
        assert re.fullmatch(rf"stopped: answered {answered:,} requests, ran for .+ s\n", server.process.stdout.read())
    assert outcomes["refused"] == len(numbers)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_while_loading(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    with running(tmp_path / "log", *command("claims", "--log-format", "text", program=WITHOUT_MODEL)) as server:
        assert server.get("/readyz").json()["error"]["code"] == "loading"
        server.send(sent)
        assert server.finish() == status
        assert server.process.stdout is not None
        assert server.process.stdout.read().startswith("stopped: answered 0 requests, ran for ")
        last = server.log.read_text().splitlines()[-1]
        assert ("request" in last) if status == 0 else (last == "qwen-vl-classifier serve: interrupted")


def test_a_server_among_strangers_and_defects(tmp_path: Path, folder: str) -> None:
    """One server, since its start is what takes long; its key comes from the environment."""
    environment = {"QWEN_VL_CLASSIFIER_API_KEY": KEY}
    with running(tmp_path / "log", *command(folder, program=WITH_A_DEFECT), environment=environment) as server:
        server.until_ready()
        kill_decoders(server)
        hold_connections(server, 10)
        compare_metrics(server)
        look_for_secrets(server)
        break_the_loop(server)


def break_the_loop(server: ServerProcess) -> None:
    """A loop that makes batches and fails by a defect of its own ends the process, for its supervisor to see."""
    statuses = set()
    with client_of(server) as client, contextlib.suppress(httpx.TransportError):
        for _ in range(10):
            statuses.add(client.post("/v1/classify", json={"input": [{"text": "long " * 1500}]}).status_code)
    assert statuses <= {500, 503}
    assert server.finish() == 1
    *lines, last = server.log.read_text().splitlines()
    assert last.startswith("qwen-vl-classifier serve: the server failed (RuntimeError: batches can no longer be ")
    assert any("a defect of the loop" in json.loads(line).get("exception", "") for line in lines)


@pytest.mark.soak
def test_hundreds_of_slow_sockets_are_closed(tmp_path: Path, folder: str) -> None:
    environment = {"QWEN_VL_CLASSIFIER_API_KEY": KEY}
    with running(tmp_path / "log", *command(folder), environment=environment) as server:
        server.until_ready()
        hold_connections(server, 200)


@contextlib.contextmanager
def late(server: ServerProcess) -> Iterator[None]:
    """Put the server's clock forward again and again; whoever asks meanwhile, and has begun, is late."""
    over = threading.Event()

    def steps() -> None:
        while not over.wait(0.05):
            server.send(signal.SIGUSR1)

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def hold_connections(server: ServerProcess, count: int) -> None:
    """Send headers, or a body, byte after byte on many sockets, all of which are closed once their time is over."""
    head = f"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
    head += "content-type: application/json\r\n"
    body = "content-length: 1000000\r\n\r\n"

    async def work() -> list[bytes]:
        slow = [(head, "x-a: b\r\n")] * count + [(head + body, "[")] * count
        begun: list[int] = []

        async def hold(number: int) -> bytes:
            begin, drops = slow[number]
            said = await conversation(server, begin.encode(), drops.encode(), begun=lambda: begun.append(number))
            return said.partition(b"\r\n")[0]

        tasks = [asyncio.create_task(hold(number)) for number in range(len(slow))]
        await soon(lambda: len(begun) == len(tasks))
        assert not any(task.done() for task in tasks)
        with late(server):
            return await asyncio.gather(*tasks)

    assert set(run(work())) == {b"HTTP/1.1 408 Request Timeout"}


def kill_decoders(server: ServerProcess) -> None:
    """Decoders that are killed while they have no picture cost none."""
    with client_of(server) as client:
        for _ in range(3):
            kill_children(server)
            answers = [client.post("/v1/classify", json=body_of(number)) for number in range(4)]
            assert [answer.status_code for answer in answers] == [200] * 4
            assert not any("error" in answer.json()["data"][0] for answer in answers)


def kill_children(server: ServerProcess) -> None:
    """Kill the processes that a server has started, and wait for their end."""
    children = psutil.Process(server.process.pid).children()
    for child in children:
        child.kill()
    until(lambda: all(has_ended(child.pid) for child in children), "the end of the decoders")


def compare_metrics(server: ServerProcess) -> None:
    """The counters add up to the requests made."""

    def totals() -> Counter[tuple[str, str]]:
        with client_of(server) as client:
            counted: Counter[tuple[str, str]] = Counter()
            for line in client.get("/metrics").text.splitlines():
                if line.startswith("classifier_requests_total{"):
                    name, value = line.split(" ")
                    code, route = name.split('"')[1::2]
                    counted[route, code] = int(float(value))
                elif line.startswith(("classifier_score_count", "classifier_batch_size_sum", "classifier_queue_")):
                    name, value = line.rsplit(" ", 1)
                    counted[name.partition("{")[0], ""] = int(float(value))
            return counted

    before = totals()
    with client_of(server) as client, client_of(server, key=None) as stranger, ThreadPoolExecutor(8) as threads:
        work: list[Any] = []
        for number in range(12):
            work.append(threads.submit(client.post, "/v1/classify", json=body_of(number)))
            work.append(threads.submit(client.post, "/v1/classify", content=b"{"))
            work.append(threads.submit(client.get, f"/nothing/{number}"))
            work.append(threads.submit(client.get, "/v1/models/claims"))
            work.append(threads.submit(stranger.post, "/v1/classify", json=body_of(number)))
            work.append(threads.submit(stranger.get, "/livez"))
        statuses = Counter(future.result().status_code for future in work)

    def all_counted() -> Counter[tuple[str, str]] | None:
        change = totals() - before
        counted = sum(value for (route, code), value in change.items() if code and route != "/metrics")
        return change if counted == len(work) else None

    change = until(all_counted, "requests that are counted")  # which they are once they are over
    assert change is not None
    looks = change[("/metrics", "200")]
    assert looks >= 1, "that of the first look"
    assert change[("/v1/classify", "200")] == 12
    assert change[("/v1/models/{model}", "200")] == 12
    assert change[("/livez", "200")] == 12
    assert change[("unrouted", "401")] == change[("unrouted", "404")] == 12
    requests = Counter[int]()
    for (_, code), value in change.items():
        if code:
            requests[int(code)] += value
    requests[200] -= looks
    assert requests == statuses
    assert change[("classifier_score_count", "")] == change[("classifier_batch_size_sum", "")] == 12
    assert change[("classifier_queue_seconds_count", "")] == 12


def look_for_secrets(server: ServerProcess) -> None:
    """Neither the log nor the metrics, nor what the system shows of processes, tells anything that callers sent."""
    hidden = base64.b64encode(SECRET.encode()).decode()
    nasty: list[dict[str, Any]] = [
        {"json": body_of(1, SECRET)},
        {"json": {"input": [{"image": SECRET, "text": SECRET}]}},
        {"json": {"input": [{"image": hidden, "text": SECRET}]}},
        {"json": {"input": [{"image": f"data:image/png;base64,{hidden}", "text": "a"}]}},
        {"json": {"input": [{"image": f"https://{SECRET}.example/{SECRET}?{SECRET}", "text": "a"}]}},
        {"json": {"input": [{"image": f"/tmp/{SECRET}", "text": "a"}]}},
        {"json": {"input": SECRET, SECRET: SECRET}},
        {"json": {"model": SECRET, "input": [{"text": SECRET}]}},
        {"json": {"input": [{"text": SECRET * 1000}]}},
        {"content": json.dumps({"input": [{"text": f"{SECRET}\ud800"}]}).encode()},
        {"content": SECRET.encode()},
        {"content": SECRET.encode(), "headers": {"Content-Type": SECRET}},
        {"data": {"text": SECRET}, "files": {"image": (SECRET, SECRET.encode(), "image/png")}},
        {"params": {SECRET: SECRET}, "json": {}},
        {"headers": {"Authorization": f"Bearer {SECRET}"}, "json": {}},
        {
            "headers": {"Cookie": SECRET, "X-Request-ID": f"<{SECRET}>", "User-Agent": SECRET, "Host": SECRET},
            "json": {},
        },
    ]
    ids = []
    with client_of(server) as client:
        for request in nasty:
            for path in ("/v1/classify", "/v1/moderations", "/v1/explain", f"/{SECRET}"):
                ids.append(client.post(path, **request).headers["x-request-id"])
        assert client.request(SECRET.upper(), "/v1/classify").status_code == 400
    with socket.create_connection(server.address, timeout=LIMIT) as slow:
        head = f"POST /v1/classify?{SECRET} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
        slow.sendall(f"{head}content-type: application/json\r\ncontent-length: 1000\r\n\r\n{SECRET}".encode())
        with late(server):
            answer = slow.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(server.address, timeout=LIMIT) as garbled:
        garbled.sendall(f"{SECRET}\r\n\r\n".encode())
        assert garbled.recv(65_536).startswith(b"HTTP/1.1 400 ")

    lines = server.lines()
    of_requests = {line["request_id"]: line for line in lines if line["message"] == "request"}
    assert set(ids) <= of_requests.keys()
    assert {"method", "route", "status", "seconds"} <= of_requests[ids[0]].keys()
    assert of_requests[ids[0]]["items"] == 1
    text = server.log.read_text().lower()
    with client_of(server) as client:
        text += client.get("/metrics").text.lower()
    for process in (parent := psutil.Process(server.process.pid), *parent.children()):
        text += " ".join(process.cmdline()).lower()
        if process is not parent:
            text += " ".join(process.environ().values()).lower()
    for word in (SECRET, KEY, hidden[:20], base64.b64encode(picture(1)).decode()[:40], SECRET.encode().hex()):
        assert word.lower() not in text


def test_too_few_files(tmp_path: Path) -> None:
    """One line, before anything is loaded, rather than a server that cannot accept or decode."""
    words = [sys.executable, "-m", "qwen_vl_classifier", "serve", str(tmp_path), "--port", "0"]
    limited = f"ulimit -n 32; exec {shlex.join(words)}"
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "may open 32 files; expected at least 272" in line
    assert "ulimit -n" in line


def test_ipv6(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with running(tmp_path / "log", *command("claims", "--host", "::1", program=WITHOUT_MODEL)) as server:
        assert server.url.startswith("http://[::1]:")
        assert server.get("/livez").status_code == 200
