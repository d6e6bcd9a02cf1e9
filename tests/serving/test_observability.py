"""Every request has an id, a count and one log line, whatever becomes of it; nothing that callers sent is in them."""

from __future__ import annotations

import asyncio
import contextvars
import io
import json
import logging
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Response
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send

from qwen_vl_classifier.serving.observability import (
    MODEL_LABELS,
    JsonFormatter,
    Metrics,
    Observability,
    add_to_log,
    begin_request,
    logging_to_stderr,
)
from tests.waiting import LIMIT, run

SECRET = "a-secret-that-nobody-logs"
LOG = logging.getLogger("qwen_vl_classifier.serving.anything")

METRIC_TYPES = {
    "classifier_requests": "counter",
    "classifier_rejected": "counter",
    "classifier_cancelled": "counter",
    "classifier_batch_split": "counter",
    "classifier_request_seconds": "histogram",
    "classifier_queue_seconds": "histogram",
    "classifier_decode_seconds": "histogram",
    "classifier_inference_seconds": "histogram",
    "classifier_batch_size": "histogram",
    "classifier_batch_tokens": "histogram",
    "classifier_score": "histogram",
    "classifier_queue_depth": "gauge",
    "classifier_running": "gauge",
    "classifier_in_flight": "gauge",
    "classifier_ready": "gauge",
    "classifier_model_info": "gauge",
}
"""Dashboards are made of these names: they stay."""


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


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def samples_of(metrics: Metrics) -> dict[str, float]:
    """Return every sample by its name and labels, as they stand in the text."""
    lines = metrics.exposition()[0].decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


class TestMetrics:
    def test_the_names_and_types(self, metrics: Metrics) -> None:
        body, content_type = metrics.exposition()
        families = {family.name: family for family in text_string_to_metric_families(body.decode())}
        types = {name: family.type for name, family in families.items() if not name.endswith("_created")}
        assert {name: kind for name, kind in types.items() if name.startswith("classifier_")} == METRIC_TYPES
        assert "process_resident_memory_bytes" in types
        assert all(families[name].documentation for name in METRIC_TYPES)
        assert content_type.startswith("text/plain; version=")

    def test_requests_by_route_and_code(self, metrics: Metrics) -> None:
        for code, seconds in ((200, 0.02), (200, 0.3), (429, 0.001)):
            metrics.request("/v1/classify", code, seconds)
        seen = samples_of(metrics)
        assert seen['classifier_requests_total{code="200",route="/v1/classify"}'] == 2
        assert seen['classifier_requests_total{code="429",route="/v1/classify"}'] == 1
        assert seen['classifier_request_seconds_count{route="/v1/classify"}'] == 3
        assert seen['classifier_request_seconds_sum{route="/v1/classify"}'] == pytest.approx(0.321)
        assert seen['classifier_request_seconds_bucket{le="0.025",route="/v1/classify"}'] == 2

    def test_what_a_batcher_records(self, metrics: Metrics) -> None:
        metrics.waited(0.2)
        metrics.depth(7, 3)
        metrics.scored(3, 900, 0.7)
        metrics.split("out_of_memory")
        metrics.cancelled(4)
        seen = samples_of(metrics)
        assert seen["classifier_queue_seconds_sum"] == pytest.approx(0.2)
        assert (seen["classifier_queue_depth"], seen["classifier_running"]) == (7, 3)
        assert seen['classifier_batch_size_bucket{le="4.0"}'] == 1
        assert seen['classifier_batch_size_bucket{le="2.0"}'] == 0
        assert seen["classifier_batch_tokens_sum"] == 900
        assert seen["classifier_inference_seconds_sum"] == pytest.approx(0.7)
        assert seen['classifier_batch_split_total{reason="out_of_memory"}'] == 1
        assert seen["classifier_cancelled_total"] == 4

    def test_what_a_service_records(self, metrics: Metrics) -> None:
        metrics.decoded(0.03)
        metrics.score("claims", 0.42)
        metrics.rejected("queue_full")
        metrics.ready(True)
        metrics.in_flight(2)
        seen = samples_of(metrics)
        assert seen["classifier_in_flight"] == 2
        assert seen["classifier_decode_seconds_count"] == 1
        assert seen['classifier_score_bucket{le="0.4",model="claims"}'] == 0
        assert seen['classifier_score_bucket{le="0.45",model="claims"}'] == 1
        assert seen['classifier_rejected_total{reason="queue_full"}'] == 1
        assert seen["classifier_ready"] == 1
        metrics.ready(False)
        assert samples_of(metrics)["classifier_ready"] == 0

    def test_models_that_are_loaded_now(self, metrics: Metrics) -> None:
        metrics.models({"old": dict.fromkeys(MODEL_LABELS, "x")})
        metrics.models({"claims": {"backbone": "abc", "tap": "-1 mean", "head": "mlp"}})
        infos = [name for name in samples_of(metrics) if name.startswith("classifier_model_info")]
        assert infos == ['classifier_model_info{backbone="abc",head="mlp",model="claims",tap="-1 mean"}']

    def test_two_applications_do_not_add_up(self, metrics: Metrics) -> None:
        Metrics().cancelled(1)
        assert samples_of(metrics)["classifier_cancelled_total"] == 0


