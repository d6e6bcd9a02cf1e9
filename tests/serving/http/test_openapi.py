"""The description of the interface: whole, and true to the routes and to the examples that it gives."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from qwen_vl_classifier import ServeConfig, create_app
from tests.waiting import LIMIT

OPERATIONS = {
    ("post", "/v1/classify"): "classify",
    ("post", "/v1/explain"): "explain",
    ("get", "/v1/models"): "list_models",
    ("post", "/v1/models"): "load_model",
    ("get", "/v1/models/{model}"): "show_model",
    ("delete", "/v1/models/{model}"): "delete_model",
    ("post", "/v1/moderations"): "moderate",
    ("post", "/v1/systemone"): "decide",
    ("get", "/livez"): "livez",
    ("get", "/readyz"): "readyz",
    ("get", "/metrics"): "metrics",
}
"""Clients are generated from these names: they stay."""


@pytest.fixture(scope="module")
def page() -> Any:
    return create_app(ServeConfig(classifiers=("claims",))).openapi()


def operations(page: Any) -> dict[tuple[str, str], Any]:
    return {(method, path): item[method] for path, item in page["paths"].items() for method in item}


def test_every_route_has_its_name(page: Any) -> None:
    assert {key: operation["operationId"] for key, operation in operations(page).items()} == OPERATIONS


def test_no_route_is_forgotten(page: Any) -> None:
    app = create_app(ServeConfig(classifiers=("claims",)))
    hidden = {route.path for route in app.routes if isinstance(route, APIRoute) and not route.include_in_schema}
    assert {path for path in hidden if not path.startswith("/page/")} <= {"/", "/docs", "/classify"}


def test_references_lead_somewhere(page: Any) -> None:
    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(page)))
    names = {reference.removeprefix("#/components/schemas/") for reference in references}
    assert names <= page["components"]["schemas"].keys()
    assert {"ClassifyRequest", "ClassifyForm", "Problem"} <= names


def test_every_problem_is_one(page: Any) -> None:
    for operation in operations(page).values():
        assert {"200", "403", "421", "500"} <= operation["responses"].keys()
        for status, response in operation["responses"].items():
            if status in ("200", "201"):
                continue
            assert response["content"].keys() == {"application/problem+json"}
            assert ("headers" in response) == (status in ("429", "503"))
        classifies = {"400", "404", "408", "413", "415", "422", "429", "503", "504"}
        assert ("requestBody" in operation) == (classifies <= operation["responses"].keys())


def test_there_is_text_for_people(page: Any) -> None:
    assert page["info"]["description"]
    for operation in operations(page).values():
        assert operation["description"].endswith(".")
        assert operation["tags"]


def test_examples_can_be_sent_as_they_stand_there(page: Any, server_url: str) -> None:
    sent = 0
    with httpx.Client(base_url=server_url, timeout=LIMIT, trust_env=False) as client:
        for (method, path), operation in operations(page).items():
            if {"admin": []} in operation.get("security", []):
                continue  # it changes what is served
            content = operation.get("requestBody", {}).get("content", {})
            for name, example in content.get("application/json", {}).get("examples", {}).items():
                response = client.request(method, path, json=example["value"])
                assert response.status_code == 200, (path, name, response.text)
                assert "error" not in response.text, (path, name)
                assert example["summary"]
                sent += 1
    assert sent >= 10
