"""Keys, host names, other sites' pages and what every answer tells browsers. No classifier is loaded: who gets past
all checks is told that the server is loading."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_vl_classifier import ServeConfig, create_app
from qwen_vl_classifier.config.serve import API_KEY_VARIABLE
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.serving.http.access import HEALTH, host_names, origins, read_key
from qwen_vl_classifier.serving.service import Service
from tests.serving.client import check_problem

KEY = "k3y-of-the-server"


def ask(method: str, path: str, *, config: ServeConfig | None = None, **request: Any) -> httpx.Response:
    """Send one request to an application that has loaded nothing."""
    app = create_app(config or ServeConfig(classifiers=("claims",)))

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


async def ask_raw(app: Any, scope: dict[str, Any]) -> list[dict[str, Any]]:
    """Speak ASGI, for what no client would send."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def locked(tmp_path: Path) -> ServeConfig:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    return ServeConfig(classifiers=("claims",), api_key_file=str(path), host="0.0.0.0")


class TestKeys:
    @pytest.mark.parametrize("path", sorted(HEALTH))
    def test_health_needs_none(self, locked: ServeConfig, path: str) -> None:
        assert ask("GET", path, config=locked).status_code in (200, 503)

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/v1/classify"),
            ("POST", "/classify"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
            ("GET", "/"),
            ("GET", "/docs"),
            ("GET", "/nothing/here"),
            ("GET", "/livez/"),
            ("GET", "//livez"),
            ("GET", "/LIVEZ"),
            ("GET", "/livez/../v1/models"),
            ("GET", "/livez%2f..%2fv1%2fmodels"),
            ("GET", "/livez%2f"),
            ("GET", "/livez;/v1/models"),
            ("GET", "/livez%00"),
            ("GET", "/v1/models?/livez"),
            ("GET", "/v1/models#/livez"),
            ("HEAD", "/v1/models"),
            ("OPTIONS", "/v1/classify"),
            ("TRACE", "/v1/models"),
            ("livez", "/v1/models"),
        ],
    )
    def test_everything_else_asks_for_it(self, locked: ServeConfig, method: str, path: str) -> None:
        headers = {"Host": "localhost/livez", "X-Forwarded-Path": "/livez", "X-Original-URL": "/livez"}
        response = ask(method, path, config=locked, headers=headers)
        assert response.status_code == 401
        if method != "HEAD":
            check_problem(response, 401, "invalid_api_key")
        challenges = response.headers.get_list("www-authenticate")
        assert challenges == ["Bearer", 'Basic realm="qwen-vl-classifier", charset="UTF-8"']

    @pytest.mark.parametrize("root_path", ["", "/livez", "/v1", "/livez/..", "/"])
    def test_a_root_path_opens_nothing(self, locked: ServeConfig, root_path: str) -> None:
        """Whoever mounts the application chooses the root path; the path as a whole decides all the same."""
        app = create_app(locked)
        for path in ("/v1/models", "/livez/v1/models", "/livez/livez", "/v1/livez"):
            scope = {"type": "http", "method": "GET", "path": path, "root_path": root_path, "headers": []}
            start, *_ = asyncio.run(ask_raw(app, scope | {"query_string": b""}))
            assert start["status"] == 401, path

    def test_there_is_nothing_for_websockets(self, locked: ServeConfig) -> None:
        for config in (locked, ServeConfig(classifiers=("claims",))):
            scope = {"type": "websocket", "path": "/livez", "headers": [], "query_string": b""}
            assert asyncio.run(ask_raw(create_app(config), scope)) == [{"type": "websocket.close", "code": 1008}]

    @pytest.mark.parametrize(
        "given",
        [
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            f"Basic {KEY}",
            basic("user", "wrong"),
            basic(KEY, ""),
            basic("user", f"{KEY}:"),
            "Basic " + base64.b64encode(KEY.encode()).decode(),
            basic("user", KEY) + "*",
            KEY,
            f"Bearer {KEY} {KEY}",
            f"Bearer {KEY},",
            f"Token {KEY}",
            "Bearer k3y-of-the-housE",
            f"Bearer {KEY}2",
            f"Bearer {KEY[:-1]}",
            "Bearer k\u00e9y",
            "Bearer " + "k" * 10_000,
        ],
    )
    def test_a_wrong_one_is_refused_and_never_repeated(self, locked: ServeConfig, given: str) -> None:
        response = ask("GET", "/v1/models", config=locked, headers={"Authorization": given.encode()})
        check_problem(response, 401, "invalid_api_key")
        assert KEY not in response.text
        assert "wrong" not in response.text

    @pytest.mark.parametrize(
        "given",
        [
            f"Bearer {KEY}",
            f"bearer {KEY}",
            f"BEARER  {KEY} ",
            basic("", KEY),
            basic("any name", KEY),
            basic("x", KEY).replace("B", "b", 1),
        ],
    )
    def test_the_key_opens(self, locked: ServeConfig, given: str) -> None:
        check_problem(ask("GET", "/v1/models", config=locked, headers={"Authorization": given}), 503, "loading")

    @pytest.mark.parametrize("keys", [("wrong", KEY), (KEY, "wrong"), (KEY, KEY)])
    def test_two_are_none(self, locked: ServeConfig, keys: tuple[str, str]) -> None:
        headers = [("Authorization", f"Bearer {key}") for key in keys]
        check_problem(ask("GET", "/v1/models", config=locked, headers=headers), 401, "invalid_api_key")

    def test_it_may_stand_in_the_environment_and_the_file_wins(
        self, locked: ServeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(API_KEY_VARIABLE, "other")
        assert read_key(locked) == KEY.encode()
        config = ServeConfig(classifiers=("claims",), host="0.0.0.0")
        assert read_key(config) == b"other"
        check_problem(ask("GET", "/v1/models", config=config), 401, "invalid_api_key")
        monkeypatch.setenv(API_KEY_VARIABLE, "two words")
        with pytest.raises(ConfigError, match=API_KEY_VARIABLE) as caught:
            create_app(config)
        assert "two" not in str(caught.value)
        monkeypatch.delenv(API_KEY_VARIABLE)
        assert read_key(ServeConfig(classifiers=("claims",))) is None

    @pytest.mark.parametrize("content", [None, b"", b" \n", b"two words\n", b"two\nlines\n", b"two\xff", b"two\x01"])
    def test_a_file_without_one_is_an_error_at_once(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "key"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match="api_key_file") as caught:
            create_app(ServeConfig(classifiers=("a",), api_key_file=str(path)))
        assert "two" not in str(caught.value)


class TestHosts:
    @pytest.mark.parametrize(
        "host", ["localhost", "localhost:8000", "LocalHost:1", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"]
    )
    def test_names_of_this_machine(self, host: str) -> None:
        check_problem(ask("GET", "/readyz", headers={"Host": host}), 503, "loading")

    @pytest.mark.parametrize(
        "host",
        [
            "",
            "example.org",
            "localhost.example.org",
            "example.org:8000",
            "127.0.0.1.example.org",
            "127.0.0.2",
            "localhost@example.org",
            "example.org#localhost",
            "localhost/",
            "localhost:8000:8000",
            "localhost, example.org",
            "::1",
            "[::1",
            "0.0.0.0",
            "lo\u00e7alhost",
        ],
    )
    def test_others_are_refused(self, host: str) -> None:
        for path in ("/readyz", "/v1/models"):
            check_problem(ask("GET", path, headers={"Host": host.encode()}), 421, "unknown_host")

    def test_two_are_none(self) -> None:
        for second in ("localhost", "example.org"):
            headers = [("Host", "localhost"), ("Host", second)]
            check_problem(ask("GET", "/readyz", headers=headers), 421, "unknown_host")

    def test_names_may_be_added_and_the_bound_one_counts(self) -> None:
        config = ServeConfig(classifiers=("a",), host="127.0.0.7", allowed_hosts="My.Example.org, other")
        for host in ("my.example.org", "other:80", "127.0.0.7", "localhost"):
            assert ask("GET", "/readyz", config=config, headers={"Host": host}).status_code == 503
        assert ask("GET", "/readyz", config=config, headers={"Host": "example.org"}).status_code == 421

    def test_on_an_open_address_any_name_will_do(self) -> None:
        config = ServeConfig(classifiers=("a",), host="0.0.0.0", insecure=True)
        assert host_names(config) is None
        assert ask("GET", "/readyz", config=config, headers={"Host": "example.org"}).status_code == 503


class TestOrigins:
    LISTED = "https://page.example"

    @pytest.mark.parametrize(
        "headers",
        [
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "anything"},
            {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
            {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
            {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "document"},
            {"Origin": "https://page.example"},
            {"Origin": "null"},
            {"Origin": ""},
            {"Origin": "http://localhost:8000"},
            {"Origin": "http://localhost.page.example"},
        ],
    )
    def test_pages_of_other_sites_are_refused(self, headers: dict[str, str]) -> None:
        for path in ("/livez", "/v1/models"):
            response = ask("GET", path, headers=headers)
            check_problem(response, 403, "cross_site")
            assert not [name for name in response.headers if name.startswith("access-control")]

    def test_a_form_of_another_site_is_refused_even_as_navigation(self) -> None:
        headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        check_problem(ask("POST", "/v1/classify", headers=headers), 403, "cross_site")
        assert ask("GET", "/livez", headers=headers).status_code == 200  # a link that somebody follows

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Sec-Fetch-Site": "none"},
            {"Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Site": "same-origin", "Origin": "https://behind-a-proxy.example"},
            {"Origin": "http://localhost"},
            {"Origin": "https://LOCALHOST"},
        ],
    )
    def test_its_own_page_and_programs_are_let_in(self, headers: dict[str, str]) -> None:
        response = ask("GET", "/livez", headers=headers)
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("access-control")]

    def test_listed_origins_may_call_and_read(self, locked: ServeConfig) -> None:
        config = ServeConfig(
            classifiers=("a",), host="0.0.0.0", api_key_file=locked.api_key_file, cors_origins=self.LISTED
        )
        headers = {"Origin": self.LISTED, "Sec-Fetch-Site": "cross-site", "Authorization": f"Bearer {KEY}"}
        response = ask("GET", "/v1/models", config=config, headers=headers)
        check_problem(response, 503, "loading")
        assert response.headers["access-control-allow-origin"] == self.LISTED
        assert "Origin" in response.headers["vary"]
        assert "access-control-allow-credentials" not in response.headers
        del headers["Authorization"]
        response = ask("GET", "/v1/models", config=config, headers=headers)
        check_problem(response, 401, "invalid_api_key")
        assert response.headers["access-control-allow-origin"] == self.LISTED

    def test_a_browser_may_ask_first_without_the_key(self, locked: ServeConfig) -> None:
        config = ServeConfig(
            classifiers=("a",), host="0.0.0.0", api_key_file=locked.api_key_file, cors_origins=self.LISTED
        )
        headers = {"Origin": self.LISTED, "Access-Control-Request-Method": "POST"}
        response = ask("OPTIONS", "/v1/classify", config=config, headers=headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == self.LISTED
        assert response.headers["access-control-allow-methods"] == "GET, POST"
        assert "Authorization" in response.headers["access-control-allow-headers"]
        del headers["Access-Control-Request-Method"]
        assert ask("OPTIONS", "/v1/classify", config=config, headers=headers).status_code == 401

    @pytest.mark.parametrize(
        "origin",
        [
            "https://page.example.org",
            "http://page.example",
            "https://page.example:8443",
            "https://PAGE.example",
            "https://evil.page.example",
            "https://page.example/",
            "null",
            "*",
        ],
    )
    def test_only_exactly_listed_ones(self, origin: str) -> None:
        config = ServeConfig(classifiers=("a",), cors_origins=f"https://first.example, {self.LISTED}")
        for method, more in (("GET", {}), ("OPTIONS", {"Access-Control-Request-Method": "GET"})):
            response = ask(method, "/livez", config=config, headers={"Origin": origin, **more})
            check_problem(response, 403, "cross_site")
            assert "access-control-allow-origin" not in response.headers

    @pytest.mark.parametrize(
        "origin",
        ["*", "null", "page.example", "https://page.example/", "https://PAGE.example", "https://*.example", "https://"],
    )
    def test_what_no_browser_sends_cannot_be_listed(self, origin: str) -> None:
        with pytest.raises(ConfigError, match="cors_origins"):
            create_app(ServeConfig(classifiers=("a",), cors_origins=origin))

    def test_origins_of_other_schemes_and_ports(self) -> None:
        config = ServeConfig(
            classifiers=("a",), cors_origins="http://localhost:3000,moz-extension://0a-1b,http://[::1]:3"
        )
        assert origins(config) == {"http://localhost:3000", "moz-extension://0a-1b", "http://[::1]:3"}


class TestHeaders:
    @pytest.mark.parametrize(
        ("method", "path", "headers", "status"),
        [
            ("GET", "/livez", {}, 200),
            ("GET", "/openapi.json", {}, 200),
            ("GET", "/readyz", {}, 503),
            ("GET", "/nothing", {}, 404),
            ("GET", "/v1/classify", {}, 405),
            ("GET", "/livez", {"Host": "example.org"}, 421),
            ("GET", "/livez", {"Origin": "null"}, 403),
        ],
    )
    def test_every_answer_has_them(self, method: str, path: str, headers: dict[str, str], status: int) -> None:
        response = ask(method, path, headers=headers)
        assert response.status_code == status
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-request-id"]
        assert "server" not in response.headers

    def test_a_defect_has_them_too(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(Service, "state", property(lambda service: 1 / 0))
        response = ask("GET", "/livez")
        check_problem(response, 500, "internal_error")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-request-id"]
        assert "ZeroDivisionError" in caplog.text
        assert "division" not in response.text
