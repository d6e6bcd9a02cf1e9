"""Every request has an id, a count and one log line, whatever becomes of it; nothing that callers sent is in them."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Response
from starlette.types import Receive, Scope, Send

from qwen_vl_classifier.serving.observability.logs import add_to_log, logging_to_stderr
from qwen_vl_classifier.serving.observability.middleware import Observability
from qwen_vl_classifier.serving.observability.prometheus import Metrics
from tests.serving.observability.reading import lines_of, samples_of
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
        add_to_log(items=3)
        return {"name": name}

    @router.post("/broken")
    async def broken() -> None:
        raise RuntimeError("broken")

    app.include_router(router)
    app.add_middleware(Observability, metrics=metrics)
    return app


def send(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return run(work())


def one_line(stream: io.StringIO) -> dict[str, Any]:
    (line,) = [line for line in lines_of(stream) if line["message"] == "request"]
    return line


def count(metrics: Metrics, route: str, code: int) -> float:
    return samples_of(metrics)[f'classifier_requests_total{{code="{code}",route="{route}"}}']


class TestRequests:
    def test_one(self, app: FastAPI, metrics: Metrics, stream: io.StringIO) -> None:
        response = send(
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
        self, app: FastAPI, metrics: Metrics, stream: io.StringIO, method: str, path: str, status: int, route: str
    ) -> None:
        assert send(app, method, path).status_code == status
        line = one_line(stream)
        assert (line["status"], line["route"]) == (status, route)
        assert line["method"] == (method if method != SECRET else "other")
        assert count(metrics, route, status) == 1
        assert SECRET not in stream.getvalue()

    def test_no_caller_makes_the_metrics_grow(self, app: FastAPI, metrics: Metrics) -> None:
        def send_all(name: str) -> None:
            for method, path in (("GET", f"/{name}"), ("GET", f"/v1/things/{name}"), (name.upper(), f"/v1/{name}")):
                send(app, method, path, headers={"X-Request-ID": name, "Host": name})

        send_all("first")
        before = samples_of(metrics).keys()
        for number in range(10):
            send_all(f"name-{number}")
        assert samples_of(metrics).keys() == before

    @pytest.mark.parametrize("given", ["7", "a-b_c.D", "x" * 64])
    def test_a_callers_id_is_kept(self, app: FastAPI, stream: io.StringIO, given: str) -> None:
        assert send(app, "GET", "/", headers={"X-Request-ID": given}).headers["x-request-id"] == given
        assert one_line(stream)["request_id"] == given

    @pytest.mark.parametrize("given", [[""], ["x" * 65], ["two words"], ['a"b'], ["\u00e4"], ["<script>"], ["a", "b"]])
    def test_what_is_no_plain_word_is_no_id(self, app: FastAPI, given: list[str]) -> None:
        response = send(app, "GET", "/", headers=[(b"X-Request-ID", value.encode()) for value in given])
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def call(metrics: Metrics, app: Any, scope_type: str = "http") -> None:
    """Call an application in ASGI itself, as a client does that goes away at once."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    scope = {"type": scope_type, "method": "POST", "path": "/", "headers": []}
    run(Observability(app, metrics=metrics)(scope, receive, send))


class TestCallersWhoLeave:
    def test_before_the_answer(self, metrics: Metrics, stream: io.StringIO) -> None:
        async def answers_nobody(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await Response(status_code=400)(scope, receive, send)

        call(metrics, answers_nobody)
        assert one_line(stream)["status"] == 499
        assert count(metrics, "unrouted", 499) == 1

    def test_after_the_answer(self, metrics: Metrics, stream: io.StringIO) -> None:
        async def answers(scope: Scope, receive: Receive, send: Send) -> None:
            await Response(status_code=202)(scope, receive, send)
            await receive()

        call(metrics, answers)
        assert one_line(stream)["status"] == 202

    def test_a_request_that_is_cancelled(self, metrics: Metrics) -> None:
        async def waits(*_: Any) -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            call(metrics, waits)
        assert count(metrics, "unrouted", 500) == 1


def test_what_is_no_request_passes(metrics: Metrics, stream: io.StringIO) -> None:
    seen = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["type"])

    call(metrics, app, "lifespan")
    assert seen == ["lifespan"]
    assert stream.getvalue() == ""
