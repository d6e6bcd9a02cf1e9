"""Counters, histograms and gauges for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from qwen_vl_classifier.extras import require

require("prometheus_client", extra="serve")  # before it is imported, so that a missing extra is named

from prometheus_client import (  # noqa: E402
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
    values,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead  # noqa: E402
from prometheus_client.registry import Collector  # noqa: E402
from prometheus_client.values import MultiProcessValue  # noqa: E402

from qwen_vl_classifier.serving.observability.drift import Drift  # noqa: E402

if TYPE_CHECKING:
    from qwen_vl_classifier.classifier.score_distribution import ScoreDistribution
    from qwen_vl_classifier.data.example import Decision

MODEL_LABELS = ("version", "backbone", "tap", "head")
"""What `Metrics.models` tells of each classifier beside its name."""

CLIENT_CLOSED_REQUEST = 499
"""The status in log and metrics of a request whose caller left before there was an answer; nobody is sent it."""

_API_ROUTES = ("/v1/", "/classify")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = tuple(2**power for power in range(5, 17))  # 32 to 65,536
_SCORES = tuple(step / 20 for step in range(1, 21))


class Metrics:
    """Counters, histograms and gauges of one application, for Prometheus; also the observer of its batchers.

    Every application has a registry of its own, so that two in one process do not add up. All methods are cheap and may
    be called from any thread.

    Args:
        shared: The folder in which all processes of a server count, where there are several: each tells the sums. They
            must have called `count_together` before. What the system knows of a process (`process_...`) is then left
            out.
        labels: What every sample carries, where others behind the same address tell metrics of their own.

    Example:
        >>> metrics = Metrics()
        >>> metrics.request("/v1/classify", 200, 0.02)
        >>> b'classifier_requests_total{code="200",route="/v1/classify"} 1.0' in metrics.exposition()[0]
        True
    """

    def __init__(self, shared: str | None = None, *, labels: Mapping[str, str] | None = None) -> None:
        self._shared = shared
        self._labels = dict(labels or {})
        self._registry = registry = CollectorRegistry()
        if shared is None:
            ProcessCollector(registry=registry)
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry, multiprocess_mode="livesum")
        histogram = partial(Histogram, registry=registry)
        seconds = partial(histogram, buckets=_SECONDS)
        self._requests = counter("classifier_requests", "Requests by route and status.", ("route", "code"))
        self._rejected = counter("classifier_rejected", "Requests refused, by reason.", ("reason",))
        self._cancelled = counter("classifier_cancelled", "Examples whose client disconnected while they were waiting.")
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
        self._drift = Drift(registry)
        self._served: dict[str, tuple[dict[str, str], ScoreDistribution | None]] = {}
        self._queue_depth = gauge("classifier_queue_depth", "Examples that are waiting.")
        self._running = gauge("classifier_running", "Examples in the current pass.")
        self._in_flight = gauge("classifier_in_flight", "Requests that are accepted and not yet answered.")
        either = partial(gauge, multiprocess_mode="livemax")
        self._ready = either("classifier_ready", "1 when requests are answered, 0 while loading or shutting down.")
        self._model_info = either(
            "classifier_model_info", "1 for each classifier that is served.", ("model", *MODEL_LABELS)
        )
        self._load_failing = either(
            "classifier_model_load_failing", "1 while the newest version of a classifier cannot be served.", ("model",)
        )

    def request(self, route: str, code: int, seconds: float) -> None:
        """Count one request that is over.

        Args:
            route: The template of its route, never the path as it came.
            code: The status of its answer.
            seconds: From its headers to the end of its answer.
        """
        self._requests.labels(route, str(code)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def answered_requests(self) -> int:
        """Return how many requests of the API were answered, errors included; pages and health checks do not count."""
        return int(
            sum(
                sample.value
                for family in self._counted().collect()
                for sample in family.samples
                if sample.name == "classifier_requests_total"
                and sample.labels["route"].startswith(_API_ROUTES)
                and sample.labels["code"] != str(CLIENT_CLOSED_REQUEST)
            )
        )

    def rejected(self, reason: str) -> None:
        """Count a request that was refused, by the code that its caller was told."""
        self._rejected.labels(reason).inc()

    def decoded(self, seconds: float) -> None:
        """Count a picture that was decoded, or could not be."""
        self._decode_seconds.observe(seconds)

    def answered(self, model: str, probability: float, decision: Decision) -> None:
        """Count an answer of a classifier: its calibrated probability of class 1, and what it decided."""
        self._score.labels(model).observe(probability)
        self._drift.answered(model, probability, decision)

    def in_flight(self, count: int) -> None:
        """Record how many requests are accepted and not answered."""
        self._in_flight.set(count)

    def ready(self, ready: bool) -> None:
        """Record whether requests are answered."""
        self._ready.set(ready)

    def models(self, infos: Mapping[str, Mapping[str, str]], scores: Mapping[str, ScoreDistribution | None]) -> None:
        """Record which classifiers are served, each time that this changes.

        Args:
            infos: By name, a value for each of `MODEL_LABELS`.
            scores: By name, how the scores were distributed in training, if that is known. A classifier with another
                value than before, here or in `infos`, is a new one, and drift is measured on its answers alone.
        """
        served = {name: (dict(info), scores[name]) for name, info in infos.items()}
        for name in self._served.keys() | served.keys():
            if served.get(name) != self._served.get(name):
                self._drift.watch(name, scores.get(name))
                self._take_back(name)
        self._served = served
        for name, info in infos.items():
            self._model_info.labels(model=name, **{label: info[label] for label in MODEL_LABELS}).set(1)

    def _take_back(self, name: str) -> None:
        """Tell no longer that a version of a classifier is served."""
        if name not in self._served:
            return
        info, _ = self._served[name]
        labels = {"model": name, **{label: info[label] for label in MODEL_LABELS}}
        self._model_info.labels(**labels).set(0)
        if self._shared is None:  # else the library cannot
            self._model_info.remove_by_labels(labels)

    def load_failing(self, model: str, *, failing: bool) -> None:
        """Record whether the newest version of a classifier cannot be served."""
        self._load_failing.labels(model).set(failing)

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
        return generate_latest(_Complete(self._counted(), self._drift, self._labels)), CONTENT_TYPE_LATEST

    def _counted(self) -> CollectorRegistry:
        """Return what was counted, by all processes where there are several."""
        if self._shared is None:
            return self._registry
        registry = CollectorRegistry()
        MultiProcessCollector(registry, self._shared)  # type: ignore[no-untyped-call]
        return registry


class _Complete(Collector):
    """All that was counted, with what follows from it for drift, and with labels of the whole."""

    def __init__(self, counted: CollectorRegistry, drift: Drift, labels: Mapping[str, str]) -> None:
        self._counted = counted
        self._drift = drift
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        for family in self._drift.add_to(self._counted.collect()):
            family.samples = [sample._replace(labels={**sample.labels, **self._labels}) for sample in family.samples]
            yield family


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
