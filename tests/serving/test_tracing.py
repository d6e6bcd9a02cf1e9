"""Spans of requests, without anything that callers sent."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from qwen_vl_classifier.serving import tracing as tracing_module
from qwen_vl_classifier.serving.logs import logging_to_stderr
from qwen_vl_classifier.serving.metrics import Metrics
from qwen_vl_classifier.serving.observing import Observed
from qwen_vl_classifier.serving.tracing import HARMLESS, Tracing
from tests.waiting import LIMIT, run

SECRET = "a-secret-that-nobody-sends"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()

    @app.get("/things/{name}")
    async def thing(name: str) -> str:
        if name == "broken":
            raise RuntimeError(SECRET)
        return name

    @app.get("/livez")
    async def livez() -> str:
        return "live"

    app.add_middleware(Observed, metrics=Metrics())
    return app


@pytest.fixture
def exporter(app: FastAPI) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing = Tracing(app, exporter=exporter)
    app.state.tracing = tracing
    yield exporter
    tracing.close()


def ask(app: FastAPI, path: str, **headers: str) -> httpx.Response:
    async def work() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers=headers)

    return run(work())


def spans_of(app: FastAPI, exporter: InMemorySpanExporter) -> Sequence[ReadableSpan]:
    app.state.tracing.close()
    return exporter.get_finished_spans()


def test_a_request_is_one_span_under_its_callers(app: FastAPI, exporter: InMemorySpanExporter) -> None:
    with logging_to_stderr("json", stream := io.StringIO()):
        ask(
            app,
            f"/things/{SECRET}?q={SECRET}",
            traceparent=f"00-{TRACE}-{PARENT}-01",
            tracestate=f"a={SECRET}",
            authorization=f"Bearer {SECRET}",
            **{"user-agent": SECRET},
        )
    (span,) = spans_of(app, exporter)
    assert span.name == "GET /things/{name}"
    assert span.context is not None
    assert span.parent is not None
    assert (span.context.trace_id, span.parent.span_id) == (int(TRACE, 16), int(PARENT, 16))
    assert span.attributes is not None
    assert span.attributes.keys() <= HARMLESS
    assert span.attributes["http.route"] == "/things/{name}"
    assert 200 in span.attributes.values()
    assert span.resource.attributes["service.name"] == "qwen-vl-classifier"
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.end_time > span.start_time
    assert SECRET not in span.to_json()
    assert json.loads(stream.getvalue())["trace_id"] == TRACE


def test_a_defect_is_told_without_its_text(app: FastAPI, exporter: InMemorySpanExporter) -> None:
    assert ask(app, "/things/broken").status_code == 500
    (span,) = spans_of(app, exporter)
    assert span.status.status_code is StatusCode.ERROR
    assert [dict(event.attributes or {}) for event in span.events] == [{"exception.type": "RuntimeError"}]
    assert SECRET not in span.to_json()


def test_no_path_is_told_where_there_is_no_route(app: FastAPI, exporter: InMemorySpanExporter) -> None:
    assert ask(app, f"/{SECRET}").status_code == 404
    (span,) = spans_of(app, exporter)
    assert span.name == "GET"
    assert SECRET not in span.to_json()


def test_health_is_not_traced(app: FastAPI, exporter: InMemorySpanExporter) -> None:
    assert ask(app, "/livez").status_code == 200
    assert spans_of(app, exporter) == ()


def test_the_environment_names_the_service(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "claims")
    exporter = InMemorySpanExporter()
    app.state.tracing = Tracing(app, exporter=exporter)
    ask(app, "/things/a")
    assert [span.resource.attributes["service.name"] for span in spans_of(app, exporter)] == ["claims"]


def test_the_end_does_not_wait_for_a_collector_that_hangs(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()

    class Hanging(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            answers.wait()
            return SpanExportResult.FAILURE

    monkeypatch.setattr(tracing_module, "_SECONDS_TO_SEND", 0.01)
    tracing = Tracing(app, exporter=Hanging())
    ask(app, "/things/a")
    closing = threading.Thread(target=tracing.close)
    closing.start()
    closing.join(LIMIT)
    ended = not closing.is_alive()
    answers.set()
    assert ended, "it waited for an answer"


def test_a_missing_extra_is_named() -> None:
    program = """
import sys
sys.modules["opentelemetry.instrumentation.fastapi"] = None  # as if it were not installed
from qwen_vl_classifier import ServeConfig, create_app
create_app(ServeConfig(classifiers=("a",)))
try:
    create_app(ServeConfig(classifiers=("a",), tracing=True))
except ImportError as error:
    print(type(error).__name__, error)
"""
    done: Any = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout == (
        "MissingExtraError opentelemetry.instrumentation.fastapi is not installed; "
        "run: pip install 'qwen-vl-classifier[tracing]'\n"
    ), done.stderr
