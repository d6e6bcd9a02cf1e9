"""What a server tells those who run it: an id for each request, the log and the metrics.

Nothing that a caller sent is in them: no text, picture, key, path or query. Requests are named by the template of their
route, and labels of metrics have few values, none of which a caller chooses.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
import time
import traceback
import uuid
from collections import Counter as Counts
from collections.abc import Hashable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from http import HTTPMethod
from typing import Any, Literal, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_vl_classifier.extras import require

require("prometheus_client", extra="serve")  # before it is imported, so that a missing extra is named

from prometheus_client import (  # noqa: E402
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead  # noqa: E402
from prometheus_client.values import MultiProcessValue  # noqa: E402

CLIENT_CLOSED_REQUEST = 499
"""The status in log and metrics of a request whose caller left before there was an answer; nobody is sent it."""

UNROUTED = "unrouted"
"""The route of a request that was refused before one was found, or for which there is none."""

MODEL_LABELS = ("backbone", "tap", "head")
"""What `Metrics.models` tells of each classifier beside its name."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = tuple(2**power for power in range(5, 17))  # 32 to 65,536
_SCORES = tuple(step / 20 for step in range(1, 21))  # fine enough to see a drift that somebody would act on

_MAX_LINE = 300  # characters of a message, and of each line of a traceback: no picture or body fits
_MAX_LINES = 200  # of a traceback

_REPEATED_SECONDS = 60.0  # in which a warning or error is written once,
_TRACEBACKS = 20  # or, with its traceback, so often

_VALID_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset(HTTPMethod)

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_request_fields: ContextVar[dict[str, Any] | None] = ContextVar("request_fields", default=None)

_log = logging.getLogger(__name__)


