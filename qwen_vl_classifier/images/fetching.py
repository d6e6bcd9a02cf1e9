"""Fetch pictures by URL, from named hosts, over connections that cannot be redirected to another machine.

A URL that a stranger sends makes this machine open a connection. So the host must have been named in advance, every
address that it resolves to must be public, and the connection goes to an address that was checked: the name is not
resolved again. There are no redirects, proxies, cookies or credentials, and the limits on time and bytes hold whatever
a server does. The URL is parsed once, and the request is built from its parts.

Messages name neither URL nor address, because they are sent to the stranger.
"""

from __future__ import annotations

import functools
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from qwen_vl_classifier.errors import ConfigError, ImageError
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.images.addresses import is_public

require("httpcore", extra="serve")  # in the extra "scale" too, whose users require that one first

import certifi  # noqa: E402
import httpcore  # noqa: E402
import idna  # noqa: E402

_LONGEST_URL: Final = 4096
_LONGEST_SIZE: Final = 18  # digits of Content-Length; Python refuses to read very long numbers
_MOST_ADDRESSES: Final = 4  # of a host that are tried
_MOST_LOOK_UPS: Final = 32  # at a time: one that never ends keeps its thread
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

# Characters that URL parsers treat differently: controls, any white space, backslashes, unpaired surrogates.
_AMBIGUOUS: Final = re.compile(r"[\x00-\x20\x7f-\xa0\\\s\ud800-\udfff]")
_URL: Final = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE | re.ASCII)
_HOST_AND_PORT: Final = re.compile(r"([^:@\[\]%]+)(?::([1-9][0-9]{0,4}))?", re.ASCII)
_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*", re.ASCII)
_KEPT: Final = "/?%:@!$&'()*+,;=-._~[]"  # of the path and query; the rest is percent-encoded


@dataclass(frozen=True, slots=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str


class Fetcher:
    """Fetch pictures by URL from named hosts; safe in several threads.

    Args:
        hosts: Names of hosts. `img.example.org` is that host alone, `.example.org` every name below it. With a port,
            `img.example.org:8443`, only that port is allowed; without, port 80 for http and 443 for https.
        max_bytes: Largest response.
        timeout: Seconds for one fetch in all, resolving the name included.
        resolve: Resolve a host to IP addresses; may raise OSError. By default the system's resolver.
        allow: Tell whether an address may be connected to. By default public ones.
        context: TLS settings for https. By default the authorities of certifi and of the system are trusted.

    Raises:
        ConfigError: An entry of `hosts` is not a host name.

    Example:
        >>> Fetcher(["img.example.org"]).fetch("http://localhost/")
        Traceback (most recent call last):
        ...
        qwen_vl_classifier.errors.ImageError: the image's URL is not of a host that is allowed; expected http or https \
and a host that the operator has named; send the picture itself
    """

    def __init__(
        self,
        hosts: Collection[str],
        *,
        max_bytes: int = 10_000_000,
        timeout: float = 5.0,
        resolve: Callable[[str, int], Sequence[str]] | None = None,
        allow: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = {_allowed_host(host) for host in hosts}
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._resolve = resolve or _system_resolver
        self._allow = allow
        self._context = context or _default_context()
        self._look_ups = threading.BoundedSemaphore(_MOST_LOOK_UPS)

    def fetch(self, url: str) -> bytes:
        """Fetch the bytes behind a URL; they are not checked to be a picture.

        Args:
            url: An http or https URL.

        Raises:
            ImageError: The URL is not allowed (code image_refused), its host does not answer in time (image_missing),
                or sends too much (image_too_large). The message contains nothing of the URL.
        """
        deadline = time.monotonic() + self._timeout
        target = self._allowed(url)
        try:
            addresses = self._addresses(target, deadline)
            origin = httpcore.Origin(target.scheme.encode(), target.host.encode(), target.port)
            with closing(
                httpcore.HTTPConnection(
                    origin, ssl_context=self._context, network_backend=_CheckedAddresses(addresses, deadline)
                )
            ) as connection:
                response = connection.handle_request(_request(target))
                self._check(response)
                return self._body(response.iter_stream())
        except httpcore.TimeoutException:
            raise self._late() from None
        except (httpcore.NetworkError, httpcore.ProtocolError):
            raise ImageError(
                "the image's host cannot be reached, or closed the connection too early; try again later",
                code="image_missing",
            ) from None

    def _allowed(self, url: str) -> _Target:
        target = _parse(url)
        if target is None or not self._is_named(target):
            raise ImageError(
                "the host of the image's URL is not allowed; expected http or https and a host that the operator "
                "allows; send the picture itself",
                code="image_refused",
            )
        return target

    def _is_named(self, target: _Target) -> bool:
        labels = target.host.split(".")
        names = [target.host, *("." + ".".join(labels[start:]) for start in range(1, len(labels)))]
        ports = [target.port, None] if target.port == _DEFAULT_PORTS[target.scheme] else [target.port]
        return any((name, port) in self._hosts for name in names for port in ports)

    def _addresses(self, target: _Target, deadline: float) -> Sequence[str]:
        """Resolve the host in a thread, since the system's resolver has no timeout, and check every address."""
        outcome: Future[Sequence[str]] = Future()

        def look_up() -> None:
            try:
                outcome.set_result(self._resolve(target.host, target.port))
            except Exception as error:
                outcome.set_exception(error)
            finally:
                self._look_ups.release()

        if not self._look_ups.acquire(timeout=_left(deadline)):
            raise self._late()
        threading.Thread(target=look_up, name="look-up-host", daemon=True).start()
        try:
            addresses = outcome.result(_left(deadline))
        except TimeoutError:
            raise self._late() from None
        except (OSError, UnicodeError):  # UnicodeError: from Python's codec for host names
            addresses = ()
        if not addresses:
            raise ImageError(
                "the image's host name does not resolve; check the URL",
                code="image_missing",
            )
        if not all(self._allow(address) for address in addresses):
            raise ImageError(
                "the image's host has an address that is not public, and only public ones are allowed; send the "
                "picture "
                "itself",
                code="image_refused",
            )
        return addresses

    def _check(self, response: httpcore.Response) -> None:
        if 300 <= response.status < 400:
            raise ImageError(
                "the image's URL redirects to another one, and redirects are not followed; give the final URL",
                code="image_refused",
            )
        if response.status != 200:
            raise ImageError(
                f"the image's host answers with status {response.status}; expected 200; check the URL",
                code="image_missing",
            )
        headers = {name.lower(): value for name, value in response.headers}
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            raise ImageError(
                "the image's host compresses the response; expected the plain file, as requested; send the picture "
                "itself",
                code="image_refused",
            )
        size = headers.get(b"content-length", b"0")
        if len(size) > _LONGEST_SIZE or int(size) > self._max_bytes:
            raise self._too_large()

    def _body(self, parts: Iterable[bytes]) -> bytes:
        content = bytearray()
        for part in parts:
            content += part
            if len(content) > self._max_bytes:
                raise self._too_large()
        return bytes(content)

    def _too_large(self) -> ImageError:
        return ImageError(
            f"the image behind the URL is too large; expected at most {self._max_bytes:,} bytes; compress it or scale "
            "it down",
            code="image_too_large",
        )

    def _late(self) -> ImageError:
        return ImageError(
            f"the image's host takes too long; expected the whole picture within {self._timeout:g} s; send the picture "
            "itself",
            code="image_missing",
        )


class _CheckedAddresses(httpcore.NetworkBackend):
    """Connects to addresses that were checked, whatever host it is given, and not after the deadline."""

    def __init__(self, addresses: Sequence[str], deadline: float) -> None:
        self._addresses = list(dict.fromkeys(addresses))[:_MOST_ADDRESSES]
        self._deadline = deadline
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address that answers; the time left is divided evenly among those not yet tried."""
        for left in range(len(self._addresses), 0, -1):
            try:
                stream = self._sockets.connect_tcp(
                    self._addresses[-left], port, _left(self._deadline) / left, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if left == 1:
                    raise
            else:
                return _DeadlineStream(stream, self._deadline)
        raise httpcore.ConnectError


class _DeadlineStream(httpcore.NetworkStream):
    """A connection that ends at a deadline, so that a server cannot prolong it by sending slowly."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        return _DeadlineStream(
            self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline)), self._deadline
        )

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _parse(url: str) -> _Target | None:
    """Parse a URL; return `None` for one that parsers may understand differently."""
    if len(url) > _LONGEST_URL or _AMBIGUOUS.search(url):
        return None
    parts = _URL.fullmatch(url)
    parsed = _HOST_AND_PORT.fullmatch(parts[2]) if parts else None
    host = _ascii_host(parsed[1]) if parsed else None
    if not (parts and parsed and host):
        return None
    scheme = parts[1].lower()
    port = int(parsed[2]) if parsed[2] else _DEFAULT_PORTS[scheme]
    path = quote(parts[3] if parts[3].startswith("/") else "/" + parts[3], safe=_KEPT)
    return _Target(scheme, host, port, path) if port <= 65535 else None


