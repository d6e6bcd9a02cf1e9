"""Pictures by URL: only from named hosts, only over checked addresses, within bounds, and nothing is repeated."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_vl_classifier.errors import ConfigError, ImageError
from qwen_vl_classifier.images import fetching
from qwen_vl_classifier.images.fetching import Fetcher
from tests.images.hosts import Host, body, listening
from tests.waiting import LIMIT

CONTENT = b"what is here is not looked at"


def on_loopback(host: Host, name: str = "img.example", *, timeout: float = LIMIT, **options: Any) -> Fetcher:
    """Return a fetcher for which a name is that of a host on loopback."""
    return Fetcher(
        [f"{name}:{host.port}"],
        timeout=timeout,
        resolve=lambda *_: ["127.0.0.1"],
        allow=lambda address: address == "127.0.0.1",
        **options,
    )


def refusal(fetcher: Fetcher, url: str) -> ImageError:
    with pytest.raises(ImageError) as caught:
        fetcher.fetch(url)
    message = str(caught.value)
    assert "\n" not in message
    for secret in ("example", "127.0", "169.254", "http:", "cret", "10.0"):
        assert secret not in message
    assert caught.value.__cause__ is None
    return caught.value


class TestFetched:
    @pytest.mark.parametrize(
        ("path", "sent"),
        [
            ("", "/"),
            ("/", "/"),
            ("/a/b.png?x=1&y=%2F", "/a/b.png?x=1&y=%2F"),
            ("?q=/", "/?q=/"),
            ("/a.png#part", "/a.png"),
            ("/\u00fc.png", "/%C3%BC.png"),
            ('/"<>^`{|}.png', "/%22%3C%3E%5E%60%7B%7C%7D.png"),
            ("//other.example/", "//other.example/"),
            ("/http://other.example/", "/http://other.example/"),
            ("/@other.example/", "/@other.example/"),
            ("/a/../b", "/a/../b"),
        ],
    )
    def test_what_is_sent(self, path: str, sent: str) -> None:
        with listening(body(CONTENT)) as host:
            assert on_loopback(host).fetch(f"HTTP://IMG.example:{host.port}{path}") == CONTENT
        (request,) = host.requests
        lines = request.split("\r\n")
        assert lines[0] == f"GET {sent} HTTP/1.1"
        names = {line.split(":")[0].lower() for line in lines[1:] if line}
        assert names == {"host", "accept", "accept-encoding", "user-agent", "connection"}
        assert f"Host: img.example:{host.port}" in lines
        assert "Accept-Encoding: identity" in lines

    def test_the_content_type_is_not_believed(self) -> None:
        with listening(body(CONTENT, "Content-Type: text/html")) as host:
            assert on_loopback(host).fetch(f"http://img.example:{host.port}/") == CONTENT

    def test_chunks(self) -> None:
        chunks = b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n"
        with listening(body(chunks, "Transfer-Encoding: chunked")) as host:
            assert on_loopback(host).fetch(f"http://img.example:{host.port}/") == b"abcde"

    def test_names_below_a_named_one_and_names_of_other_scripts(self) -> None:
        with listening(body(CONTENT)) as host:
            for name, url in [
                (".example", "a.b.example"),
                ("b\u00fccher.example", "xn--bcher-kva.example"),
                ("xn--bcher-kva.example", "b\u00fccher.example"),
            ]:
                assert on_loopback(host, name).fetch(f"http://{url}:{host.port}/") == CONTENT

    def test_many_at_one_time_get_their_own(self) -> None:
        def echo(connection: socket.socket, request: str) -> None:
            body(request.split()[1][1:].encode() * 10_000)(connection, request)

        with listening(echo) as host, ThreadPoolExecutor(16) as threads:
            fetcher = on_loopback(host)
            urls = [f"http://img.example:{host.port}/{number}" for number in range(16)]
            assert list(threads.map(fetcher.fetch, urls)) == [b"%d" % number * 10_000 for number in range(16)]

    def test_the_next_address_is_tried_where_one_does_not_answer(self) -> None:
        with listening(body(CONTENT)) as host:
            fetcher = Fetcher(
                [f"img.example:{host.port}"],
                timeout=LIMIT,
                resolve=lambda *_: ["127.0.0.2", "127.0.0.1"],
                allow=lambda _: True,
            )
            assert fetcher.fetch(f"http://img.example:{host.port}/") == CONTENT

    def test_proxies_of_the_environment_are_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy", raising=False)
        with listening(body(CONTENT)) as host:
            assert on_loopback(host).fetch(f"http://img.example:{host.port}/") == CONTENT


class TestNames:
    @pytest.mark.parametrize(
        "entry",
        [
            *("", ".", "*", "*.example", "http://img.example", "img.example/", "img..example", "img.example:0"),
            *("img.example:65536", "img.example:x", "user@img.example", "[::1]", "a b", "-a.example", "a" * 64),
            "a_b.example",
        ],
    )
    def test_an_entry_that_is_no_host(self, entry: str) -> None:
        with pytest.raises(ConfigError, match="is not a host"):
            Fetcher([entry])

    def test_ports(self) -> None:
        requested: list[int] = []

        def resolve(_: str, port: int) -> Sequence[str]:
            requested.append(port)
            return []

        fetcher = Fetcher(["a.example", "b.example:8443", ".c.example:81"], timeout=LIMIT, resolve=resolve)
        for url in [
            *("http://a.example/", "http://a.example:80/", "https://a.example/", "https://a.example:443/"),
            *("http://b.example:8443/", "https://b.example:8443/", "http://x.c.example:81/"),
        ]:
            assert refusal(fetcher, url).code == "image_missing"
        assert requested == [80, 80, 443, 443, 8443, 8443, 81]
        for url in [
            *("http://a.example:443/", "https://a.example:80/", "http://a.example:8443/", "http://b.example/"),
            *("https://b.example:443/", "http://x.c.example/", "http://c.example:81/", "http://x.a.example/"),
        ]:
            assert refusal(fetcher, url).code == "image_refused"
        assert len(requested) == 7


class TestAddresses:
    @pytest.mark.parametrize(
        "addresses",
        [
            *(["127.0.0.1"], ["10.0.0.8"], ["169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"], ["fd00:ec2::254"]),
            *(["0.0.0.0"], ["100.100.100.200"], ["64:ff9b::7f00:1"], ["2002:7f00:1::"], ["224.0.0.1"], ["fe80::1%lo"]),
            *(["93.184.216.34", "127.0.0.1"], ["127.0.0.1", "93.184.216.34"], ["2606:4700::1", "::1"], ["nonsense"]),
        ],
    )
    def test_one_that_is_not_public_is_enough(self, addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "create_connection", no_connection)
        fetcher = Fetcher(["img.example"], timeout=LIMIT, resolve=lambda *_: addresses)
        assert refusal(fetcher, "http://img.example/").code == "image_refused"

    def test_a_name_is_looked_up_once_and_the_checked_address_is_connected_to(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = [["93.184.216.34"], ["127.0.0.1"]]
        connected: list[tuple[str, int]] = []

        def connect(address: tuple[str, int], *_: Any, **__: Any) -> socket.socket:
            connected.append(address)
            raise ConnectionRefusedError

        monkeypatch.setattr(socket, "create_connection", connect)
        fetcher = Fetcher(["img.example"], timeout=LIMIT, resolve=lambda *_: answers.pop(0))
        assert refusal(fetcher, "http://img.example/").code == "image_missing"
        assert connected == [("93.184.216.34", 80)]
        assert refusal(fetcher, "http://img.example/").code == "image_refused"
        assert len(connected) == 1

    @pytest.mark.parametrize("error", [socket.gaierror("x"), OSError("x"), UnicodeError("x"), None])
    def test_a_name_without_address(self, error: Exception | None) -> None:
        def resolve(*_: Any) -> Sequence[str]:
            if error:
                raise error
            return []

        fetcher = Fetcher(["img.example"], timeout=LIMIT, resolve=resolve)
        assert "does not resolve" in str(refusal(fetcher, "http://img.example/"))

    def test_the_system_is_asked_by_default(self) -> None:
        assert refusal(Fetcher(["localhost"], timeout=LIMIT), "http://localhost/").code == "image_refused"
        for number in ("127.0.0.1", "127.1", "0x7f.0.0.1", "2130706433", "017700000001"):
            with pytest.raises(ImageError) as caught:
                Fetcher([number], timeout=LIMIT).fetch(f"http://{number}/")
            assert caught.value.code == "image_refused"


@dataclass
class Clock:
    """What `fetching` reads the time from: it stands still until a test moves it."""

    now: float = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(fetching, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class TestBounds:
    def test_a_length_that_is_too_large_is_not_read(self) -> None:
        with listening(body(b"", "Content-Length: 101")) as host:
            assert (
                refusal(on_loopback(host, max_bytes=100), f"http://img.example:{host.port}/").code == "image_too_large"
            )

    @pytest.mark.parametrize("header", ["Connection: close", "Transfer-Encoding: chunked"])
    def test_a_body_without_end(self, header: str) -> None:
        def pour(connection: socket.socket, _: str) -> None:
            connection.sendall(f"HTTP/1.1 200 OK\r\n{header}\r\n\r\n".encode())
            while True:
                connection.sendall(b"400\r\n" + b"x" * 0x400 + b"\r\n" if "chunked" in header else b"x" * 1024)

        with listening(pour) as host:
            assert refusal(on_loopback(host), f"http://img.example:{host.port}/").code == "image_too_large"

    def test_exactly_the_limit(self) -> None:
        with listening(body(b"x" * 100)) as host:
            assert len(on_loopback(host, max_bytes=100).fetch(f"http://img.example:{host.port}/")) == 100

    @pytest.mark.parametrize(
        "start",
        [
            b"",
            b"HTTP/1.1 200 OK\r\nX: ",
            b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n",
        ],
    )
    def test_a_slow_drip_ends(self, start: bytes, clock: Clock) -> None:
        def drip(connection: socket.socket, _: str) -> None:
            connection.sendall(start)
            for _step in range(1000):
                clock.now += LIMIT / 10
                connection.sendall(b"x")
                if host.closing.wait(0.001):  # else one read may take all steps at once
                    break

        with listening(drip) as host:
            error = refusal(on_loopback(host), f"http://img.example:{host.port}/")
        assert "takes too long" in str(error)

    def test_interim_answers_without_end(self, clock: Clock) -> None:
        def repeat(connection: socket.socket, _: str) -> None:
            while True:
                clock.now += LIMIT / 100
                connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10)

        with listening(repeat) as host:
            error = refusal(on_loopback(host), f"http://img.example:{host.port}/")
        assert "takes too long" in str(error)

    # A machine that is slow only makes these two later than too late.

    def test_silence(self) -> None:
        with listening(lambda *_: host.closing.wait(LIMIT) and None) as host:
            assert "takes too long" in str(refusal(on_loopback(host, timeout=0.3), f"http://img.example:{host.port}/"))

    def test_a_look_up_without_end(self) -> None:
        over = threading.Event()
        fetcher = Fetcher(["img.example"], resolve=lambda *_: [str(over.wait(LIMIT))], timeout=0.2)
        assert "takes too long" in str(refusal(fetcher, "http://img.example/"))
        over.set()


class TestAnswers:
    @pytest.mark.parametrize("status", ["301 x", "302 x", "303 x", "304 x", "307 x", "308 x"])
    def test_redirects_are_not_followed(self, status: str) -> None:
        with listening(body(b"", "Location: http://169.254.169.254/latest/meta-data/", status=status)) as host:
            assert refusal(on_loopback(host), f"http://img.example:{host.port}/").code == "image_refused"
        assert len(host.requests) == 1

    @pytest.mark.parametrize(
        "status", ["201 x", "204 x", "206 x", "401 x", "403 x", "404 x", "410 x", "500 x", "999 x"]
    )
    def test_other_statuses(self, status: str) -> None:
        with listening(body(b"", 'WWW-Authenticate: Basic realm="x"', "Set-Cookie: a=b", status=status)) as host:
            assert refusal(on_loopback(host), f"http://img.example:{host.port}/").code == "image_missing"
        assert len(host.requests) == 1

    @pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "zstd", "identity, gzip", "x"])
    def test_compressed_bodies(self, coding: str) -> None:
        with listening(body(CONTENT, f"Content-Encoding: {coding}")) as host:
            assert refusal(on_loopback(host), f"http://img.example:{host.port}/").code == "image_refused"

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"nonsense",
            b"<html>",
            b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
            b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nabc",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000,
        ],
    )
    def test_broken_ones(self, answer: bytes) -> None:
        with listening(lambda connection, _: connection.sendall(answer)) as host:
            assert refusal(on_loopback(host), f"http://img.example:{host.port}/").code == "image_missing"

    def test_a_length_of_many_digits(self) -> None:
        with listening(body(b"", "Content-Length: " + "9" * 5000)) as host:
            assert refusal(on_loopback(host), f"http://img.example:{host.port}/").code in (
                "image_missing",
                "image_too_large",
            )

    def test_nobody_listens(self) -> None:
        with socket.socket() as taken:  # so that nobody else gets the port
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            assert "cannot be reached" in str(refusal(on_loopback(Host(port)), f"http://img.example:{port}/"))


@pytest.fixture(scope="class")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of img.example that signs itself, with its key."""
    if which("openssl") is None:
        pytest.skip("needs the program openssl to make a certificate")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "2",
            ),
            *("-subj", "/CN=img.example", "-addext", "subjectAltName=DNS:img.example"),
            *("-keyout", str(file), "-out", str(file.with_suffix(".crt"))),
        ],
        check=True,
        capture_output=True,
    )
    file.write_bytes(file.read_bytes() + file.with_suffix(".crt").read_bytes())
    return file


class TestTls:
    def fetch(self, certificate: Path, name: str, **options: Any) -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        with listening(body(CONTENT), context=context) as host:
            return on_loopback(host, name, **options).fetch(f"https://{name}:{host.port}/")

    def test_the_name_is_verified_although_the_address_is_connected_to(self, certificate: Path) -> None:
        believing = ssl.create_default_context(cafile=certificate.with_suffix(".crt"))
        assert self.fetch(certificate, "img.example", context=believing) == CONTENT

    def test_a_certificate_of_another_name(self, certificate: Path) -> None:
        believing = ssl.create_default_context(cafile=certificate.with_suffix(".crt"))
        with pytest.raises(ImageError, match="cannot be reached"):
            self.fetch(certificate, "other.example", context=believing)

    def test_an_authority_that_nobody_knows(self, certificate: Path) -> None:
        with pytest.raises(ImageError, match="cannot be reached"):
            self.fetch(certificate, "img.example")

    def test_a_host_without_tls(self) -> None:
        with listening(body(CONTENT)) as host:
            assert refusal(on_loopback(host), f"https://img.example:{host.port}/").code == "image_missing"


def no_connection(*_: Any, **__: Any) -> socket.socket:
    raise AssertionError("connected to an address that is not allowed")
