"""The outermost layer, around small applications: every request has an id, a count and a line, whatever happens."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Response
from starlette.types import Receive, Scope, Send

from qwen_vl_classifier.serving.logs import logging_to_stderr, note
from qwen_vl_classifier.serving.metrics import Metrics
from qwen_vl_classifier.serving.observing import Observed
from tests.waiting import LIMIT, run

SECRET = "a-secret-that-nobody-logs"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    with logging_to_stderr("json", stream := io.StringIO()):
        yield stream


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def app(metrics: Metrics) -> FastAPI:
    app, router = FastAPI(), APIRouter(prefix="/v1")

    @router.get("/things/{name}")
    async def thing(name: str) -> dict[str, str]:
        note(items=3)
        return {"name": name}

    @router.post("/broken")
    async def broken() -> None:
        raise RuntimeError("broken")

    app.include_router(router)
    app.add_middleware(Observed, metrics=metrics)
    return app


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return run(work())


def one_line(stream: io.StringIO) -> dict[str, Any]:
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines() if '"message": "request"' in line]
    return line


def count(metrics: Metrics, route: str, code: int) -> float:
    name = f'classifier_requests_total{{code="{code}",route="{route}"}} '
    (value,) = re.findall(re.escape(name) + "(.*)", metrics.exposition()[0].decode())
    return float(value)


def test_a_request(app: FastAPI, metrics: Metrics, stream: io.StringIO) -> None:
    response = ask(
        app,
        "GET",
        f"/v1/things/{SECRET}?q={SECRET}",
        headers={"Authorization": f"Bearer {SECRET}", "User-Agent": SECRET, "Cookie": SECRET},
    )
    line = one_line(stream)
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    assert line["request_id"] == response.headers["x-request-id"]
    assert (line["method"], line["route"], line["status"]) == ("GET", "/v1/things/{name}", 200)
    assert line["items"] == 3
    assert 0 <= line["seconds"] < LIMIT
    assert count(metrics, "/v1/things/{name}", 200) == 1
    assert SECRET not in stream.getvalue()
    assert SECRET not in metrics.exposition()[0].decode()


@pytest.mark.parametrize(
    ("method", "path", "status", "route"),
    [
        ("GET", f"/{SECRET}", 404, "unrouted"),
        ("DELETE", "/v1/things/a", 405, "/v1/things/{name}"),
        ("POST", "/v1/broken", 500, "/v1/broken"),
        (SECRET, f"/{SECRET}", 404, "unrouted"),
    ],
)
def test_what_goes_wrong_counts_too(
    app: FastAPI, metrics: Metrics, stream: io.StringIO, method: str, path: str, status: int, route: str
) -> None:
    assert ask(app, method, path).status_code == status
    line = one_line(stream)
    assert (line["status"], line["route"]) == (status, route)
    assert line["method"] == (method if method != SECRET else "other")
    assert count(metrics, route, status) == 1
    assert SECRET not in stream.getvalue()


@pytest.mark.parametrize("given", ["7", "a-b_c.D", "x" * 64])
def test_a_callers_id_is_kept(app: FastAPI, stream: io.StringIO, given: str) -> None:
    assert ask(app, "GET", "/", headers={"X-Request-ID": given}).headers["x-request-id"] == given
    assert one_line(stream)["request_id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "two words", 'a"b', "\u00e4", "<script>"])
def test_what_is_no_plain_word_is_no_id(app: FastAPI, given: str) -> None:
    response = ask(app, "GET", "/", headers={"X-Request-ID": given.encode()})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_two_ids_are_none(app: FastAPI) -> None:
    response = ask(app, "GET", "/", headers=[("X-Request-ID", "a"), ("X-Request-ID", "b")])
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def spoken(metrics: Metrics, app: Any, *received: dict[str, Any]) -> None:
    """Ask an application in ASGI itself, as a client does that goes away."""
    messages = list(received)

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    run(Observed(app, metrics=metrics)(scope, receive, send))


def test_one_who_leaves_before_the_answer(metrics: Metrics, stream: io.StringIO) -> None:
    async def answers_nobody(_scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await Response(status_code=400)(_scope, receive, send)

    spoken(metrics, answers_nobody, {"type": "http.disconnect"})
    assert one_line(stream)["status"] == 499
    assert count(metrics, "unrouted", 499) == 1


def test_one_who_leaves_after_the_answer(metrics: Metrics, stream: io.StringIO) -> None:
    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(status_code=202)(scope, receive, send)
        await receive()

    spoken(metrics, answers, {"type": "http.disconnect"})
    assert one_line(stream)["status"] == 202


def test_one_that_is_cancelled(metrics: Metrics, stream: io.StringIO) -> None:
    async def waits(*_: Any) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        spoken(metrics, waits)
    assert count(metrics, "unrouted", 500) == 1


def test_what_is_no_request_passes(metrics: Metrics, stream: io.StringIO) -> None:
    seen = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        return {}

    run(Observed(app, metrics=metrics)({"type": "lifespan"}, nothing, nothing))
    assert seen == ["lifespan"]
    assert stream.getvalue() == ""
