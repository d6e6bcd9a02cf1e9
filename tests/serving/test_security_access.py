"""Every route of the description with every malformed authorisation: 401, and not one byte of an answer."""

from __future__ import annotations

import base64

import pytest
from starlette.testclient import TestClient

from qwen_vl_classifier import ServeConfig, create_app
from qwen_vl_classifier.serving.http.access import HEALTH, changes_models
from tests.serving.client import check_problem

KEY = "k3y-of-the-server"


def basic(content: bytes) -> bytes:
    return b"Basic " + base64.b64encode(content)


MALFORMED: list[list[bytes]] = [
    [],
    [b""],
    [b" "],
    [b"Bearer"],
    [b"Bearer "],
    [b"Bearer  \t "],
    [b"Bearer wrong"],
    [b"Bearer null"],
    [b"Bearer undefined"],
    [b"Bearer *"],
    [b"Bearer " + KEY.upper().encode()],
    [b"Bearer " + KEY[:-1].encode()],
    [b"Bearer " + KEY.encode() + b"x"],
    [b"Bearer x" + KEY.encode()],
    [b"Bearer " + KEY.encode() + b"\x00"],
    [b"Bearer \x00" + KEY.encode()],
    [b"Bearer " + KEY.encode() + b" x"],
    [b'Bearer "' + KEY.encode() + b'"'],
    [b"Bearer " + KEY.encode() + b", Bearer x"],
    [b"Bearer:" + KEY.encode()],
    [b"Bearer=" + KEY.encode()],
    [b"Bearer\t" + KEY.encode()],
    [b"Bearer" + KEY.encode()],
    [b"Token " + KEY.encode()],
    [b"Digest " + KEY.encode()],
    [b"Negotiate " + KEY.encode()],
    [b"api-key " + KEY.encode()],
    [KEY.encode()],
    [b"Bearer \xff\xfe"],
    [b"Bearer " + b"A" * 60_000],
    [b"Basic"],
    [b"Basic "],
    [b"Basic " + KEY.encode()],
    [b"Basic ====="],
    [b"Basic \xff"],
    [basic(b"")],
    [basic(b":")],
    [basic(KEY.encode())],
    [basic(KEY.encode() + b":")],
    [basic(b"user:wrong")],
    [basic(b"user:" + KEY.encode() + b":")],
    [basic(b"user:" + KEY.encode() + b"\n")],
    [basic(b"user:" + KEY.encode())[:-3]],
    [basic(b"user:" + KEY.encode()) + b"!"],
    [b"Bearer " + base64.b64encode(KEY.encode())],
    [basic(base64.b64encode(b"user:" + KEY.encode()))],
    [b"Bearer wrong", b"Bearer " + KEY.encode()],
    [b"Bearer " + KEY.encode(), b"Bearer " + KEY.encode()],
    [b"Bearer " + KEY.encode(), b""],
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_text(KEY)
    app = create_app(ServeConfig(classifiers=("claims",), api_key_file=str(path), host="0.0.0.0"))
    return TestClient(app, base_url="http://localhost")


def routes(client: TestClient) -> list[tuple[str, str]]:
    page = client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    described = [(method, path.replace("{model}", "claims")) for path, item in page["paths"].items() for method in item]
    return [*described, ("post", "/classify"), ("get", "/"), ("get", "/docs"), ("get", "/openapi.json")]


@pytest.mark.parametrize("given", MALFORMED, ids=range(len(MALFORMED)))
def test_no_route_opens(client: TestClient, given: list[bytes]) -> None:
    headers = [(b"Authorization", value) for value in given]
    asked = 0
    for method, path in routes(client):
        if path in HEALTH:
            continue
        response = client.request(method, path, headers=headers)
        check_problem(response, 401, "invalid_api_key")
        assert KEY not in response.text
        assert response.headers["cache-control"] == "no-store"
        asked += 1
    assert asked >= 10


def test_the_key_elsewhere_opens_nothing(client: TestClient) -> None:
    for name in ("X-API-Key", "Api-Key", "Proxy-Authorization", "X-Authorization", "Cookie"):
        check_problem(client.get("/v1/models", headers={name: f"Bearer {KEY}"}), 401, "invalid_api_key")
    for path in (f"/v1/models?key={KEY}", f"/v1/models?authorization=Bearer%20{KEY}", f"/v1/models/{KEY}"):
        response = client.get(path)
        check_problem(response, 401, "invalid_api_key")
        assert KEY not in response.text


def test_the_description_says_where_the_key_is_needed(client: TestClient) -> None:
    page = client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert page["components"]["securitySchemes"].keys() == {"bearer", "basic", "admin"}
    for path, item in page["paths"].items():
        for operation in item.values():
            assert ("security" in operation) == ("401" in operation["responses"]) == (path not in HEALTH)
    open_page = create_app(ServeConfig(classifiers=("claims",))).openapi()
    assert open_page["components"]["securitySchemes"].keys() == {"admin"}
    for path, item in open_page["paths"].items():
        for method, operation in item.items():
            assert (
                ("security" in operation) == ("401" in operation["responses"]) == changes_models(method.upper(), path)
            )