class Metrics:
    """Counters, histograms and gauges of one application, for Prometheus; also the observer of its batchers.

    Every application has a registry of its own, so that two in one process do not add up. All methods are cheap and may
    be called from any thread.

    Args:
        shared: The folder in which all processes of a server count, where there are several: each tells the sums. They
            must have called `count_together` before. What the system knows of a process (`process_...`) is then left
            out.

    Example:
        >>> metrics = Metrics()
        >>> metrics.request("/v1/classify", 200, 0.02)
        >>> b'classifier_requests_total{code="200",route="/v1/classify"} 1.0' in metrics.exposition()[0]
        True
    """

    def __init__(self, shared: str | None = None) -> None:
        self._shared = shared
        self._registry = registry = CollectorRegistry()
        if shared is None:
            ProcessCollector(registry=registry)
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry, multiprocess_mode="livesum")
        histogram = partial(Histogram, registry=registry)
        seconds = partial(histogram, buckets=_SECONDS)
        self._requests = counter("classifier_requests", "Requests by route and status.", ("route", "code"))
        self._rejected = counter("classifier_rejected", "Requests refused, by reason.", ("reason",))
        self._cancelled = counter("classifier_cancelled", "Examples whose caller left while they waited.")
        self._split = counter(
            "classifier_batch_split", "Passes that failed and were split in half, by reason.", ("reason",)
        )
        self._request_seconds = seconds(
            "classifier_request_seconds", "From the headers of a request to the end of its answer.", ("route",)
        )
        self._queue_seconds = seconds("classifier_queue_seconds", "How long examples waited for a pass.")
        self._decode_seconds = seconds("classifier_decode_seconds", "How long pictures took to decode.")
        self._inference_seconds = seconds("classifier_inference_seconds", "How long passes took.")
        self._batch_size = histogram("classifier_batch_size", "Examples in a pass.", buckets=_ITEMS)
        self._batch_tokens = histogram("classifier_batch_tokens", "Tokens in a pass.", buckets=_TOKENS)
        self._score = histogram("classifier_score", "Probabilities of class 1, by model.", ("model",), buckets=_SCORES)
        self._queue_depth = gauge("classifier_queue_depth", "Examples that wait.")
        self._running = gauge("classifier_running", "Examples in the pass that runs.")
        self._in_flight = gauge("classifier_in_flight", "Requests that are accepted and not answered.")
        either = partial(gauge, multiprocess_mode="livemax")
        self._ready = either("classifier_ready", "1 when requests are answered, 0 while loading or shutting down.")
        self._model_info = either("classifier_model_info", "1 for each loaded classifier.", ("model", *MODEL_LABELS))

    def request(self, route: str, code: int, seconds: float) -> None:
        """Count one request that is over.

        Args:
            route: The template of its route, never the path as it came.
            code: The status of its answer.
            seconds: From its headers to the end of its answer.
        """
        self._requests.labels(route, str(code)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a request that was refused, by the code that its caller was told."""
        self._rejected.labels(reason).inc()

    def decoded(self, seconds: float) -> None:
        """Count a picture that was decoded, or could not be."""
        self._decode_seconds.observe(seconds)

    def score(self, model: str, probability: float) -> None:
        """Count a probability of class 1."""
        self._score.labels(model).observe(probability)

    def in_flight(self, count: int) -> None:
        """Record how many requests are accepted and not answered."""
        self._in_flight.set(count)

    def ready(self, ready: bool) -> None:
        """Record whether requests are answered."""
        self._ready.set(ready)

    def models(self, infos: Mapping[str, Mapping[str, str]]) -> None:
        """Record which classifiers are loaded.

        Args:
            infos: By name, a value for each of `MODEL_LABELS`.
        """
        if self._shared is None:  # else the library cannot
            self._model_info.clear()
        for name, info in infos.items():
            self._model_info.labels(model=name, **{label: info[label] for label in MODEL_LABELS}).set(1)

    def waited(self, seconds: float) -> None:
        """Record how long an example waited for its pass."""
        self._queue_seconds.observe(seconds)

    def scored(self, items: int, cost: float, seconds: float) -> None:
        """Record one pass: its examples, their tokens, and how long it took."""
        self._batch_size.observe(items)
        self._batch_tokens.observe(cost)
        self._inference_seconds.observe(seconds)

    def split(self, reason: Literal["exception", "out_of_memory"]) -> None:
        """Count a pass that failed and was split in half."""
        self._split.labels(reason).inc()

    def cancelled(self, count: int) -> None:
        """Count examples whose caller left while they waited."""
        self._cancelled.inc(count)

    def depth(self, waiting: int, running: int) -> None:
        """Record how many examples wait, and how many are in a pass."""
        self._queue_depth.set(waiting)
        self._running.set(running)

    def exposition(self) -> tuple[bytes, str]:
        """Return all of it in Prometheus's text format, and the content type of that."""
        registry = self._registry
        if self._shared is not None:
            MultiProcessCollector(registry := CollectorRegistry(), self._shared)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST


def count_together(number: int) -> None:
    """Let metrics made from now on count in files of the folder that PROMETHEUS_MULTIPROC_DIR names.

    Args:
        number: That of this process among those which share the folder. One that takes the place of another goes on
            with its counters.
    """
    values.ValueClass = MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]


def forget_gauges(shared: str, number: int) -> None:
    """Remove the gauges of a process that has ended; its counters stay."""
    mark_process_dead(number, shared)  # type: ignore[no-untyped-call]