class TestLogging:
    def test_a_line(self, stream: io.StringIO) -> None:
        LOG.info("loaded %d of\n%s", 2, "three", extra={"fields": {"seconds": 0.5}})
        (line,) = lines_of(stream)
        assert str(line.pop("time")).endswith("Z")
        assert line == {
            "level": "info",
            "logger": LOG.name,
            "message": "loaded 2 of",
            "exception": "three",
            "seconds": 0.5,
        }

    def test_an_error_has_its_traceback_in_one_line(self, stream: io.StringIO) -> None:
        try:
            raise RuntimeError("first\nsecond" + "x" * 10_000_000)
        except RuntimeError:
            LOG.exception("a request failed")
        assert stream.getvalue().count("\n") == 1
        assert len(stream.getvalue()) < 5_000, "a body would fit in"
        (line,) = lines_of(stream)
        assert "test_observability.py" in line["exception"]
        assert "RuntimeError: first" in line["exception"]

    def test_a_long_traceback_keeps_both_ends(self, stream: io.StringIO) -> None:
        LOG.error("failed", exc_info=RuntimeError("\n".join(f"line {number}" for number in range(100_000))))
        (line,) = lines_of(stream)
        assert "line 3\n" in line["exception"]
        assert "line 99999" in line["exception"]
        assert len(line["exception"]) < 10_000

    def test_what_json_cannot_hold_is_still_a_line(self) -> None:
        # By the formatter alone: what is logged stands in pytest's own report too, which must be text that can be sent.
        record = LOG.makeRecord(
            *(LOG.name, logging.INFO, __file__, 1, "odd \ud800 \x00 \u2028 text", (), None),
            extra={"fields": {"object": object(), "path": "\ud800"}},
        )
        line = JsonFormatter().format(record)
        assert line.isascii()
        assert len(line.splitlines()) == 1
        assert json.loads(line)["path"] == "\ud800"

    def test_other_libraries_and_warnings_come_through_it(self, stream: io.StringIO) -> None:
        logging.getLogger("uvicorn.error").error("Exception in ASGI application")
        logging.getLogger("httpx").info("GET https://example.org/picture?secret")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", DeprecationWarning, stacklevel=1)
        assert [line["logger"] for line in lines_of(stream)] == ["uvicorn.error", "py.warnings"]

    def test_everything_is_as_before_after_it(self) -> None:
        root = logging.getLogger()
        before = root.handlers[:], root.level, logging.getLogger("qwen_vl_classifier").level
        with logging_to_stderr("text", io.StringIO()):
            assert root.handlers != before[0]
        assert (root.handlers[:], root.level, logging.getLogger("qwen_vl_classifier").level) == before

    def test_stderr_is_the_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        with logging_to_stderr("json"):
            LOG.info("here")
        captured = capsys.readouterr()
        assert captured.out == ""
        assert json.loads(captured.err)["message"] == "here"

    def test_lines_for_people(self) -> None:
        with logging_to_stderr("text", stream := io.StringIO()):
            LOG.error("failed", exc_info=RuntimeError("why"), extra={"fields": {"items": 3}})
        first, *rest = stream.getvalue().splitlines()
        assert first.endswith(" error failed items=3")
        assert rest[-1] == "RuntimeError: why"

    def test_lines_of_requests_carry_their_ids(self, stream: io.StringIO) -> None:
        """Those of tasks and threads that a request starts too, and never another's."""

        async def request(number: int) -> dict[str, object]:
            fields = begin_request(f"id-{number}")
            await asyncio.sleep(0)
            add_to_log(items=number)
            await asyncio.create_task(part(number))
            await asyncio.to_thread(LOG.info, "%d", number)
            return fields

        async def part(number: int) -> None:
            add_to_log(models=2)
            LOG.info("%d", number)

        async def main() -> list[dict[str, object]]:
            return await asyncio.gather(*(request(number) for number in range(20)))

        fields = asyncio.run(main())
        LOG.info("outside")
        assert fields == [{"items": number, "models": 2} for number in range(20)]
        *within, outside = lines_of(stream)
        assert len(within) == 40
        assert all(line["request_id"] == f"id-{line['message']}" for line in within)
        assert "request_id" not in outside

    def test_fields_outside_of_requests_are_ignored(self) -> None:
        contextvars.Context().run(add_to_log, items=1)


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


class TestRepeated:
    """A fault that comes again and again is one line a minute."""

    def test_a_warning_is_written_once_a_minute(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        log = logging.getLogger("qwen_vl_classifier.serving")
        with logging_to_stderr("json", stream := io.StringIO()):
            for number in range(1_000):
                log.warning("no connection could be accepted: %s", number)
                log.error("another one")
                log.info("a request")
            now = 61.0
            log.warning("no connection could be accepted: %s", "again")
            log.warning("no connection could be accepted: %s", "again")
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert sum(line["level"] == "info" for line in lines) == 1_000
        first, other, again = (line for line in lines if line["level"] != "info")
        assert (first["message"], other["message"]) == ("no connection could be accepted: 0", "another one")
        assert again["message"] == "no connection could be accepted: again"
        assert again["repeated"] == 999

    def test_tracebacks_of_different_defects_do_not_hide_each_other(self) -> None:
        log = logging.getLogger("qwen_vl_classifier.serving")
        with logging_to_stderr("json", stream := io.StringIO()):
            for _ in range(100):
                try:
                    raise LookupError
                except LookupError:
                    log.exception("a request failed")
            try:
                raise ArithmeticError
            except ArithmeticError:
                log.exception("a request failed")
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        assert sum("LookupError" in line["exception"] for line in lines) == 20
        assert sum("ArithmeticError" in line["exception"] for line in lines) == 1
