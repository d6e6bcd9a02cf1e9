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
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trustme

from tests.serving.bare_server import STEP
from tests.serving.server_process import ServerProcess, conversation, running
from tests.waiting import LIMIT, run, soon, until

Start = Callable[..., AbstractContextManager[ServerProcess]]

SOMAXCONN = Path("/proc/sys/net/core/somaxconn")

GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"
POST = b"POST /work HTTP/1.1\r\nhost: localhost\r\n"


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


class TestConnections:
    def test_slow_headers(self, server: ServerProcess) -> None:
        """Sockets that say nothing, half of it, or a byte now and then: all are closed, and nobody else waits."""
        count = 20
        refused = server.metric('classifier_rejected_total{reason="slow_headers"}')

        async def work() -> list[bytes]:
            begun: list[None] = []
            slow = [
                asyncio.create_task(conversation(server, *sent, begun=lambda: begun.append(None)))
                for sent in [(b"",), (b"GET / HT",), (b"GET / HTTP/1.1\r\n", b"x-a: b\r\n")] * count
            ]
            await soon(lambda: len(begun) == len(slow))
            await asyncio.to_thread(step, server)  # requests of its own tell that all before them has arrived
            await asyncio.sleep(0.1)  # for some more bytes
            assert not any(task.done() for task in slow)
            await asyncio.to_thread(step, server)
            return await asyncio.gather(*slow)

        answers = run(work())
        assert Counter(answer.partition(b"\r\n")[0] for answer in answers) == {
            b"": count,
            b"HTTP/1.1 408 Request Timeout": 2 * count,
        }
        assert problem_of(answers[1])["error"]["code"] == "slow_headers"
        assert server.metric('classifier_rejected_total{reason="slow_headers"}') == refused + 3 * count

    def test_slow_headers_of_a_later_request(self, server: ServerProcess) -> None:
        async def work() -> bytes:
            begun = asyncio.Event()
            drops = b"GET / HTTP/1.1\r\nx-a: b\r\nx-c: d\r\n"
            slow = asyncio.create_task(conversation(server, GET + GET, drops, before=2, begun=begun.set))
            await begun.wait()
            await asyncio.to_thread(expire, server)
            return await slow

        answers = run(work())
        assert answers.count(b"HTTP/1.1 200 ") == 2
        assert answers.count(b"HTTP/1.1 408 ") == 1

    def test_idle_between_requests(self, server: ServerProcess) -> None:
        async def work() -> bytes:
            async with connected(server) as (reader, writer):
                writer.write(GET)
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                await asyncio.to_thread(expire, server)
                return await reader.read()

        assert run(work()) == b"", "an answer to a request that was never made would be taken for the next"

    @pytest.mark.parametrize("head", [b"content-length: 10000000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"])
    def test_the_rest_of_a_body_that_nobody_reads(self, server: ServerProcess, head: bytes) -> None:
        """It is dropped for as long as a body may take, so that the client sees the answer; then it is cut off."""

        async def work() -> None:
            async with connected(server) as (reader, writer):
                writer.write(b"POST /unread HTTP/1.1\r\nhost: localhost\r\n" + head)
                answer = await reader.readuntil(b"\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 413 ")
                assert b"connection: close" in answer
                await asyncio.to_thread(step, server)
                writer.write(b"1\r\n{\r\n" * 100_000)  # not parsed
                await writer.drain()
                await asyncio.to_thread(step, server)
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""

        run(work())

    def test_the_rest_of_a_body_is_not_dropped_without_end(self, server: ServerProcess) -> None:
        async def work() -> None:
            async with connected(server) as (reader, writer):
                writer.write(b"POST /unread HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000000\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
                with pytest.raises(ConnectionError):
                    await send_forever(writer)

        run(work())

    def test_a_small_body_that_nobody_reads_keeps_the_connection(self, server: ServerProcess) -> None:
        async def work() -> list[bytes]:
            async with connected(server) as (reader, writer):
                writer.write(b"POST /unread HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\n\r\nabc")
                first = await reader.readuntil(b"\r\n\r\n")
                writer.write(GET)
                return [first, await reader.readuntil(b"\r\n\r\n")]

        first, second = run(work())
        assert first.startswith(b"HTTP/1.1 413 ")
        assert second.startswith(b"HTTP/1.1 200 ")

    def test_one_who_does_not_read(self, server: ServerProcess) -> None:
        name = 'classifier_rejected_total{reason="slow_reader"}'
        refused = server.metric(name)
        with socket.create_connection(server.address, timeout=LIMIT) as client:
            client.sendall(b"GET /large HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert client.recv(1)
            step(server)
            assert server.metric(name) == refused
            step(server)
            until(lambda: server.metric(name) == refused + 1, "a connection that is given up")
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while chunk := client.recv(1 << 20):
                    received += len(chunk)
            assert received < 50_000_000

    @pytest.mark.parametrize("pieces", [1, 3])
    def test_long_headers(self, server: ServerProcess, pieces: int) -> None:
        head = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + b"x-long: " + b"a" * 30_000 + b"\r\n\r\n"
        answer = run(conversation(server, head[:20_000] if pieces > 1 else head))
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert problem_of(answer)["error"]["code"] == "headers_too_large"

    def test_long_headers_behind_a_request(self, server: ServerProcess) -> None:
        """What is sent while a request is answered waits unread, and is held to the same limit afterwards."""
        slow = b"POST /work?seconds=0.2 HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\n"
        long = b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * 10_000_000

        async def work() -> bytes:
            async with connected(server) as (reader, writer):
                writer.write(slow)
                writer.write(b"x")
                sending = asyncio.create_task(send(writer, long))
                answers = await reader.read()
                sending.cancel()
                return answers

        answers = run(work())
        assert answers.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 431 " in answers

    def test_no_part_of_an_answer_waits_for_an_acknowledgement(self, server: ServerProcess) -> None:
        """Clients delay those by 40 ms."""
        delays = server.get("/delays").json()
        assert delays
        assert not any(delays)

    def test_requests_one_after_the_other_on_one_connection(self, server: ServerProcess) -> None:
        """They are answered in their order, wherever packets end."""
        post = b"POST /work HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\nhello"
        last = POST + b"transfer-encoding: chunked\r\n\r\n5\r\nworld\r\n0\r\n\r\n"
        whole = post + b"\r\n" + GET + post + last

        async def ask(cut: int) -> bytes:
            async with connected(server) as (reader, writer):
                for piece in (whole[:cut], whole[cut:]):
                    writer.write(piece)
                    await asyncio.sleep(0.01)
                return await reader.read()

        async def work() -> list[bytes]:
            return await asyncio.gather(*map(ask, range(0, len(whole) + 1, 7)))

        for answers in run(work()):
            assert answers.count(b"HTTP/1.1 200 ") == 4
            assert answers.count(b"hello") == 2
            assert answers.endswith(b"world")

    @pytest.mark.parametrize(
        "garbage",
        [
            b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n",
            b"GET / HTTP/2.0\r\nhost: a\r\n\r\n",
            b"GET /\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\nx: a\r\n b\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\nx : a\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n",
            POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
            POST + b"content-length: +5\r\n\r\nhello",
            POST + b"content-length: 5, 5\r\n\r\nhello",
            POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            POST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
            POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            POST + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
            POST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ],
    )
    def test_what_is_no_http(self, server: ServerProcess, garbage: bytes) -> None:
        """Whatever others might read in another way is refused, and the connection closed."""
        answer = run(conversation(server, garbage))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"connection: close" in answer

    @pytest.mark.parametrize(
        "chunk", [b"no size\r\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"5\r\nhelloXX0\r\n\r\n", b"5\nhello\n"]
    )
    def test_a_body_that_is_no_http(self, server: ServerProcess, chunk: bytes) -> None:
        """The application waits for the body; it is told that nothing more will come."""
        head = b"POST /work HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        name = 'classifier_requests_total{code="499",route="/work"}'
        left = server.metric(name)
        assert run(conversation(server, head + chunk)).startswith(b"HTTP/1.1 400 ")
        until(lambda: server.metric(name) == left + 1, "a request that is over")

    def test_a_target_in_absolute_form(self, server: ServerProcess) -> None:
        request = b"GET http://localhost/echo/a%20b?c HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        assert problem_of(run(conversation(server, request))) == {"path": "a b"}

    def test_a_client_that_waits_to_be_asked_for_the_body(self, server: ServerProcess) -> None:
        async def work() -> list[bytes]:
            async with connected(server) as (reader, writer):
                writer.write(POST + b"expect: 100-continue\r\ncontent-length: 5\r\n\r\n")
                first = await reader.readuntil(b"\r\n\r\n")
                writer.write(b"hello")
                return [first, await reader.readuntil(b"hello")]

        first, second = run(work())
        assert first.startswith(b"HTTP/1.1 100 ")
        assert second.startswith(b"HTTP/1.1 200 ")

    def test_an_upgrade_that_is_not_offered(self, server: ServerProcess) -> None:
        """As Java's client and `curl --http2` ask for it: they are answered in HTTP/1.1."""
        head = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n"

        async def work() -> None:
            async with connected(server) as (reader, writer):
                for _ in range(3):
                    writer.write(head + b"content-length: 5\r\n\r\nhello")
                    assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200 ")

        run(work())

    def test_many_at_once_are_all_answered(self, start: Start) -> None:
        body = b"POST /work HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello"

        async def work(server: ServerProcess) -> list[bytes]:
            return await asyncio.gather(*(conversation(server, body) for _ in range(300)))

        with start() as server:
            answers = run(work(server))
        assert all(answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"hello") for answer in answers)

    def test_too_many_are_told_so(self, start: Start) -> None:
        with start(_MOST_CONNECTIONS=4) as server:
            silent: list[socket.socket] = []
            while len(silent) < 4:  # one that began the server may still count: whoever is told so comes again
                one = socket.create_connection(server.address, timeout=0.5)
                try:
                    one.recv(1)
                    one.close()
                except TimeoutError:
                    silent.append(one)

            async def work() -> list[bytes]:
                return await asyncio.gather(*(conversation(server, b"") for _ in range(20)))

            answers = run(work())
            assert {answer.partition(b"\r\n")[0] for answer in answers} == {b"HTTP/1.1 503 Service Unavailable"}
            assert problem_of(answers[0])["error"]["code"] == "too_many_connections"
            for one in silent:
                one.close()
            until_let_in(server)
            assert server.metric('classifier_rejected_total{reason="too_many_connections"}') >= 20

    def test_few_files_do_not_hang_anybody(self, start: Start) -> None:
        """As many as the system lets wait come while the server is busy, so that it sees all of them at once."""
        count, fitting = 400, 44
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < count + 100:
            pytest.skip("this process may not have so many files")
        if not SOMAXCONN.is_file() or int(SOMAXCONN.read_text()) < count:
            pytest.skip("the system lets fewer wait")

        async def work(server: ServerProcess) -> Counter[bytes]:
            async with contextlib.AsyncExitStack() as stack:
                server.send(signal.SIGSTOP)
                await soon(lambda: psutil.Process(server.process.pid).status() == psutil.STATUS_STOPPED)
                streams = [await stack.enter_async_context(connected(server)) for _ in range(count)]
                server.send(signal.SIGCONT)
                answers = Counter[bytes]()

                async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    answers[(await reader.readuntil(b"\r\n")).strip()] += 1
                    writer.close()

                async with asyncio.TaskGroup() as group:
                    for stream in streams:
                        group.create_task(ask(*stream))
                    await soon(lambda: answers.total() == count - fitting, "answers to all that are too many")
                    for _, writer in streams:
                        if not writer.is_closing():
                            writer.write(GET)
                return answers

        with start(files=300) as server:
            assert run(work(server)) == {
                b"HTTP/1.1 200 OK": fitting,
                b"HTTP/1.1 503 Service Unavailable": count - fitting,
            }
            until_let_in(server)
            assert "could be accepted" not in server.log.read_text()


def test_tls(start: Start, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    with start(tls_certificate=str(tmp_path / "both.pem")) as server:
        with httpx.Client(verify=trusted, trust_env=False, timeout=LIMIT) as client:
            assert client.get(f"{server.url}/livez").status_code == 200
            body = bytes(1_000_000)
            assert client.post(f"{server.url}/work", content=body).content == body
            assert client.post(f"{server.url}/unread", content=body).status_code == 413
        assert run(conversation(server, GET)) == b"", "plain HTTP is not answered"
        server.send(signal.SIGTERM)
        assert server.finish() == 0


class TestEnd:
    def test_without_requests(self, start: Start) -> None:
        with start() as server:
            server.send(signal.SIGTERM)
            assert server.finish() == 0
            assert server.lines() == []

    def test_a_terminal_that_is_closed(self, start: Start) -> None:
        with start() as server:
            server.send(signal.SIGHUP)
            assert server.finish() == 0

    def test_a_server_under_nohup_outlasts_its_terminal(self, tmp_path: Path) -> None:
        program = "import runpy, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv[0] = 'server'; "
        program += "runpy.run_module('tests.serving.bare_server', run_name='__main__')"
        with running(tmp_path / "log", "-c", program, "{}") as server:
            server.send(signal.SIGHUP)
            for _ in range(3):  # the loop has handled what came before
                assert server.get("/livez").status_code == 200
            server.send(signal.SIGTERM)
            assert server.finish() == 0

    def test_an_interrupt(self, start: Start) -> None:
        with start() as server:
            server.send(signal.SIGINT)
            assert server.finish() == 130

    @pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
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


def problem_of(answer: bytes) -> dict[str, Any]:
    """Return the JSON of an answer."""
    content: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return content


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send as fast as the server reads."""
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        await writer.drain()


async def send_forever(writer: asyncio.StreamWriter) -> None:
    """Send as long as the server does not cut the connection off."""
    while True:
        writer.write(bytes(1_000_000))
        await writer.drain()


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
