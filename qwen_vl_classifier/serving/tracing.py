"""Traces of requests for OpenTelemetry, by the extra "tracing".

Where they go is said by OpenTelemetry's own environment variables, such as `OTEL_EXPORTER_OTLP_ENDPOINT`. The
instrumentation takes down more than this server wants to tell: URLs as they came, addresses, texts of exceptions. So
a span is rebuilt on its way out from what is known to be harmless.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_vl_classifier.extras import require

for _module in ("opentelemetry.sdk.trace", "opentelemetry.instrumentation.fastapi"):
    require(_module, extra="tracing")  # before they are imported, so that a missing extra is named

from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor  # noqa: E402
from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: E402
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult  # noqa: E402
from opentelemetry.trace import Span, SpanContext, Status, format_trace_id  # noqa: E402

import qwen_vl_classifier  # noqa: E402
from qwen_vl_classifier.serving.observing import TRACE_ID  # noqa: E402

if TYPE_CHECKING:
    from fastapi import FastAPI

HARMLESS = frozenset(
    {
        "error.type",
        "exception.type",
        "http.method",
        "http.request.method",
        "http.response.status_code",
        "http.route",
        "http.scheme",
        "http.status_code",
        "network.protocol.version",
        "url.scheme",
    }
)
"""The attributes of spans and events that are sent: under the old names of OpenTelemetry's and under the new."""

_QUIET = "/livez$,/readyz$,/metrics$,/v2/health/"  # asked every few seconds by machines
_SECONDS_TO_SEND = 2.0  # at the end, for what has not been sent


class Tracing:
    """Traces of an application's requests: a span for each, under the caller's own where its headers name one.

    Args:
        app: The application, before its first request.
        exporter: Where the spans go; the default sends them as OTLP over HTTP, as its environment variables say.

    Raises:
        MissingExtraError: The extra "tracing" is not installed.
    """

    def __init__(self, app: FastAPI, *, exporter: SpanExporter | None = None) -> None:
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(HarmlessSpans(exporter or _otlp_exporter())))
        FastAPIInstrumentor.instrument_app(
            app,
            server_request_hook=_tell_log,
            tracer_provider=self._provider,
            excluded_urls=_QUIET,
            exclude_spans=["receive", "send"],
        )

    def close(self) -> None:
        """Send what has not been sent; it blocks, for some seconds if nobody takes it."""
        # The provider itself would wait half a minute for a collector that is not there.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_SECONDS_TO_SEND)


class HarmlessSpans(SpanExporter):
    """Pass spans on without anything that a caller chose.

    Args:
        exporter: Where to.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Pass some on."""
        return self._exporter.export([_harmless(span) for span in spans])

    def shutdown(self) -> None:
        """Pass none on any more."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Wait for what is on its way."""
        return self._exporter.force_flush(timeout_millis)


def _harmless(span: ReadableSpan) -> ReadableSpan:
    return ReadableSpan(
        name=span.name,  # method and template of the route
        context=_without_state(span.context),
        parent=_without_state(span.parent),
        resource=span.resource,
        attributes=_only_harmless(span.attributes),
        events=[Event(event.name, _only_harmless(event.attributes), event.timestamp) for event in span.events],
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _without_state(context: SpanContext | None) -> SpanContext | None:
    if context is None:
        return None
    return SpanContext(context.trace_id, context.span_id, context.is_remote, context.trace_flags)


def _only_harmless(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (attributes or {}).items() if name in HARMLESS}


def _resource() -> Resource:
    """Return what the environment says of this service; its name, unless it is given there, is this package's."""
    resource = Resource.create({"service.version": qwen_vl_classifier.__version__})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "qwen-vl-classifier"}))
    return resource


def _tell_log(span: Span, scope: dict[str, Any]) -> None:
    """Let the request's line in the log name its trace."""
    scope[TRACE_ID] = format_trace_id(span.get_span_context().trace_id)


def _otlp_exporter() -> SpanExporter:
    require("opentelemetry.exporter.otlp.proto.http", extra="tracing")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