def _ascii_host(host: str) -> str | None:
    """Return the name of a host as in the DNS, or `None` if it is not a valid name (RFC 1123, RFC 5891).

    Only the case of ASCII letters is normalised: a name with full-width digits or dots, for instance, is not valid.
    """
    if not host.isascii():
        try:
            host = idna.encode(host, strict=True).decode()
        except UnicodeError:
            return None
    host = host.lower()
    return host if len(host) <= 253 and _HOST.fullmatch(host) else None


def _allowed_host(entry: str) -> tuple[str, int | None]:
    """Parse an allowed host: its name, with a leading dot for all names below it, and its port."""
    parsed = _HOST_AND_PORT.fullmatch(entry)
    host = _ascii_host(parsed[1].removeprefix(".")) if parsed else None
    port = int(parsed[2]) if parsed and parsed[2] else None
    if not (parsed and host) or not (port is None or port <= 65535):
        raise ConfigError(
            f"{entry!r} is not a host; give a name such as img.example.org, .example.org for all below it, or "
            "img.example.org:8443"
        )
    return ("." if parsed[1].startswith(".") else "") + host, port


def _request(target: _Target) -> httpcore.Request:
    host = target.host if target.port == _DEFAULT_PORTS[target.scheme] else f"{target.host}:{target.port}"
    return httpcore.Request(
        b"GET",
        httpcore.URL(
            scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.path.encode()
        ),
        headers={
            "Host": host,
            "Accept": "image/jpeg, image/png, image/webp",
            "Accept-Encoding": "identity",
            "User-Agent": "qwen-vl-classifier",
            "Connection": "close",
        },
    )


def _system_resolver(host: str, port: int) -> Sequence[str]:
    return [str(answer[4][0]) for answer in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@functools.cache
def _default_context() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    return context


def _left(deadline: float) -> float:
    """Return the seconds until a deadline.

    Raises:
        httpcore.ReadTimeout: It has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left
