"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qwen_vl_classifier.classifier.score_distribution import ScoreDistribution
from qwen_vl_classifier.serving.observability.prometheus import MODEL_LABELS, Metrics
from tests.serving.observability.reading import samples_of

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
    "classifier_decisions": "counter",
    "classifier_score_bin": "counter",
    "classifier_score_bin_recent": "gauge",
    "classifier_score_bin_reference": "gauge",
    "classifier_score_psi": "gauge",
    "classifier_score_psi_chance": "gauge",
    "classifier_score_psi_answers": "gauge",
    "classifier_queue_depth": "gauge",
    "classifier_running": "gauge",
    "classifier_in_flight": "gauge",
    "classifier_ready": "gauge",
    "classifier_model_info": "gauge",
    "classifier_model_load_failing": "gauge",
}
"""Dashboards are made of these names: they stay."""


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


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
        metrics.answered("claims", 0.42, "no")
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
        metrics.models({"old": dict.fromkeys(MODEL_LABELS, "x")}, {"old": None})
        metrics.models(
            {"claims": {"version": "0a1b", "backbone": "abc", "tap": "-1 mean", "head": "mlp"}}, {"claims": None}
        )
        infos = [name for name in samples_of(metrics) if name.startswith("classifier_model_info")]
        assert infos == ['classifier_model_info{backbone="abc",head="mlp",model="claims",tap="-1 mean",version="0a1b"}']

    def test_one_of_several_behind_an_address_has_series_of_its_own(self) -> None:
        metrics = Metrics(labels={"replica": "first"})
        metrics.models({"claims": dict.fromkeys(MODEL_LABELS, "x")}, {"claims": ScoreDistribution((0.5,), (9, 1))})
        metrics.answered("claims", 0.4, "no")
        seen = samples_of(metrics)
        assert all('replica="first"' in name for name in seen)
        assert seen['classifier_score_psi_answers{model="claims",replica="first"}'] == 1

    def test_two_applications_do_not_add_up(self, metrics: Metrics) -> None:
        Metrics().cancelled(1)
        assert samples_of(metrics)["classifier_cancelled_total"] == 0


def test_answered_requests_are_those_of_the_api() -> None:
    metrics = Metrics()
    for route, code in (("/v1/classify", 200), ("/classify", 429), ("/v1/classify", 499), ("/livez", 200), ("/", 200)):
        metrics.request(route, code, 0.01)
    assert metrics.answered_requests() == 2
