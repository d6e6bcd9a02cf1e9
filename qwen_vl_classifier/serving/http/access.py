"""Check who may call the server, and add security headers to every answer.

Layers around the application, from the outside in: `SecurityHeaders` on every answer, `HostCheck` against names that
others point at this machine, `CrossSiteCheck` against other sites' pages, Starlette's CORS for origins that are listed,
`AdminCheck` before what changes the classifiers, and `KeyCheck`. They look at the path that will be routed, compared as
a whole, and never at a URL put together from headers; what is not known to be open needs the key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Collection
from dataclasses import dataclass

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vl_classifier.config.serve import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, ServeConfig, is_loopback
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.api_keys import read_api_key
from qwen_vl_classifier.serving.http.problems import ProblemResponse

HEALTH = frozenset({"/livez", "/readyz"})
"""Paths that need no key: they tell nothing, and what calls them has none."""

MODELS = "/v1/models"
"""The path of the classifiers; those who change them need the admin key."""

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""What a browser on this machine may call a server that only this machine reaches."""

CONTENT_SECURITY_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""For answers that are no page; a page says what it needs itself."""

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"cache-control", b"no-store"),
)

_OTHER_HOSTS = "use localhost, or add the name with --allowed-hosts"
_OTHER_ORIGINS = "list their origin with --cors-origins"

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?", re.ASCII)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?", re.ASCII)
_CHALLENGES = (
    (b"www-authenticate", b"Bearer"),
    (b"www-authenticate", b'Basic realm="qwen-vl-classifier", charset="UTF-8"'),
)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a server.

    Attributes:
        clients: What clients must send, if there is one.
        admin: What those who change what is served must send; without it nobody may. It opens all else too.
    """

    clients: bytes | None = None
    admin: bytes | None = None


def read_key(config: ServeConfig) -> bytes | None:
    """Return the key that clients must send: from the file, else from the environment, else none.

    Raises:
        ConfigError: The file cannot be read, or holds no key.
    """
    return read_api_key(config.api_key_file, API_KEY_VARIABLE, option="api_key_file")


def read_keys(config: ServeConfig) -> Keys:
    """Return both keys: each from its file, else from the environment, else none.

    Raises:
        ConfigError: A file cannot be read or holds no key, or both keys are the same.
    """
    keys = Keys(
        read_key(config),
        read_api_key(config.admin_key_file, ADMIN_KEY_VARIABLE, option="admin_key_file"),
    )
    if keys.admin is not None and keys.admin == keys.clients:
        raise ConfigError(
            "the admin key is the same as the API key, so every client could change what is served; give another one"
        )
    return keys


def host_names(config: ServeConfig) -> frozenset[str] | None:
    """Return the names by which clients may call a server, or `None` where any will do.

    A server that only this machine reaches is called by names of this machine. A page of another site, whose own
    name was made to point here (DNS rebinding), calls it by that name, and the browser takes it for that site.
    """
    if not is_loopback(config.host):
        return None
    bound = f"[{config.host}]" if ":" in config.host else config.host
    return LOOPBACK_NAMES | {name.lower() for name in (bound, *config.names_of("allowed_hosts"))}


def origins(config: ServeConfig) -> frozenset[str]:
    """Return the origins whose pages may call, as browsers spell them.

    Raises:
        ConfigError: One is not spelt so, and would never be met.
    """
    listed = config.names_of("cors_origins")
    for origin in listed:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"cors_origins {origin!r}: not an origin as browsers write it; give scheme, host in lower case and any "
                "port but the usual one, such as https://example.org or http://localhost:3000"
            )
    return frozenset(listed)


def access_layers(config: ServeConfig, keys: Keys) -> list[Middleware]:
    """Return the layers that decide who may call, from the outside in.

    Args:
        config: Host names and origins.
        keys: What must be sent.

    Raises:
        ConfigError: An origin is not spelt as browsers spell it.
    """
    names, listed = host_names(config), origins(config)
    layers = [Middleware(SecurityHeaders)]
    if names is not None:
        layers.append(Middleware(HostCheck, names=names))
    layers.append(Middleware(CrossSiteCheck, origins=listed))
    if listed:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=sorted(listed),
                allow_methods=("GET", "POST"),
                allow_headers=("Authorization", "X-Request-ID"),
                expose_headers=("Retry-After", "X-Request-ID"),
            )
        )
    if keys.clients is not None:
        layers.append(Middleware(KeyCheck, keys=[key for key in (keys.clients, keys.admin) if key is not None]))
    layers.append(Middleware(AdminCheck, key=keys.admin))
    return layers


class SecurityHeaders:
    """Add security headers to every answer that does not have its own.

    Args:
        app: What is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on. There is nothing here for websockets."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def complete(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                own = [header for header in _HEADERS if header[0] not in given]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        await self.app(scope, receive, complete if scope["type"] == "http" else send)


class HostCheck:
    """Refuse requests that call this server by a name which is not its own.

    Args:
        app: What is behind the check.
        names: Its names in lower case, without port; IPv6 addresses in brackets.
        advice: How to be let in.
    """

    def __init__(self, app: ASGIApp, *, names: Collection[str], advice: str = _OTHER_HOSTS) -> None:
        self.app = app
        self._names = names
        self._detail = f"the server does not accept this host name; {advice}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 421."""
        if scope["type"] != "http" or self._is_own(_values(scope, b"host")):
            await self.app(scope, receive, send)
            return
        await ProblemResponse(421, "unknown_host", self._detail)(scope, receive, send)

    def _is_own(self, hosts: list[bytes]) -> bool:
        found = _HOST.fullmatch(hosts[0].decode("latin-1").lower()) if len(hosts) == 1 else None
        return found is not None and found[1].rstrip(".") in self._names


