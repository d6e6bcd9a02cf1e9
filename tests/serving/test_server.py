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
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import psutil
import pytest

from qwen_vl_classifier.serving.connections import MOST_REFUSED
from tests.serving.bare_server import STEP
from tests.serving.server_process import ROOT, ServerProcess, conversation, running
from tests.waiting import LIMIT, run, soon, until

Start = Callable[..., AbstractContextManager[ServerProcess]]

SOMAXCONN = Path("/proc/sys/net/core/somaxconn")

GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Return a function that starts a server with options."""

    def begin(**options: object) -> AbstractContextManager[ServerProcess]:
        return running(tmp_path / "log", "-m", "tests.serving.bare_server", json.dumps(options))

    return begin


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server for tests that leave it as it was."""
    with running(tmp_path_factory.mktemp("server") / "log", "-m", "tests.serving.bare_server", "{}") as server:
        yield server


def step(server: ServerProcess) -> None:
    """Put a server's clock forward, by less than its limits."""
    before = server.metric("steps")
    server.send(signal.SIGUSR1)
    until(lambda: server.metric("steps") == before + 1, "a step of the clock")


def expire(server: ServerProcess) -> None:
    """Put a server's clock forward, by more than its limits."""
    step(server)
    step(server)


def held(server: ServerProcess, phase: str) -> list[int]:
    """Return how many bytes of headers each connection has that waits for something."""
    return [size for waits_for, size, _ in server.get("/connections").json() if waits_for == phase]


async def until_held(server: ServerProcess, phase: str, found: Callable[[list[int]], bool]) -> None:
    """Return when connections that wait for something are as they should be, while the clients of this loop go on."""
    await asyncio.to_thread(until, lambda: found(held(server, phase)), f"connections that wait for {phase}")


