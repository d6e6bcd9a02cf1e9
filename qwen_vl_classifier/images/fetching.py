"""A picture's URL -> the bytes behind it, from hosts that were named and over connections that cannot be led astray.

A URL that a stranger gives is a wish to have this machine open a connection. So the host must have been named in
advance, every address it resolves to must be public, and the connection goes to an address that was checked: the name
is not resolved a second time. There are no redirects, proxies, cookies or credentials, and bounds on time and bytes
that a server cannot stretch. Only one parser ever looks at the URL: what is sent is put together from its parts.

Messages name neither URL nor address: they go to the stranger.
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

require("httpcore", extra="serve")  # the extra "scale" has it too, and whoever needs that asks for it first

import certifi  # noqa: E402
import httpcore  # noqa: E402
import idna  # noqa: E402

_LONGEST_URL: Final = 4096
_LONGEST_SIZE: Final = 18  # digits; Python refuses to read very long numbers
_MOST_ADDRESSES: Final = 4  # that are tried, of those a name has
_MOST_LOOK_UPS: Final = 32  # at one time; one that never ends holds its thread
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

# Characters that parsers of URLs disagree about: controls, white space of any script, backslashes, half characters.
_AMBIGUOUS: Final = re.compile(r"[\x00-\x20\x7f-\xa0\\\s\ud800-\udfff]")
_URL: Final = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE | re.ASCII)
_PLACE: Final = re.compile(r"([^:@\[\]%]+)(?::([1-9][0-9]{0,4}))?", re.ASCII)
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
    """Fetches pictures by URL from hosts that were named; may be used by many threads.

    Args:
        hosts: Names of hosts. `img.example.org` is that host alone, `.example.org` every name below it. With a port,
            `img.example.org:8443`, only that port is allowed; without, port 80 for http and 443 for https.
        max_bytes: Largest answer.
        timeout: Seconds that one fetch may take in all, looking up the name included.
        resolve: Look up a host and return its addresses in numbers; may raise OSError. The default asks the system.
        allow: Tell whether an address may be connected to. The default allows public ones.
        context: Whom to believe about names, for https. The default believes certifi's and the system's authorities.

    Raises:
        ConfigError: One of `hosts` is no host.

    Example:
        >>> Fetcher(["img.example.org"]).fetch("http://localhost/")
        Traceback (most recent call last):
        ...
        qwen_vl_classifier.errors.ImageError: the image's URL is not of a host that is allowed; wanted http or https \
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
        self._hosts = {_named(host) for host in hosts}
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._resolve = resolve or _ask_system
        self._allow = allow
        self._context = context or _default_context()
        self._look_ups = threading.BoundedSemaphore(_MOST_LOOK_UPS)

    def fetch(self, url: str) -> bytes:
        """Fetch a picture; what its content is, is not looked at.

        Args:
            url: An http or https URL.

        Raises:
            ImageError: The URL is not allowed (code image_refused), its host gives nothing in time (image_missing), or
                too much (image_too_large). The message holds nothing of the URL.
        """
        deadline = time.monotonic() + self._timeout
        target = self._allowed(url)
        try:
            addresses = self._addresses(target, deadline)
            origin = httpcore.Origin(target.scheme.encode(), target.host.encode(), target.port)
            with closing(
                httpcore.HTTPConnection(origin, ssl_context=self._context, network_backend=_Pinned(addresses, deadline))
            ) as connection:
                response = connection.handle_request(_request(target))
                self._check(response)
                return self._body(response.iter_stream())
        except httpcore.TimeoutException:
            raise self._late() from None
        except (httpcore.NetworkError, httpcore.ProtocolError):
            raise ImageError(
                "the image's host cannot be reached, or breaks off; wanted an answer over http; try again later",
                code="image_missing",
            ) from None

    def _allowed(self, url: str) -> _Target:
        target = _parse(url)
        if target is None or not self._is_named(target):
            raise ImageError(
                "the image's URL is not of a host that is allowed; wanted http or https and a host that the operator "
                "has named; send the picture itself",
                code="image_refused",
            )
        return target

    def _is_named(self, target: _Target) -> bool:
        labels = target.host.split(".")
        names = [target.host, *("." + ".".join(labels[start:]) for start in range(1, len(labels)))]
        ports = [target.port, None] if target.port == _DEFAULT_PORTS[target.scheme] else [target.port]
        return any((name, port) in self._hosts for name in names for port in ports)

    def _addresses(self, target: _Target, deadline: float) -> Sequence[str]:
        """Look up the host and check every address, in a thread of its own: the system's look-up knows no timeout."""
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
        except (OSError, UnicodeError):  # UnicodeError: of Python's own codec for host names
            addresses = ()
        if not addresses:
            raise ImageError(
                "the image's host has no address; wanted one that can be looked up; check the URL",
                code="image_missing",
            )
        if not all(self._allow(address) for address in addresses):
            raise ImageError(
                "the image's host has an address that is not public; wanted only public ones; send the picture itself",
                code="image_refused",
            )
        return addresses

    def _check(self, response: httpcore.Response) -> None:
        if 300 <= response.status < 400:
            raise ImageError(
                "the image's URL leads to another one; redirects are not followed; give the last URL",
                code="image_refused",
            )
        if response.status != 200:
            raise ImageError(
                f"the image's host answers with status {response.status}; wanted 200; check the URL",
                code="image_missing",
            )
        headers = {name.lower(): value for name, value in response.headers}
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            raise ImageError(
                "the image's host sends it compressed once more; wanted the plain file, as was asked for; "
                "send the picture itself",
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
            f"the image behind the URL is too large; wanted at most {self._max_bytes:,} bytes; compress it or scale "
            "it down",
            code="image_too_large",
        )

    def _late(self) -> ImageError:
        return ImageError(
            f"the image's host takes too long; wanted the whole picture within {self._timeout:g} s; send the picture "
            "itself",
            code="image_missing",
        )


