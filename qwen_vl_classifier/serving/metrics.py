"""What a server counts and times, for Prometheus.

Every application has a registry of its own, so that two in one process do not add up. Labels have few values, and
none of them is chosen by a caller: routes are templates, models are the loaded ones, and anything else is `other`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

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
)

MODEL_LABELS = ("backbone", "tap", "head")
"""What `Metrics.models` tells of each classifier beside its name."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = tuple(2**power for power in range(5, 17))  # 32 to 65,536
_SCORES = tuple(step / 20 for step in range(1, 21))  # as fine as a drift that somebody would act on
_MOST_VALUES = 64  # of a label; no honest server comes near it

_OTHER = "other"


class Metrics:
    """Counters, histograms and gauges of one application; also the observer of its batchers.

    All methods are cheap and may be called from any thread.

    Example:
        >>> metrics = Metrics()
        >>> metrics.request("/v1/classify", 200, 0.02)
        >>> b'classifier_requests_total{code="200",route="/v1/classify"} 1.0' in metrics.exposition()[0]
        True
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "classifier_requests", "Requests by route and status.", ("route", "code"), registry=registry
        )
        self._rejected = Counter("classifier_rejected", "Requests refused, by reason.", ("reason",), registry=registry)
        self._cancelled = Counter(
            "classifier_cancelled", "Examples whose caller left while they waited.", registry=registry
        )
        self._split = Counter(
            "classifier_batch_split", "Passes that failed and were halved, by reason.", ("reason",), registry=registry
        )
        self._request_seconds = Histogram(
            "classifier_request_seconds",
            "From the headers of a request to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue_seconds = self._seconds("queue", "How long examples waited for a pass.")
        self._decode_seconds = self._seconds("decode", "How long pictures took to decode.")
        self._inference_seconds = self._seconds("inference", "How long passes took.")
        self._batch_size = Histogram("classifier_batch_size", "Examples in a pass.", buckets=_ITEMS, registry=registry)
        self._batch_tokens = Histogram(
            "classifier_batch_tokens", "Tokens in a pass.", buckets=_TOKENS, registry=registry
        )
        self._score = Histogram(
            "classifier_score", "Probabilities of class 1, by model.", ("model",), buckets=_SCORES, registry=registry
        )
        self._queue_depth = Gauge("classifier_queue_depth", "Examples that wait.", registry=registry)
        self._running = Gauge("classifier_running", "Examples in the pass that runs.", registry=registry)
        self._in_flight = Gauge(
            "classifier_in_flight", "Requests that are accepted and not answered.", registry=registry
        )
        self._ready = Gauge("classifier_ready", "1 when requests are welcome.", registry=registry)
        self._model_info = Gauge(
            "classifier_model_info",
            "1 for each loaded classifier.",
            ("model", *MODEL_LABELS),
            registry=registry,
        )
        self._values: dict[str, set[str]] = {}

    def request(self, route: str, code: int, seconds: float) -> None:
        """Count one request that is over.

        Args:
            route: The template of its route, never the path as it came.
            code: The status of its answer; 499 for a caller who left before there was one.
            seconds: From its headers to the end of its answer.
        """
        route = self._bounded("route", route)
        self._requests.labels(route, str(code)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a request that was refused, by the code that its caller was told."""
        self._rejected.labels(self._bounded("reason", reason)).inc()

    def decoded(self, seconds: float) -> None:
        """Count a picture that was decoded, or could not be."""
        self._decode_seconds.observe(seconds)

    def score(self, model: str, probability: float) -> None:
        """Count a probability of class 1."""
        self._score.labels(self._bounded("model", model)).observe(probability)

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """Count a request as accepted and not answered."""
        with self._in_flight.track_inprogress():
            yield

    def ready(self, ready: bool) -> None:
        """Say whether requests are welcome."""
        self._ready.set(ready)

    def models(self, infos: Mapping[str, Mapping[str, str]]) -> None:
        """Say which classifiers are loaded.

        Args:
            infos: By name, a value for each of `MODEL_LABELS`.
        """
        self._model_info.clear()
        for name, info in infos.items():
            self._model_info.labels(model=name, **{label: info[label] for label in MODEL_LABELS}).set(1)

    def waited(self, seconds: float) -> None:
        """Take in how long an example waited for its pass."""
        self._queue_seconds.observe(seconds)

    def scored(self, items: int, cost: int, seconds: float) -> None:
        """Take in one pass: its examples, their tokens, and how long it took."""
        self._batch_size.observe(items)
        self._batch_tokens.observe(cost)
        self._inference_seconds.observe(seconds)

    def split(self, reason: Literal["exception", "out_of_memory"]) -> None:
        """Count a pass that failed and was halved."""
        self._split.labels(reason).inc()

    def cancelled(self, count: int) -> None:
        """Count examples whose caller left while they waited."""
        self._cancelled.inc(count)

    def depth(self, waiting: int, running: int) -> None:
        """Say how many examples wait, and how many are in a pass."""
        self._queue_depth.set(waiting)
        self._running.set(running)

    def exposition(self) -> tuple[bytes, str]:
        """Return all of it in Prometheus's text format, and the content type of that."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _seconds(self, what: str, help: str) -> Histogram:
        return Histogram(f"classifier_{what}_seconds", help, buckets=_SECONDS, registry=self._registry)

    def _bounded(self, label: str, value: str) -> str:
        """Return a value of a label, or `other` once it has had more values than it should ever have."""
        seen = self._values.setdefault(label, set())
        if value not in seen:
            if len(seen) >= _MOST_VALUES:
                return _OTHER
            seen.add(value)
        return value