class TestConnections:
    def test_slow_headers(self, server: ServerProcess) -> None:
        """Sockets that say nothing, half of it, or a byte now and then: all are closed, and nobody else waits."""
        count = 20
        refused = server.metric('classifier_rejected_total{reason="slow_headers"}')

        async def work() -> list[bytes]:
            begin = b"GET / HTTP/1.1\r\n"
            slow = [
                asyncio.create_task(conversation(server, *spoken))
                for spoken in [(b"",), (b"GET / HT",), (begin, b"x-a: b\r\n")] * count
            ]

            def grown(sizes: list[int], beyond: int) -> bool:
                return sizes.count(0) == sizes.count(8) == sum(size > beyond for size in sizes) == count

            await until_held(server, "headers", lambda sizes: grown(sizes, len(begin)))
            assert (await asyncio.to_thread(server.get, "/livez")).status_code == 200
            await asyncio.to_thread(step, server)
            longest = max(await asyncio.to_thread(held, server, "headers"))
            await until_held(server, "headers", lambda sizes: grown(sizes, longest))
            await asyncio.to_thread(step, server)
            return await asyncio.gather(*slow)

        said = run(work())
        assert Counter(answer.partition(b"\r\n")[0] for answer in said) == {
            b"": count,
            b"HTTP/1.1 408 Request Timeout": 2 * count,
        }
        assert b"application/problem+json" in said[1]
        assert json.loads(said[1].partition(b"\r\n\r\n")[2])["error"]["code"] == "slow_headers"
        assert server.metric('classifier_rejected_total{reason="slow_headers"}') == refused + 3 * count

    def test_slow_headers_of_a_later_request(self, server: ServerProcess) -> None:
        async def work() -> bytes:
            drops = b"GET / HTTP/1.1\r\nx-a: b\r\nx-c: d\r\n"
            speaking = asyncio.create_task(conversation(server, GET + GET, drops, before=2))
            await until_held(server, "headers", any)
            await asyncio.to_thread(expire, server)
            return await speaking

        said = run(work())
        assert said.count(b"HTTP/1.1 200 ") == 2
        assert said.count(b"HTTP/1.1 408 ") == 1

    def test_idle_between_requests(self, server: ServerProcess) -> None:
        async def work() -> bytes:
            async with connected(server) as (reader, writer):
                writer.write(GET)
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                await asyncio.to_thread(expire, server)
                return await reader.read()

        assert run(work()) == b"", "an answer to a request that was never made would be taken for the next"

    def test_the_rest_of_a_body_that_nobody_reads(self, server: ServerProcess) -> None:
        async def work() -> None:
            async with connected(server) as (reader, writer):
                writer.write(b"POST /unread HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n{")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
                await until_held(server, "rest", lambda sizes: len(sizes) == 1)
                await asyncio.to_thread(step, server)
                writer.write(b"{")
                await writer.drain()
                await until_held(server, "rest", lambda sizes: len(sizes) == 1)
                await asyncio.to_thread(step, server)
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""

        run(work())

    def test_a_rest_that_comes_keeps_the_connection(self, server: ServerProcess) -> None:
        async def work() -> list[bytes]:
            async with connected(server) as (reader, writer):
                head = b"POST /unread HTTP/1.1\r\nhost: localhost\r\ncontent-length: 300000\r\n\r\n"
                writer.write(head + bytes(300_000) + GET)
                return [await reader.readuntil(b"\r\n\r\n") for _ in range(2)]

        first, second = run(work())
        assert first.startswith(b"HTTP/1.1 413 ")
        assert second.startswith(b"HTTP/1.1 200 ")

    def test_one_who_does_not_read(self, server: ServerProcess) -> None:
        def stalls() -> int:
            return sum(stalled for _, _, stalled in server.get("/connections").json())

        name = 'classifier_rejected_total{reason="slow_reader"}'
        refused = server.metric(name)
        with socket.create_connection(server.address, timeout=LIMIT) as client:
            client.sendall(b"GET /large HTTP/1.1\r\nhost: localhost\r\n\r\n")
            until(lambda: stalls() == 1, "an answer that waits to be read")
            expire(server)  # from here on, it must read some
            assert server.metric(name) == refused
            expire(server)
            until(lambda: server.metric(name) == refused + 1, "a connection that is given up")
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while chunk := client.recv(1 << 20):
                    received += len(chunk)
            assert received < 50_000_000

    @pytest.mark.parametrize("pieces", [1, 3])
    def test_long_headers(self, server: ServerProcess, pieces: int) -> None:
        async def work() -> bytes:
            async with connected(server) as (reader, writer):
                head = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + b"x-long: " + b"a" * 30_000 + b"\r\n\r\n"
                size = -(-len(head) // pieces)
                writer.write(head[:size])
                if pieces > 1:
                    await until_held(server, "headers", lambda sizes: sizes == [size])
                    writer.write(head[size:])
                return await reader.read()

        said = run(work())
        assert said.startswith(b"HTTP/1.1 431 ")
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"

    @pytest.mark.parametrize(
        "garbage", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"]
    )
    def test_what_is_no_http(self, server: ServerProcess, garbage: bytes) -> None:
        said = run(conversation(server, garbage))
        assert said.startswith(b"HTTP/1.1 400 ")
        content = json.loads(said.partition(b"\r\n\r\n")[2])
        assert content["error"]["code"] == "invalid_http"

    def test_a_body_that_is_no_http(self, server: ServerProcess) -> None:
        """The application waits for the body; it is told that nothing more will come."""
        head = b"POST /work HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        name = 'classifier_requests_total{code="499",route="/work"}'
        left = server.metric(name)
        assert run(conversation(server, head + b"no size\r\n")).startswith(b"HTTP/1.1 400 ")
        until(lambda: server.metric(name) == left + 1, "a request that is over")

    def test_many_at_once_are_all_answered(self, start: Start) -> None:
        body = b"POST /work HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello"

        async def work(server: ServerProcess) -> list[bytes]:
            return await asyncio.gather(*(conversation(server, body) for _ in range(300)))

        with start() as server:
            said = run(work(server))
        assert all(answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"hello") for answer in said)

    def test_too_many_are_told_so(self, start: Start) -> None:
        with start(_MOST_CONNECTIONS=4, MOST_REFUSED=6) as server:
            silent = [socket.create_connection(server.address) for _ in range(4)]

            async def work() -> list[bytes]:
                return await asyncio.gather(*(conversation(server, GET) for _ in range(20)))

            said = Counter(answer.partition(b"\r\n")[0] for answer in run(work()))
            assert said.keys() <= {b"", b"HTTP/1.1 503 Service Unavailable"}
            assert said[b"HTTP/1.1 503 Service Unavailable"] >= 6
            for one in silent:
                one.close()
            until_let_in(server)
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
        """As many as the system lets wait come while the server is busy, so that it sees all of them at once."""
        count, fitting = 400, 44
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < count + 100:
            pytest.skip("this process may not have so many files")
        if not SOMAXCONN.is_file() or int(SOMAXCONN.read_text()) < count:
            pytest.skip("the system lets fewer wait")
        head = b"POST /work HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 1\r\n\r\n"

        async def work(server: ServerProcess) -> Counter[bytes]:
            async with contextlib.AsyncExitStack() as stack:
                server.send(signal.SIGSTOP)
                await soon(lambda: psutil.Process(server.process.pid).status() == psutil.STATUS_STOPPED)
                streams = [await stack.enter_async_context(connected(server)) for _ in range(count)]
                for _, writer in streams:
                    writer.write(head)
                server.send(signal.SIGCONT)
                said = Counter[bytes]()

                async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    answer = b""
                    with contextlib.suppress(ConnectionError):
                        answer = await reader.read()
                    said[answer.partition(b"\r\n")[0]] += 1
                    writer.close()

                async with asyncio.TaskGroup() as group:
                    for stream in streams:
                        group.create_task(listen(*stream))
                    # Those that were let in are asked for their bodies once all others have gone.
                    await soon(lambda: said.total() == count - fitting, "answers to all that are too many")
                    for _, writer in streams:
                        if not writer.is_closing():
                            writer.write(b"x")
                return said

        with start(files=300) as server:
            said = run(work(server))
            assert said.keys() <= {b"", b"HTTP/1.1 200 OK", b"HTTP/1.1 503 Service Unavailable"}
            assert said[b"HTTP/1.1 200 OK"] == fitting
            assert said[b"HTTP/1.1 503 Service Unavailable"] >= MOST_REFUSED
            until_let_in(server)
            assert server.log.read_text().count("out of system resource") == 0


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
            start() as server,
            httpx.Client(trust_env=False, timeout=LIMIT) as client,
            client.stream("GET", f"{server.url}/large"),  # whose answer is not read, so there is something to wait for
        ):
            server.send(signal.SIGTERM)
            server.until_refused()
            assert server.process.poll() is None
            server.send(second)
            assert server.finish() == status

    def test_a_request_that_outlasts_the_grace_is_cut_off(self, start: Start) -> None:
        with start(grace=0.5 * STEP) as server:

            async def work() -> bytes:
                head = b"POST /work?seconds=1e6 HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n"
                asking = asyncio.create_task(conversation(server, head))
                await asyncio.to_thread(until, lambda: server.metric("accepted") == 1)
                server.send(signal.SIGTERM)
                await asyncio.to_thread(server.until_refused)
                server.send(signal.SIGUSR1)
                return await asking

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


@contextlib.asynccontextmanager
async def connected(server: ServerProcess) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection, and close it in the end."""
    reader, writer = await asyncio.open_connection(*server.address)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def until_let_in(server: ServerProcess) -> None:
    """Return when a server has noticed that those who took up its connections have gone."""

    def let_in() -> bool:
        try:
            return server.get("/livez").status_code == 200
        except httpx.TransportError:  # one of those that are dropped without a word
            return False

    until(let_in, "a server that has room")


def terminate_under_load(server: ServerProcess) -> None:
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
            await soon(lambda: outcomes[200] >= 200, "answers")
            server.send(signal.SIGTERM)

    run(work())
    assert server.finish() == 0
    assert outcomes.keys() <= {200, 503, "refused"}, outcomes
    assert outcomes["refused"] == 16
