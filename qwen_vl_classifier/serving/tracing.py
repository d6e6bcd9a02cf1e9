"""Traces of requests for OpenTelemetry, by the extra "tracing"."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.sdk.trace.export import SpanExporter


class Tracing:
    """Traces of an application's requests.

    Args:
        app: The application, before its first request.
        exporter: Where the spans go; the default sends them as OTLP over HTTP where the environment variables of
            OpenTelemetry say.

    Raises:
        MissingExtraError: The extra "tracing" is not installed.
    """

    def __init__(self, app: FastAPI, *, exporter: SpanExporter | None = None) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Send what has not been sent. It blocks, for seconds if nobody takes the spans."""
        raise NotImplementedError
