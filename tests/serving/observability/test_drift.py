"""Drift: the share of each decision, and how far recent scores are from those of the training record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import values

from qwen_vl_classifier import Backbone, Classifier, Example, ServeConfig, Tap
from qwen_vl_classifier.classifier.head import HeadSpec
from qwen_vl_classifier.classifier.score_distribution import (
    RECORDED,
    ScoreDistribution,
    distribution_record,
    index_by_chance,
    stability_index,
)
from qwen_vl_classifier.serving.observability import drift
from qwen_vl_classifier.serving.observability.drift import FEWEST, WINDOW
from qwen_vl_classifier.serving.observability.prometheus import MODEL_LABELS, Metrics, count_together, forget_gauges
from tests.serving.observability.reading import samples_of
from tests.serving.served import ready_client

INFO = dict.fromkeys(MODEL_LABELS, "x")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def distribution() -> ScoreDistribution:
    found = ScoreDistribution.of(np.random.default_rng(1).beta(0.5, 0.5, 2000))
    assert found is not None
    return found


def matching(count: int) -> list[float]:
    return [float(score) for score in RNG.beta(0.5, 0.5, count)]


def shifted(count: int) -> list[float]:
    return [float(score) for score in RNG.beta(3, 1, count)]


def answer(metrics: Metrics, scores: Iterable[float], model: str = "claims") -> None:
    for score in scores:
        metrics.answered(model, score, "yes" if score > 0.5 else "no")


def watching(distribution: ScoreDistribution | None, shared: str | None = None) -> Metrics:
    metrics = Metrics(shared)
    metrics.models({"claims": INFO}, {"claims": distribution})
    return metrics


def psi(metrics: Metrics, name: str = "") -> float | None:
    return samples_of(metrics).get(f'classifier_score_psi{name}{{model="claims"}}')


def bins(metrics: Metrics, name: str) -> list[float]:
    seen = samples_of(metrics)
    return [seen[f'classifier_score_bin_{name}{{bin="{number}",model="claims"}}'] for number in range(1, 11)]


class TestIndex:
    def test_scores_like_those_of_training_leave_it_low_and_others_raise_it(self, distribution):
        metrics = watching(distribution)
        answer(metrics, matching(WINDOW))
        assert psi(metrics) < psi(metrics, "_chance") < 0.1
        answer(metrics, shifted(WINDOW))
        assert psi(metrics) > 0.25 > psi(metrics, "_chance")
        answer(metrics, matching(WINDOW))
        assert psi(metrics) < 0.1, "answers of long ago do not count"

    def test_it_is_that_of_the_recent_answers(self, distribution):
        metrics = watching(distribution)
        scores = [*shifted(700), *matching(WINDOW)]
        answer(metrics, scores)
        recent = distribution.counts_of(np.array(scores[-WINDOW:]))
        assert bins(metrics, "recent") == recent
        assert bins(metrics, "total") == distribution.counts_of(np.array(scores))
        assert bins(metrics, "reference") == pytest.approx(distribution.shares)
        assert psi(metrics) == pytest.approx(stability_index(distribution.counts, recent))
        assert psi(metrics, "_chance") == pytest.approx(index_by_chance(10, 2000, WINDOW))
        assert psi(metrics, "_answers") == WINDOW

    def test_few_answers_have_none(self, distribution):
        metrics = watching(distribution)
        assert (psi(metrics), psi(metrics, "_answers")) == (None, 0)
        answer(metrics, shifted(FEWEST - 1))
        assert (psi(metrics), psi(metrics, "_chance"), psi(metrics, "_answers")) == (None, None, FEWEST - 1)
        answer(metrics, shifted(1))
        assert psi(metrics) > 0.25

    def test_one_score_for_all_is_a_large_finite_change(self, distribution):
        metrics = watching(distribution)
        answer(metrics, [1.0] * FEWEST)
        assert 1 < psi(metrics) < 20

    def test_without_a_record_there_are_decisions_alone(self):
        metrics = watching(None)
        answer(metrics, shifted(FEWEST))
        seen = samples_of(metrics)
        assert not [name for name in seen if name.startswith(("classifier_score_psi", "classifier_score_bin"))]
        assert sum(value for name, value in seen.items() if name.startswith("classifier_decisions_total")) == FEWEST


class TestVersions:
    def test_a_new_version_begins_anew(self, distribution):
        metrics = watching(distribution)
        answer(metrics, shifted(FEWEST))
        metrics.models({"claims": INFO, "other": INFO}, {"claims": distribution, "other": None})
        assert psi(metrics, "_answers") == FEWEST, "it is the same version"
        metrics.models({"claims": INFO | {MODEL_LABELS[0]: "y"}}, {"claims": distribution})
        assert (psi(metrics), psi(metrics, "_answers")) == (None, 0)
        assert sum(bins(metrics, "total")) == FEWEST, "counters never fall"
        answer(metrics, matching(WINDOW))
        assert psi(metrics) < 0.1

    def test_other_bins(self, distribution):
        metrics = watching(distribution)
        answer(metrics, shifted(FEWEST))
        two = ScoreDistribution((0.5,), (100.0, 100.0))
        metrics.models({"claims": INFO}, {"claims": two})
        answer(metrics, [0.2, 0.8] * FEWEST)
        assert psi(metrics) == 0
        assert bins(metrics, "recent") == [FEWEST, FEWEST, *[0] * 8]

    def test_one_that_is_served_no_more(self, distribution):
        metrics = watching(distribution)
        answer(metrics, shifted(FEWEST))
        metrics.models({}, {})
        answer(metrics, shifted(1))  # of a request that began before
        assert (psi(metrics), psi(metrics, "_answers")) == (None, None)


def test_decisions(distribution):
    metrics = watching(distribution)
    name = 'classifier_decisions_total{{decision="{}",model="claims"}}'.format
    assert [samples_of(metrics)[name(one)] for one in ("yes", "no", "abstain")] == [0, 0, 0]
    for decision in ("yes", "no", "no", "abstain", "no"):
        metrics.answered("claims", 0.5, decision)
    assert [samples_of(metrics)[name(one)] for one in ("yes", "no", "abstain")] == [1, 3, 1]


class TestProcesses:
    """Each counts in files of its own, as `count_together` lets it; any of them tells the sums."""

    @pytest.fixture
    def process(
        self, distribution: ScoreDistribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[int], Metrics]:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        monkeypatch.setattr(values, "ValueClass", values.ValueClass)  # to have it back afterwards

        def make(number: int) -> Metrics:
            count_together(number)
            return watching(distribution, str(tmp_path))

        return make

    def test_the_index_is_that_of_all_together(self, process, distribution, tmp_path):
        first, second = process(1), process(2)
        low, high = [0.01] * FEWEST, [0.99] * FEWEST
        answer(first, low)
        answer(second, high)
        for metrics in (first, second):
            assert psi(metrics, "_answers") == 2 * FEWEST
            counts = distribution.counts_of(np.array([*low, *high]))
            assert psi(metrics) == pytest.approx(stability_index(distribution.counts, counts))
            assert bins(metrics, "total") == bins(metrics, "recent") == counts
            assert bins(metrics, "reference") == pytest.approx(distribution.shares)
        forget_gauges(str(tmp_path), 1)
        assert psi(second, "_answers") == FEWEST, "what a dead process saw is recent no more"
        assert sum(bins(second, "total")) == 2 * FEWEST, "but counted"
        again = process(1)
        answer(again, low)
        assert psi(second, "_answers") == 2 * FEWEST
        assert sum(bins(second, "total")) == 3 * FEWEST

    def test_a_new_version_begins_anew_in_each(self, process, distribution):
        first, second = process(1), process(2)
        for metrics in (first, second):
            answer(metrics, [0.99] * (WINDOW + 1))
        assert psi(first, "_answers") == 2 * WINDOW
        for metrics in (first, second):
            metrics.models({"claims": INFO}, {"claims": ScoreDistribution((0.5,), (9.0, 1.0))})
        assert psi(first, "_answers") == psi(second, "_answers") == 0


@pytest.fixture(scope="module")
def probe(tiny_backbone: Backbone) -> Classifier:
    torch.manual_seed(0)
    spec = HeadSpec("linear", tiny_backbone.hidden_size)
    made = Classifier(tiny_backbone, Tap(2, "mean"), spec.build(), spec)
    made.training = distribution_record(made.predict_proba(texts("first", 100))[:, 1])
    return made


def texts(kind: str, count: int) -> list[Example]:
    rng = np.random.default_rng(count)
    words = {"first": ("red", "blue", "a tower", "one star"), "other": ("\u4f60\u597d", "!", "0.25", "<b>")}[kind]
    return [Example(None, " ".join(rng.choice(words, rng.integers(1, 9)))) for _ in range(count)]


def test_a_served_classifier(probe, tmp_path, caplog, monkeypatch):
    """Texts like those of its training leave the index low, others raise it."""
    few = 50
    for name in ("FEWEST", "WINDOW"):
        monkeypatch.setattr(drift, name, few)
    probe.save(tmp_path / "claims")
    broken = Classifier(probe.backbone, probe.tap, probe.head, probe.spec, training={RECORDED: {"edges": [[]]}})
    broken.save(tmp_path / "broken")
    config = ServeConfig(classifiers=(str(tmp_path / "claims"), str(tmp_path / "broken")), device="cpu")
    with caplog.at_level(logging.WARNING), ready_client(config) as client:
        metrics: Any = client.app.state.metrics

        def classify(kind: str) -> None:
            body = {"input": [{"text": example.text} for example in texts(kind, few)], "model": ["claims", "broken"]}
            assert client.post("/v1/classify", json=body).status_code == 200

        classify("first")
        assert psi(metrics) < psi(metrics, "_chance")
        assert psi(metrics, "_answers") == few
        classify("other")
        assert psi(metrics) > psi(metrics, "_chance") > 0.1
        seen = samples_of(metrics)
        for model in ("claims", "broken"):
            decisions = [
                seen[f'classifier_decisions_total{{decision="{one}",model="{model}"}}']
                for one in ("yes", "no", "abstain")
            ]
            assert sum(decisions) == 2 * few
        assert 'classifier_score_psi_answers{model="broken"}' not in seen
    assert sum("score_distribution of its training record is ignored" in line.message for line in caplog.records) == 1