class _Pinned(httpcore.NetworkBackend):
    """Connects to addresses that were checked, whatever name it is asked for, and to nothing after a deadline."""

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
        """Connect to the first address that answers, each being given its share of the time that is left."""
        for left in range(len(self._addresses), 0, -1):
            try:
                stream = self._sockets.connect_tcp(
                    self._addresses[-left], port, _left(self._deadline) / left, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if left == 1:
                    raise
            else:
                return _Hurried(stream, self._deadline)
        raise httpcore.ConnectError


class _Hurried(httpcore.NetworkStream):
    """A connection of which every step must end by one deadline, so that a slow drip does not prolong it."""

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
        return _Hurried(self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline)), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _parse(url: str) -> _Target | None:
    """Take a URL apart, or return `None` for one that not every parser would understand in the same way."""
    if len(url) > _LONGEST_URL or _AMBIGUOUS.search(url):
        return None
    parts = _URL.fullmatch(url)
    place = _PLACE.fullmatch(parts[2]) if parts else None
    host = _ascii_host(place[1]) if place else None
    if not (parts and place and host):
        return None
    scheme = parts[1].lower()
    port = int(place[2]) if place[2] else _DEFAULT_PORTS[scheme]
    path = quote(parts[3] if parts[3].startswith("/") else "/" + parts[3], safe=_KEPT)
    return _Target(scheme, host, port, path) if port <= 65535 else None


def _ascii_host(host: str) -> str | None:
    """Return a host's name as it stands in the DNS, or `None` if it is no proper name (RFC 1123, RFC 5891).

    Nothing is mapped but the case of ASCII letters: full-width digits or dots and the like make no name.
    """
    if not host.isascii():
        try:
            host = idna.encode(host, strict=True).decode()
        except UnicodeError:
            return None
    host = host.lower()
    return host if len(host) <= 253 and _HOST.fullmatch(host) else None


def _named(entry: str) -> tuple[str, int | None]:
    """Read an entry of the hosts that are allowed: its name, with a dot in front for all below it, and its port."""
    place = _PLACE.fullmatch(entry)
    host = _ascii_host(place[1].removeprefix(".")) if place else None
    port = int(place[2]) if place and place[2] else None
    if not (place and host) or not (port is None or port <= 65535):
        raise ConfigError(
            f"{entry!r} is no host; give a name such as img.example.org, .example.org for all below it, or "
            "img.example.org:8443"
        )
    return ("." if place[1].startswith(".") else "") + host, port


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


def _ask_system(host: str, port: int) -> Sequence[str]:
    return [str(answer[4][0]) for answer in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@functools.cache
def _default_context() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    return context


def _left(deadline: float) -> float:
    """Return the seconds until a deadline, or raise where it is over, even if there were no need to wait."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left