class Observability:
    """Middleware that gives every request an id, and counts, times and logs it, however it ends.

    It has to be the outermost one, so that it sees what the others refuse. A request brings its id in `X-Request-ID`,
    if that is a plain word, or is given one; the answer carries it. The log has one line for each request.

    Args:
        app: The application behind it.
        metrics: Where to count.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and record how it went."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        request_id = given[0] if len(given) == 1 and _VALID_ID.fullmatch(given[0]) else uuid.uuid4().hex.encode()
        fields = begin_request(request_id.decode())
        started = time.perf_counter()
        status = 0

        async def observed_receive() -> Message:
            nonlocal status
            message = await receive()
            if message["type"] == "http.disconnect":
                status = status or CLIENT_CLOSED_REQUEST
            return message

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = status or message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        try:
            await self.app(scope, observed_receive, observed_send)
        finally:
            # What nobody caught becomes a 500 outside, which also logs its traceback.
            self._record(scope, status or 500, time.perf_counter() - started, fields)

    def _record(self, scope: Scope, status: int, seconds: float, fields: Mapping[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", None) or UNROUTED
        self._metrics.request(route, status, seconds)
        line = {
            "method": scope["method"] if scope["method"] in _METHODS else "other",
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            **fields,
        }
        _log.info("request", extra={"fields": line})


def begin_request(request_id: str) -> dict[str, Any]:
    """Give all log lines of this task, and of those it starts, the id of a request.

    Returns:
        A dictionary that `add_to_log` fills.
    """
    fields: dict[str, Any] = {}
    _request_id.set(request_id)
    _request_fields.set(fields)
    return fields


def add_to_log(**fields: int | float | str) -> None:
    """Add fields to the log line of this request, such as `items=3`.

    Never what the caller sent: numbers, and names that this server chose.
    """
    known = _request_fields.get()
    if known is not None:
        known.update(fields)


@contextlib.contextmanager
def logging_to_stderr(
    log_format: str, stream: TextIO | None = None, fields: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Send every log line and every warning of this process to stderr, until the end of the block.

    Messages of other libraries, the HTTP server's own included, come through here too, from level WARNING on.

    Args:
        log_format: "json" for one object a line, "text" for lines for people.
        stream: Another place than stderr.
        fields: What every line holds, such as which of several processes wrote it.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.addFilter(Repeated())
    if fields:
        handler.addFilter(partial(_add_fields, fields))
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root, own = logging.getLogger(), logging.getLogger(__name__.partition(".")[0])
    before = root.handlers[:], root.level, own.level
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:], level, own_level = before
        root.setLevel(level)
        own.setLevel(own_level)


def _add_fields(fields: Mapping[str, Any], record: logging.LogRecord) -> bool:
    record.fields = {**getattr(record, "fields", {}), **fields}
    return True


class Repeated(logging.Filter):
    """Leave out warnings and errors that are repeated within a minute, so that no fault of the system fills a disk.

    The first one of the next minute says in `repeated` how many were left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._since = -math.inf
        self._counts: Counts[Hashable] = Counts()
        self._left_out: Counts[Hashable] = Counts()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to write a record."""
        if record.levelno < logging.WARNING:
            return True
        now = time.monotonic()
        if now - self._since >= _REPEATED_SECONDS:
            self._since = now
            self._counts.clear()
        raised = record.exc_info[1] if record.exc_info else None
        place = raised.__traceback__.tb_lineno if raised is not None and raised.__traceback__ else 0
        kind = (record.name, record.msg, type(raised), place)
        self._counts[kind] += 1
        if self._counts[kind] > (1 if raised is None else _TRACEBACKS):
            self._left_out[kind] += 1
            return False
        repeated = self._left_out.pop(kind, 0)
        if repeated:
            record.fields = {**getattr(record, "fields", {}), "repeated": repeated}
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        message, further = _message(record)
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **_fields(record),
            **({"exception": further} if further else {}),
        }
        return json.dumps(line, ensure_ascii=True, allow_nan=False, default=str)


class TextFormatter(logging.Formatter):
    """A line for people, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line or lines."""
        message, further = _message(record)
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname.lower()} {message}{fields}"
        return f"{line}\n{further}" if further else line


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the id of the request, and what `extra={"fields": {...}}` holds."""
    request_id = _request_id.get()
    return {**({"request_id": request_id} if request_id else {}), **getattr(record, "fields", {})}


def _message(record: logging.LogRecord) -> tuple[str, str]:
    """Return the first line of a message, and its further lines with the traceback, all of them cut to a bound."""
    first, *lines = record.getMessage().strip().splitlines() or [""]
    if record.exc_info and record.exc_info[1] is not None:
        lines += "".join(traceback.format_exception(record.exc_info[1])).splitlines()
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES // 2], "...", *lines[-_MAX_LINES // 2 :]]
    return _shortened(first), "\n".join(map(_shortened, lines))


def _shortened(line: str) -> str:
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}... ({len(line):,} characters)"
