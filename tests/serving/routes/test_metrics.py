"""`/metrics`: that requests are counted by the templates of their routes."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.serving.house import House


def counted(house: House, name: str, **labels: str) -> float:
    response = house.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return sum(
        sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_requests_are_counted(house: House) -> None:
    route = "/v1/models/{model}"
    before = counted(house, "classifier_requests_total", route=route, code="404")
    for name in ("secret", "another"):
        house.client.get(f"/v1/models/{name}")
    assert counted(house, "classifier_requests_total", route=route, code="404") == before + 2
    assert "secret" not in house.client.get("/metrics").text


def test_refusals_are_counted_by_what_the_caller_was_told(house: House) -> None:
    before = counted(house, "classifier_rejected_total", reason="model_not_found")
    house.post("/v1/classify", {"model": "secret", "input": [1]})
    assert counted(house, "classifier_rejected_total", reason="model_not_found") == before + 1


def test_scores_are_counted_by_model(house: House) -> None:
    before = counted(house, "classifier_score_count", model="second")
    house.post("/v1/classify", {"model": "second", "input": [{"text": "a"}, {"text": ""}]})
    assert counted(house, "classifier_score_count", model="second") == before + 1
