"""`/v1/models`: who can be asked."""

from __future__ import annotations

import pytest

from tests.serving.client import check_problem
from tests.serving.served import NAMES, Served


def test_all(served: Served) -> None:
    response = served.client.get("/v1/models")
    content = response.json()
    assert content["object"] == "list"
    assert [model["id"] for model in content["data"]] == list(NAMES)
    for model in content["data"]:
        classifier = served.classifiers[model["id"]]
        assert model["object"] == "model"
        assert model["label_names"] == list(classifier.label_names)
        assert model["threshold"] == classifier.threshold
        assert model["abstention"] is None
        assert model["created"] > 1_700_000_000
        assert served.client.get(f"/v1/models/{model['id']}").json() == model
    assert not [folder for folder in served.config.classifiers if folder in response.text]


@pytest.mark.parametrize("name", ["secret", "%20", "first%00", "FIRST"])
def test_one_that_is_not_there(served: Served, name: str) -> None:
    response = served.client.get(f"/v1/models/{name}")
    check_problem(response, 404, "model_not_found")
    assert "secret" not in response.text


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models/first/", "/v1/models/first%2f", "/v1//models"])
def test_paths_are_taken_as_a_whole(served: Served, path: str) -> None:
    assert served.client.get(path).status_code == 404