class CrossSiteCheck:
    """Refuse requests that pages of other sites send, except of listed origins.

    Browsers say where a request comes from by `Sec-Fetch-Site`, or, on plain HTTP between machines, by `Origin`
    alone; other clients say neither. A link that somebody follows here is let in: the linking site sees nothing of it.

    Args:
        app: What is behind the check.
        origins: Origins that may call, such as `https://example.org`.
        advice: How to be let in.
    """

    def __init__(self, app: ASGIApp, *, origins: Collection[str], advice: str = _OTHER_ORIGINS) -> None:
        self.app = app
        self._origins = frozenset(origin.encode() for origin in origins)
        self._detail = f"pages of other sites may not call this server; {advice}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] != "http" or self._is_listed(_values(scope, b"origin")) or not _is_cross_site(scope):
            await self.app(scope, receive, send)
            return
        await ProblemResponse(403, "cross_site", self._detail)(scope, receive, send)

    def _is_listed(self, given: list[bytes]) -> bool:
        return len(given) == 1 and given[0] in self._origins


class KeyCheck:
    """Refuse requests without the key, except to health routes.

    Programs send it as a bearer token; a browser, which asks whoever sits there, as the password of Basic
    authentication with any name.

    Args:
        app: What is behind the check.
        keys: Those that open, of which one will do.
    """

    def __init__(self, app: ASGIApp, *, keys: Collection[bytes]) -> None:
        self.app = app
        self._keys = [_Secret(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] != "http" or scope["path"] in HEALTH or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        response = ProblemResponse(
            401, "invalid_api_key", "no valid key; send the header Authorization: Bearer KEY, or Basic with any name"
        )
        response.raw_headers += _CHALLENGES
        await response(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, credentials = _credentials(scope)
        if scheme == b"basic":
            credentials = _password(credentials)
        elif scheme != b"bearer":
            return False
        return any(key.is_same(credentials) for key in self._keys)


class AdminCheck:
    """Let nobody change what is served without the admin key, not even on loopback.

    It must be a bearer token: browsers send a password of Basic authentication by themselves, and no page should be
    able to make them send this one.

    Args:
        app: What is behind the check.
        key: The key; without one, nobody may.
    """

    def __init__(self, app: ASGIApp, *, key: bytes | None) -> None:
        self.app = app
        self._key = None if key is None else _Secret(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401, or 403 where there is no admin key."""
        if scope["type"] != "http" or not changes_models(scope["method"], scope["path"]) or self._may(scope):
            await self.app(scope, receive, send)
            return
        if self._key is None:
            detail = "requests cannot change what is served; start the server with --admin-key-file to allow it"
            await ProblemResponse(403, "no_admin_key", detail)(scope, receive, send)
            return
        response = ProblemResponse(
            401, "invalid_admin_key", "no valid admin key; send the header Authorization: Bearer KEY"
        )
        response.raw_headers += _CHALLENGES[:1]
        await response(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        scheme, credentials = _credentials(scope)
        return self._key is not None and scheme == b"bearer" and self._key.is_same(credentials)


def changes_models(method: str, path: str) -> bool:
    """Tell whether a request changes what is served, and so needs the admin key."""
    return (method == "POST" and path == MODELS) or (method == "DELETE" and path.startswith(f"{MODELS}/"))


class _Secret:
    """A key, by its digest. Digests are of one length: comparing tells by its time not even the length of the key."""

    def __init__(self, key: bytes) -> None:
        self._digest = hashlib.sha256(key).digest()

    def is_same(self, key: bytes) -> bool:
        return hmac.compare_digest(hashlib.sha256(key).digest(), self._digest)


def _credentials(scope: Scope) -> tuple[bytes, bytes]:
    """Return the scheme, in lower case, and the credentials of the one header that says who calls; or two blanks."""
    given = _values(scope, b"authorization")
    scheme, _, credentials = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    return scheme.lower(), credentials.strip()


def _is_cross_site(scope: Scope) -> bool:
    """Tell whether a page of another origin sends a request."""
    headers = dict(scope["headers"])
    site = headers.get(b"sec-fetch-site")
    if site in (b"same-origin", b"none"):
        return False
    if site is not None:
        followed = headers.get(b"sec-fetch-mode") == b"navigate" and headers.get(b"sec-fetch-dest") == b"document"
        return not (followed and scope["method"] in ("GET", "HEAD"))
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2].lower() != headers.get(b"host", b"").lower()


def _password(credentials: bytes) -> bytes:
    """Return the password of Basic credentials (RFC 7617), empty where they are malformed."""
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for header, value in scope["headers"] if header.lower() == name]
