"""Bodies in chunks that cost more than they hold, targets in every form, and clients that stop sending."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from tests.serving.http.test_server import GET, POST, connected, problem_of, send
from tests.serving.server_process import ServerProcess, conversation, running
from tests.waiting import LIMIT, run, until

CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running(tmp_path_factory.mktemp("server") / "log", "-m", "tests.serving.bare_server", "{}") as server:
        yield server


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


class TestChunks:
    @pytest.mark.parametrize(
        "flood",
        [
            chunk(b"a") * 300_000,
            chunk(b"a" * 100) * 20_000,
            chunk(b"a", b";b=" + b"c" * 1_000) * 2_000,
            b"1;" + b"a" * 2_000_000,
            chunk(b"a") + b"0\r\n" + b"a: b\r\n" * 300_000,
            chunk(b"a") + b"0\r\na: " + b"b" * 2_000_000,
            chunk(b"a" * 100_000) + b"0\r\n" + b"a: b\r\n" * 300_000,
        ],
        ids=["tiny", "small", "extensions", "one extension", "trailers", "one trailer", "trailers of a large body"],
    )
    def test_what_is_mostly_framing_is_refused(self, server: ServerProcess, flood: bytes) -> None:
        name = 'classifier_rejected_total{reason="chunks_too_small"}'
        refused, parsed = server.metric(name), server.metric("parsed")

        async def work() -> bytes:
            async with connected(server) as (reader, writer):
                sending = asyncio.create_task(send(writer, POST + CHUNKED + flood))
                answer = await reader.readuntil(b"}}")
                sending.cancel()
                return answer

        answer = run(work())
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert problem_of(answer)["error"]["code"] == "chunks_too_small"
        assert server.metric(name) == refused + 1
        assert server.metric("parsed") - parsed < 5_000, "the rest was parsed all the same"

    def test_the_application_hears_no_more_of_a_body_that_is_refused(self, server: ServerProcess) -> None:
        left = 'classifier_requests_total{code="499",route="/work"}'
        before = server.metric(left)
        assert b" 413 " in run(conversation(server, POST + CHUNKED + chunk(b"a") * 10_000))
        until(lambda: server.metric(left) == before + 1, "a request that is over")

    @pytest.mark.parametrize(
        ("chunks", "length"),
        [
            (chunk(b"a") * 1_000, 1_000),
            (chunk(b"a" * 256) * 10_000, 2_560_000),
            (chunk(b"a" * 30, b";b=c") * 500, 15_000),
            (chunk(b"a" * 3_000_000), 3_000_000),
        ],
        ids=["few tiny", "small", "extensions", "one"],
    )
    def test_what_clients_send_is_taken(self, server: ServerProcess, chunks: bytes, length: int) -> None:
        answer = run(conversation(server, POST + CHUNKED + chunks + END))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert len(answer.partition(b"\r\n\r\n")[2]) == length

    def test_chunks_that_nobody_reads_are_not_parsed(self, server: ServerProcess) -> None:
        """Whatever comes before the answer, such as 401, is dropped like what comes after it."""
        parsed = server.metric("parsed")
        flood = b"POST /unread HTTP/1.1\r\nhost: localhost\r\n" + CHUNKED + chunk(b"a") * 100_000

        async def work() -> bytes:
            async with connected(server) as (reader, writer):
                sending = asyncio.create_task(send(writer, flood))
                answer = await reader.readuntil(b"\r\n\r\n")
                sending.cancel()
                return answer

        assert run(work()).startswith(b"HTTP/1.1 413 ")
        assert server.metric("parsed") - parsed < 100, "headers alone"

    def test_trailers_are_no_headers(self, server: ServerProcess) -> None:
        head = b"POST /trailers HTTP/1.1\r\nhost: localhost\r\n" + CHUNKED
        answer = run(conversation(server, head + chunk(b"a") + b"0\r\nauthorization: b\r\nhost: c\r\n\r\n"))
        assert problem_of(answer) == {"body": "a", "headers": ["host", "transfer-encoding"]}

    def test_requests_behind_a_body_in_chunks_are_not_parsed(self, server: ServerProcess) -> None:
        """The answer to such a body is the last on its connection."""
        parsed = server.metric("parsed")
        many = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n" * 50_000

        async def work() -> bytes:
            async with connected(server) as (reader, writer):
                sending = asyncio.create_task(send(writer, POST + CHUNKED + chunk(b"hello") + END + many))
                answer = await reader.readuntil(b"hello")
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                sending.cancel()
                return answer

        assert run(work()).count(b"HTTP/1.1 200 ") == 1
        assert server.metric("parsed") - parsed < 1_000


class TestTargets:
    @pytest.mark.parametrize(
        ("target", "host", "expected"),
        [
            (b"http://localhost/host/a%20b?c", b"localhost", {"path": "a b", "query": "c", "hosts": ["localhost"]}),
            (b"http://a.example/host/a", b"localhost", {"path": "a", "query": "", "hosts": ["a.example"]}),
            (b"HTTP://A.example:80/host/a", b"b", {"path": "a", "query": "", "hosts": ["A.example:80"]}),
            (b"https://[::1]:8000/host/", b"b", {"path": "", "query": "", "hosts": ["[::1]:8000"]}),
        ],
    )
    def test_absolute_ones_say_the_host(
        self, server: ServerProcess, target: bytes, host: bytes, expected: dict[str, object]
    ) -> None:
        """What the target says counts, whatever the header says (RFC 9112, section 3.2.2)."""
        request = b"GET %s HTTP/1.1\r\nhost: %s\r\nconnection: close\r\n\r\n" % (target, host)
        assert problem_of(run(conversation(server, request))) == expected

    @pytest.mark.parametrize("target", [b"http://localhost", b"http://localhost?a"])
    def test_those_without_a_path_are_the_root(self, server: ServerProcess, target: bytes) -> None:
        request = b"GET %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n" % target
        assert run(conversation(server, request)).startswith(b"HTTP/1.1 404 ")

    @pytest.mark.parametrize(
        "head",
        [
            b"GET http://localhost/livez HTTP/1.1\r\n",
            b"GET http://localhost/livez HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n",
            b"GET http://user:password@localhost/livez HTTP/1.1\r\nhost: localhost\r\n",
            b"GET ftp://localhost/livez HTTP/1.1\r\nhost: localhost\r\n",
            b"GET http:///livez HTTP/1.1\r\nhost: localhost\r\n",
            b"GET http:/livez HTTP/1.1\r\nhost: localhost\r\n",
            b"GET localhost/livez HTTP/1.1\r\nhost: localhost\r\n",
            b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n",
        ],
    )
    def test_others_are_refused(self, server: ServerProcess, head: bytes) -> None:
        answer = run(conversation(server, head + b"\r\n"))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert problem_of(answer)["error"]["code"] == "invalid_http"


class TestHalfClosed:
    """A client that sends no more, as `nc -N` or Erlang's and Go's proxies do, still reads its answer."""

    @staticmethod
    def ask(server: ServerProcess, request: bytes) -> bytes:
        with socket.create_connection(server.address, timeout=LIMIT) as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            answer = bytearray()
            while part := client.recv(1 << 20):
                answer += part
        return bytes(answer)

    @pytest.mark.parametrize(
        ("request_", "answers"),
        [
            (GET, 1),
            (GET + GET + GET, 3),
            (GET + b"GET /livez HTTP", 1),
            (POST + b"content-length: 5\r\n\r\nhello", 1),
            (POST + b"content-length: 5\r\n\r\nhello" + GET, 2),
            (POST + CHUNKED + chunk(b"hello") + END, 1),
            (POST + b"content-length: 500000\r\n\r\n" + bytes(500_000), 1),
            (b"GET /large HTTP/1.1\r\nhost: localhost\r\n\r\n", 1),
            (b"POST /unread HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\n\r\nabc", 0),
            (b"", 0),
            (b"GET /livez HTTP", 0),
            (POST + b"content-length: 5\r\n\r\nhell", 0),
            (POST + CHUNKED + chunk(b"hello"), 0),
            (POST + CHUNKED + b"5\r\nhe", 0),
        ],
        ids=range(14),
    )
    def test_whole_requests_are_answered_and_the_connection_closed(
        self, server: ServerProcess, request_: bytes, answers: int
    ) -> None:
        assert self.ask(server, request_).count(b"HTTP/1.1 200 ") == answers

    def test_one_that_waits_is_asked_whether_it_still_reads(self, server: ServerProcess) -> None:
        """Without an answer for long, it is sent an interim one, which clients pass over (RFC 9110, 15.2)."""
        slow = b"POST /work?seconds=2 HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\nhello"
        answer = self.ask(server, slow)
        assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
        assert answer.endswith(b"hello")
        old = self.ask(server, slow.replace(b"1.1", b"1.0").replace(b"=2", b"=0.4"))
        assert old.startswith(b"HTTP/1.1 200 "), "HTTP/1.0 has no interim answers"

    def test_one_that_has_gone_is_noticed(self, server: ServerProcess) -> None:
        name = 'classifier_requests_total{code="499",route="/gone"}'
        gone, accepted = server.metric(name), server.metric("accepted")
        with socket.create_connection(server.address, timeout=LIMIT) as client:
            client.sendall(b"POST /gone HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\nhello")
            until(lambda: server.metric("accepted") == accepted + 1)
        until(lambda: server.metric(name) == gone + 1, "a request that is given up")


def test_what_is_no_http_is_a_problem(server: ServerProcess) -> None:
    answer = run(conversation(server, b"\x16\x03\x01\x02\r\n\r\n"))
    assert problem_of(answer)["error"]["code"] == "invalid_http"
    assert b"application/problem+json" in answer
