"""`/v1/models`, `/livez`, `/readyz` and `/metrics`."""

from __future__ import annotations

from datetime import date

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from qwen_vl_classifier import ServeConfig, create_app
from qwen_vl_classifier.serving.service import Service
from tests.serving.client import check_problem
from tests.serving.served import NAMES, Served


def test_all_models(served: Served) -> None:
    response = served.client.get("/v1/models")
    content = response.json()
    assert content["object"] == "list"
    assert [model["id"] for model in content["data"]] == list(NAMES)
    for model in content["data"]:
        classifier = served.classifiers[model["id"]]
        assert model["object"] == "model"
        assert model["label_names"] == list(classifier.label_names)
        assert model["threshold"] == classifier.threshold
        assert model["text"] == {"first": None, "second": "Is there a tower?"}[model["id"]]
        assert model["abstention"] is None
        assert model["created"] > 1_700_000_000
        assert served.client.get(f"/v1/models/{model['id']}").json() == model
    assert not [folder for folder in served.config.classifiers if folder in response.text]


def test_models_for_decisions(served: Served) -> None:
    content = served.client.get("/v1/models").json()
    names = [model["name"] for model in content["models"]]
    assert names == [name + kind for name in NAMES for kind in ("", "/zero-shot")]
    for model in content["models"]:
        assert model["description"]
        assert date.fromisoformat(model["release_date"]) > date(2025, 1, 1)
        asked = {"model": model["name"], "state": "It is red.", "questions": {"q": {"type": "noul"}}}
        assert served.post("/v1/systemone", asked).status_code == 200


@pytest.mark.parametrize("name", ["secret", "%20", "first%00", "FIRST"])
def test_a_model_that_is_not_served(served: Served, name: str) -> None:
    response = served.client.get(f"/v1/models/{name}")
    check_problem(response, 404, "model_not_found")
    assert "secret" not in response.text


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models/first/", "/v1/models/first%2f", "/v1//models"])
def test_paths_are_taken_as_a_whole(served: Served, path: str) -> None:
    assert served.client.get(path).status_code == 404


def test_all_is_well(served: Served) -> None:
    assert served.client.get("/livez").json() == {"status": "live"}
    assert served.client.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize("state", ["loading", "warming", "draining", "failed"])
def test_not_ready_in_any_other_state(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(Service, "state", state)
    client = TestClient(create_app(ServeConfig(classifiers=("a",))), base_url="http://localhost")
    for path in ("/readyz", "/v1/models", "/v1/models/a"):
        response = client.get(path)
        check_problem(response, 503, state)
        assert response.headers["Retry-After"] == "1"
    check_problem(client.post("/v1/classify", json={"input": [{"text": "a"}]}), 503, state)
    if state == "failed":
        check_problem(client.get("/livez"), 503, "failed")
    else:
        assert client.get("/livez").status_code == 200


@pytest.mark.parametrize(("seconds", "status"), [(0.0, 200), (4.9, 200), (5.1, 503), (3600.0, 503)])
def test_not_alive_when_a_pass_is_stuck(monkeypatch: pytest.MonkeyPatch, seconds: float, status: int) -> None:
    monkeypatch.setattr(Service, "stuck_seconds", seconds)
    client = TestClient(create_app(ServeConfig(classifiers=("a",))), base_url="http://localhost")
    assert client.get("/livez").status_code == status


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
