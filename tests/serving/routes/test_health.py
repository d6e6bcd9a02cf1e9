"""`/livez` and `/readyz`."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from qwen_vl_classifier import ServeConfig, create_app
from qwen_vl_classifier.serving.service import Service
from tests.serving.client import check_problem
from tests.serving.served import Served


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
def test_not_alive_when_the_loop_does_not_beat(monkeypatch: pytest.MonkeyPatch, seconds: float, status: int) -> None:
    monkeypatch.setattr(Service, "heartbeat", seconds)
    client = TestClient(create_app(ServeConfig(classifiers=("a",))), base_url="http://localhost")
    assert client.get("/livez").status_code == status
