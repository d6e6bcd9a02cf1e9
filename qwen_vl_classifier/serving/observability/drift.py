"""Drift: how classifiers decide, and how far recent scores are from those of their training records.

Counters say into which bin of the training scores each answer fell. They add up over processes, machines and time, so
that Prometheus can compare any window; the stability index of a window of answers is told ready-made.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from threading import Lock
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric
from prometheus_client.core import GaugeMetricFamily

from qwen_vl_classifier.classifier.score_distribution import ScoreDistribution
from qwen_vl_classifier.data.example import Decision

WINDOW = 2_000
"""So many answers of each process are recent: enough that chance moves the index by about 0.005."""

FEWEST = 200
"""With fewer recent answers there is no index: it would mostly tell of chance."""

_RECENT = "classifier_score_bin_recent"


class Drift:
    """Counters and gauges of decisions and of scores by bin; methods may be called from any thread.

    Args:
        registry: Where the counters are to be.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._decisions = Counter(
            "classifier_decisions", "Answers by model and decision.", ("model", "decision"), registry=registry
        )
        self._bins = Counter(
            "classifier_score_bin",
            "Answers by model and bin of the scores in its training record.",
            ("model", "bin"),
            registry=registry,
        )
        self._recent = Gauge(
            _RECENT,
            f"The same for the last {WINDOW:,} answers of each process.",
            ("model", "bin"),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._watched: dict[str, _Watched] = {}
        self._lock = Lock()

    def watch(self, model: str, distribution: ScoreDistribution | None) -> None:
        """Compare the scores of a classifier with a distribution from now on; no answer before this is recent.

        Args:
            model: Its name.
            distribution: Of its training record. `None` where that has none, or where the classifier is not served any
                more: then nothing is compared.
        """
        for decision in get_args(Decision):
            self._decisions.labels(model, decision)  # 0 before the first: a counter that appears at 1 has no increase
        with self._lock:
            before = self._watched.pop(model, None)
            for gauge in before.recent if before else ():
                gauge.set(0)
            if distribution is not None:
                names = [str(number) for number, _ in enumerate(distribution.counts, start=1)]
                self._watched[model] = _Watched(
                    distribution,
                    [self._bins.labels(model, name) for name in names],
                    [self._recent.labels(model, name) for name in names],
                )

    def answered(self, model: str, score: float, decision: Decision) -> None:
        """Count an answer."""
        self._decisions.labels(model, decision).inc()
        with self._lock:
            watched = self._watched.get(model)
            if watched is not None:
                watched.count(score)

    def add_to(self, counted: Iterable[Metric]) -> Iterator[Metric]:
        """Return metrics with what follows from them: the shares of the training record, and the indices.

        Args:
            counted: All that was counted, where several processes count the sums.
        """
        recent: dict[str, dict[str, float]] = defaultdict(dict)
        for family in counted:
            if family.name == _RECENT:
                for sample in family.samples:
                    recent[sample.labels["model"]][sample.labels["bin"]] = sample.value
            yield family
        with self._lock:
            watched = {model: one.distribution for model, one in self._watched.items()}
        yield from _compared(watched, recent)


class _Watched:
    """The recent scores of one classifier.

    Args:
        distribution: With which they are compared.
        bins: A counter for each bin.
        recent: A gauge for each bin.

    Attributes:
        distribution: The same.
        recent: The same.
    """

    def __init__(self, distribution: ScoreDistribution, bins: list[Counter], recent: list[Gauge]) -> None:
        self.distribution = distribution
        self.recent = recent
        self._bins = bins
        self._window: deque[int] = deque()

    def count(self, score: float) -> None:
        """Count a score, and forget the oldest of a full window."""
        number = self.distribution.bin_of(score)
        self._bins[number].inc()
        self.recent[number].inc()
        self._window.append(number)
        if len(self._window) > WINDOW:
            self.recent[self._window.popleft()].dec()


def _compared(
    watched: Mapping[str, ScoreDistribution], recent: Mapping[str, Mapping[str, float]]
) -> tuple[Metric, ...]:
    """Return the shares of training scores by bin, and the indices of recent scores against them."""
    reference = GaugeMetricFamily(
        "classifier_score_bin_reference", "Share of the training scores by bin.", labels=("model", "bin")
    )
    index = GaugeMetricFamily(
        "classifier_score_psi",
        f"Population stability index of recent scores against the training scores; none below {FEWEST} answers.",
        labels=("model",),
    )
    chance = GaugeMetricFamily(
        "classifier_score_psi_chance",
        "What classifier_score_psi exceeds once in 1,000 windows if nothing has changed.",
        labels=("model",),
    )
    answers = GaugeMetricFamily(
        "classifier_score_psi_answers", "Recent answers that are compared with the training scores.", labels=("model",)
    )
    for model, distribution in watched.items():
        names = [str(number) for number, _ in enumerate(distribution.counts, start=1)]
        for name, share in zip(names, distribution.shares, strict=True):
            reference.add_metric((model, name), share)
        counts = [recent.get(model, {}).get(name, 0.0) for name in names]
        total = sum(counts)
        answers.add_metric((model,), total)
        if total >= FEWEST:
            for family, value in zip((index, chance), distribution.compare(counts), strict=True):
                family.add_metric((model,), value)
    return reference, index, chance, answers
