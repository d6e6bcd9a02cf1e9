"""`/metrics`: that requests are counted by the templates of their routes."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.serving.served import Served


def counted(served: Served, name: str, **labels: str) -> float:
    response = served.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return sum(
        sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_requests_are_counted(served: Served) -> None:
    route = "/v1/models/{model}"
    before = counted(served, "classifier_requests_total", route=route, code="404")
    for name in ("secret", "another"):
        served.client.get(f"/v1/models/{name}")
    assert counted(served, "classifier_requests_total", route=route, code="404") == before + 2
    assert "secret" not in served.client.get("/metrics").text


def test_refusals_are_counted_by_what_the_caller_was_told(served: Served) -> None:
    before = counted(served, "classifier_rejected_total", reason="model_not_found")
    served.post("/v1/classify", {"model": "secret", "input": [1]})
    assert counted(served, "classifier_rejected_total", reason="model_not_found") == before + 1


def test_scores_are_counted_by_model(served: Served) -> None:
    before = counted(served, "classifier_score_count", model="second")
    served.post("/v1/classify", {"model": "second", "input": [{"text": "a"}, {"text": ""}]})
    assert counted(served, "classifier_score_count", model="second") == before + 1
