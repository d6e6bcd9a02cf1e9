"""What is counted, by which names, and that nobody outside can make up labels."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qwen_vl_classifier.serving.metrics import MODEL_LABELS, Metrics

NAMES = {
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


def samples(metrics: Metrics) -> dict[str, float]:
    """Return every sample by its name and labels, as they stand in the text."""
    lines = metrics.exposition()[0].decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_the_names_and_kinds() -> None:
    body, content_type = Metrics().exposition()
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    kinds = {name: family.type for name, family in families.items() if not name.endswith("_created")}
    assert {name: kind for name, kind in kinds.items() if name.startswith("classifier_")} == NAMES
    assert "process_resident_memory_bytes" in kinds
    assert all(families[name].documentation for name in NAMES)
    assert content_type.startswith("text/plain; version=")


def test_requests_by_route_and_code() -> None:
    metrics = Metrics()
    for code, seconds in ((200, 0.02), (200, 0.3), (429, 0.001)):
        metrics.request("/v1/classify", code, seconds)
    seen = samples(metrics)
    assert seen['classifier_requests_total{code="200",route="/v1/classify"}'] == 2
    assert seen['classifier_requests_total{code="429",route="/v1/classify"}'] == 1
    assert seen['classifier_request_seconds_count{route="/v1/classify"}'] == 3
    assert seen['classifier_request_seconds_sum{route="/v1/classify"}'] == pytest.approx(0.321)
    assert seen['classifier_request_seconds_bucket{le="0.025",route="/v1/classify"}'] == 2


def test_what_a_batcher_tells() -> None:
    metrics = Metrics()
    metrics.waited(0.2)
    metrics.depth(7, 3)
    metrics.scored(3, 900, 0.7)
    metrics.split("out_of_memory")
    metrics.cancelled(4)
    seen = samples(metrics)
    assert seen["classifier_queue_seconds_sum"] == pytest.approx(0.2)
    assert (seen["classifier_queue_depth"], seen["classifier_running"]) == (7, 3)
    assert seen['classifier_batch_size_bucket{le="4.0"}'] == 1
    assert seen['classifier_batch_size_bucket{le="2.0"}'] == 0
    assert seen["classifier_batch_tokens_sum"] == 900
    assert seen["classifier_inference_seconds_sum"] == pytest.approx(0.7)
    assert seen['classifier_batch_split_total{reason="out_of_memory"}'] == 1
    assert seen["classifier_cancelled_total"] == 4


def test_what_a_service_tells() -> None:
    metrics = Metrics()
    metrics.decoded(0.03)
    metrics.score("claims", 0.42)
    metrics.rejected("queue_full")
    metrics.ready(True)
    with metrics.in_flight(), metrics.in_flight():
        assert samples(metrics)["classifier_in_flight"] == 2
    seen = samples(metrics)
    assert seen["classifier_in_flight"] == 0
    assert seen["classifier_decode_seconds_count"] == 1
    assert seen['classifier_score_bucket{le="0.4",model="claims"}'] == 0
    assert seen['classifier_score_bucket{le="0.45",model="claims"}'] == 1
    assert seen['classifier_rejected_total{reason="queue_full"}'] == 1
    assert seen["classifier_ready"] == 1
    metrics.ready(False)
    assert samples(metrics)["classifier_ready"] == 0


def test_in_flight_comes_down_after_an_error() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError), metrics.in_flight():
        raise KeyError
    assert samples(metrics)["classifier_in_flight"] == 0


def test_models() -> None:
    metrics = Metrics()
    metrics.models({"old": dict.fromkeys(MODEL_LABELS, "x")})
    metrics.models({"claims": {"backbone": "abc", "tap": "-1 mean", "head": "mlp"}})
    infos = [name for name in samples(metrics) if name.startswith("classifier_model_info")]
    assert infos == ['classifier_model_info{backbone="abc",head="mlp",model="claims",tap="-1 mean"}']


def test_two_do_not_add_up() -> None:
    one, other = Metrics(), Metrics()
    one.cancelled(1)
    assert samples(other)["classifier_cancelled_total"] == 0


def test_labels_stay_few() -> None:
    """Even if something chosen by callers came through, memory and the text stay small."""
    metrics = Metrics()
    for number in range(1000):
        metrics.request(f"/{number}", 404, 0.01)
        metrics.rejected(f"reason{number}")
        metrics.score(f"model{number}", 0.5)
    text = metrics.exposition()[0].decode()
    for label in ("route", "reason", "model"):
        assert len(set(re.findall(rf'{label}="([^"]*)"', text))) == 65, "64 and other"
    assert samples(metrics)['classifier_requests_total{code="404",route="other"}'] == 1000 - 64
