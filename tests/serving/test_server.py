"""The server around an application that does nothing: connections that would stay, and every way to the end.

Each server is a process; what its clients see is all that counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from tests.serving.client import run
from tests.serving.processes import LIMIT, ROOT, Running, conversation, running

Start = Callable[..., AbstractContextManager[Running]]

GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Return a function that starts a server with options."""

    def begin(**options: object) -> AbstractContextManager[Running]:
        return running(tmp_path / "log", "-m", "tests.serving.stand_in", json.dumps(options))

    return begin


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that waits for headers or a body a second, and for a reader half of one."""
    options = {"header_timeout": 1.0, "body_timeout": 1.0, "_SECONDS_TO_PART": 0.5, "_SECONDS_OF_STALL": 0.5}
    log = tmp_path_factory.mktemp("impatient") / "log"
    with running(log, "-m", "tests.serving.stand_in", json.dumps(options)) as server:
        yield server


class TestConnections:
    def test_slow_headers(self, impatient: Running) -> None:
        """Sockets that say nothing, half of it, or a byte now and then: all are closed, and nobody else waits."""
        count = 20
        refused = impatient.metric('classifier_rejected_total{reason="slow_headers"}')

        async def work() -> list[bytes]:
            slow = [
                asyncio.create_task(conversation(impatient, *spoken))
                for spoken in [(b"",), (b"GET / HT",), (b"GET / HTTP/1.1\r\n", b"x-a: b\r\n")] * count
            ]
            quick = [asyncio.create_task(conversation(impatient, GET)) for _ in range(count)]
            assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in await asyncio.gather(*quick))
            return await asyncio.gather(*slow)

        said = run(work())
        assert Counter(answer.partition(b"\r\n")[0] for answer in said) == {
            b"": count,
            b"HTTP/1.1 408 Request Timeout": 2 * count,
        }
        assert b"application/problem+json" in said[1]
        assert json.loads(said[1].partition(b"\r\n\r\n")[2])["error"]["code"] == "slow_headers"
        assert impatient.metric('classifier_rejected_total{reason="slow_headers"}') == refused + 3 * count

    def test_slow_headers_of_a_later_request(self, impatient: Running) -> None:
        said = run(conversation(impatient, GET + GET, b"GET / HTTP/1.1\r\nx-a: b\r\nx-c: d\r\n", before=2))
        assert said.count(b"HTTP/1.1 200 ") == 2
        assert said.count(b"HTTP/1.1 408 ") == 1

    def test_idle_between_requests(self, impatient: Running) -> None:
        said = run(conversation(impatient, GET, before=1))
        assert said.count(b"HTTP/1.1 ") == 1, "an answer to a request that was never made would be taken for the next"

    def test_the_rest_of_a_body_that_nobody_reads(self, impatient: Running) -> None:
        head = b"POST /unread HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n"
        assert run(conversation(impatient, head, b"{", every=0.05)).startswith(b"HTTP/1.1 413 ")

    def test_a_rest_that_comes_keeps_the_connection(self, impatient: Running) -> None:
        head = b"POST /unread HTTP/1.1\r\nhost: localhost\r\ncontent-length: 300000\r\n\r\n"
        said = run(conversation(impatient, head + bytes(300_000) + GET, before=2))
        assert said.count(b"HTTP/1.1 413 ") == said.count(b"HTTP/1.1 200 ") == 1

    def test_one_who_does_not_read(self, impatient: Running) -> None:
        with socket.create_connection(impatient.address, timeout=LIMIT) as client:
            client.sendall(b"GET /large HTTP/1.1\r\nhost: localhost\r\n\r\n")
            end = time.monotonic() + LIMIT
            while impatient.metric('classifier_rejected_total{reason="slow_reader"}') < 1:
                assert time.monotonic() < end
                time.sleep(0.05)
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while chunk := client.recv(1 << 20):
                    received += len(chunk)
            assert received < 50_000_000

    @pytest.mark.parametrize("pieces", [1, 30])
    def test_long_headers(self, impatient: Running, pieces: int) -> None:
        async def work() -> bytes:
            reader, writer = await asyncio.open_connection(*impatient.address)
            try:
                head = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + b"x-long: " + b"a" * 30_000 + b"\r\n\r\n"
                size = -(-len(head) // pieces)
                for start in range(0, len(head), size):
                    writer.write(head[start : start + size])
                    await writer.drain()
                    await asyncio.sleep(0.001)
                return await asyncio.wait_for(reader.read(), LIMIT)
            finally:
                writer.close()

        said = run(work())
        assert said.startswith(b"HTTP/1.1 431 ")
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"

    @pytest.mark.parametrize(
        "garbage", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"]
    )
    def test_what_is_no_http(self, impatient: Running, garbage: bytes) -> None:
        said = run(conversation(impatient, garbage))
        assert said.startswith(b"HTTP/1.1 400 ")
        content = json.loads(said.partition(b"\r\n\r\n")[2])
        assert content["error"]["code"] == "invalid_http"

    def test_a_body_that_is_no_http(self, impatient: Running) -> None:
        """The application waits for the body; it is told that nothing more will come."""
        head = b"POST /work HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        name = 'classifier_requests_total{code="499",route="/work"}'
        left = impatient.metric(name)
        assert run(conversation(impatient, head + b"no size\r\n")).startswith(b"HTTP/1.1 400 ")
        assert impatient.metric(name) == left + 1

    def test_many_at_once_are_all_answered(self, start: Start) -> None:
        body = b"POST /work HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello"

        async def work(server: Running) -> list[bytes]:
            return await asyncio.gather(*(conversation(server, body) for _ in range(300)))

        with start(header_timeout=60.0) as server:
            said = run(work(server))
        assert all(answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"hello") for answer in said)

    def test_too_many_are_told_so(self, start: Start) -> None:
        with start(_MOST_CONNECTIONS=4, _MOST_REFUSED=6, header_timeout=60.0) as server:
            held = [socket.create_connection(server.address) for _ in range(4)]

            async def work() -> list[bytes]:
                return await asyncio.gather(*(conversation(server, GET) for _ in range(20)))

            said = Counter(answer.partition(b"\r\n")[0] for answer in run(work()))
            assert said.keys() <= {b"", b"HTTP/1.1 503 Service Unavailable"}
            assert said[b"HTTP/1.1 503 Service Unavailable"] >= 6
            for one in held:
                one.close()
            end = time.monotonic() + LIMIT
            while server.get("/livez").status_code == 503:
                assert time.monotonic() < end
            assert server.metric('classifier_rejected_total{reason="too_many_connections"}') >= 20

    @pytest.mark.parametrize(("soft", "hard", "wanted"), [(64, 300, 44), (64, 64, 1), (300, 9999, 4096)])
    def test_the_limit_on_files_bounds_connections(self, soft: int, hard: int, wanted: int) -> None:
        if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
            pytest.skip("this process may not have so many files")
        program = (
            "import resource\n"
            "from qwen_vl_classifier.serving.server import _connections_that_fit\n"
            f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
            "print(_connections_that_fit())"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=LIMIT)
        assert done.stdout == f"{wanted}\n", done.stderr

    def test_few_files_do_not_hang_anybody(self, start: Start) -> None:
        if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 500:
            pytest.skip("this process may not have so many files")
        ask = b"POST /work?seconds=0.2 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"

        async def work(server: Running) -> list[bytes]:
            return await asyncio.gather(*(conversation(server, ask) for _ in range(400)))

        with start(files=300) as server:
            said = Counter(answer.partition(b"\r\n")[0] for answer in run(work(server)))
            assert said.keys() <= {b"", b"HTTP/1.1 200 OK", b"HTTP/1.1 503 Service Unavailable"}
            assert said[b"HTTP/1.1 200 OK"] >= 44
            assert server.get("/livez").status_code == 200
            assert "out of system resource" not in server.log.read_text()


class TestEnd:
    def test_without_requests(self, start: Start) -> None:
        with start() as server:
            server.send(signal.SIGTERM)
            assert server.finish() == 0
            assert server.lines() == []

    def test_an_interrupt(self, start: Start) -> None:
        with start() as server:
            server.send(signal.SIGINT)
            assert server.finish() == 130

    @pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_second_signal_ends_at_once(self, start: Start, second: signal.Signals, status: int) -> None:
        with (
            start(grace=600.0) as server,
            httpx.Client(trust_env=False, timeout=LIMIT) as client,
            client.stream("GET", f"{server.url}/large"),  # whose answer is not read, so there is something to wait for
        ):
            server.send(signal.SIGTERM)
            server.until_refused()
            assert server.process.poll() is None
            server.send(second)
            assert server.finish() == status

    def test_a_request_that_outlasts_the_grace_is_cut_off(self, start: Start) -> None:
        with start(grace=0.5) as server:

            async def work() -> bytes:
                head = b"POST /work?seconds=600 HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n"
                asking = asyncio.create_task(conversation(server, head))
                while not await asyncio.to_thread(server.metric, "accepted"):
                    await asyncio.sleep(0.01)
                server.send(signal.SIGTERM)
                return await asyncio.wait_for(asking, LIMIT)

            run(work())
            assert server.finish() == 1
            assert "cut off" in server.log.read_text()

    def test_a_thread_that_cannot_be_stopped_keeps_nobody(self, start: Start) -> None:
        with start(hang=True) as server:
            server.send(signal.SIGTERM)
            assert server.finish() == 0

    def test_a_failure_is_raised_after_what_was_accepted(self, start: Start) -> None:
        with start() as server:
            assert httpx.post(f"{server.url}/fail", trust_env=False).status_code == 200
            assert server.finish() == 3

    def test_an_application_that_cannot_start(self, start: Start) -> None:
        with start(unstartable=True) as server:
            assert server.finish() == 3
            assert "no room for decoders" in server.log.read_text()

    def test_no_request_is_lost(self, start: Start) -> None:
        for _ in range(2):
            with start() as server:
                terminate_under_load(server)

    @pytest.mark.soak
    def test_no_request_is_lost_in_many_rounds(self, start: Start) -> None:
        for _ in range(20):
            with start() as server:
                terminate_under_load(server)


def terminate_under_load(server: Running) -> None:
    """Send SIGTERM among clients that keep their connections, and others that open one for every request."""
    outcomes: Counter[int | str] = Counter()
    body = bytes(100_000)  # does not fit into one packet: some are in the middle of it

    async def ask(number: int) -> None:
        limits = httpx.Limits(max_keepalive_connections=number % 2)
        async with httpx.AsyncClient(trust_env=False, timeout=LIMIT, limits=limits) as client:
            while True:
                try:
                    response = await client.post(f"{server.url}/work", content=body)
                except httpx.ConnectError:
                    outcomes["refused"] += 1
                    return
                except httpx.TransportError as error:
                    outcomes[repr(error)] += 1
                    return
                outcomes[response.status_code] += 1
                assert response.status_code == 503 or response.content == body

    async def work() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(ask(number))
            while outcomes[200] < 200:
                await asyncio.sleep(0.01)
            server.send(signal.SIGTERM)

    run(work())
    assert server.finish() == 0
    assert outcomes.keys() <= {200, 503, "refused"}, outcomes
    assert outcomes["refused"] == 16
