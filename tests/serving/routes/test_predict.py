"""`/predict`, as clients of text-embeddings-inference ask."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_vl_classifier import Example
from tests.serving.client import check_problem, data_uri, picture
from tests.serving.served import Served

RED = picture("red")


def check_classes(classes: list[dict[str, Any]], served: Served, model: str, example: Example) -> None:
    classifier = served.classifiers[model]
    assert [set(one) for one in classes] == [{"score", "label"}] * 2
    assert classes[0]["score"] >= classes[1]["score"]
    scores = {one["label"]: one["score"] for one in classes}
    for label, expected in zip(classifier.label_names, classifier.predict_proba([example])[0], strict=True):
        assert scores[label] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("model", ["first", "second"])
@pytest.mark.parametrize(
    ("inputs", "example"),
    [
        ("a claim", Example(None, "a claim")),
        ({"text": "a claim"}, Example(None, "a claim")),
        ({"image": data_uri(RED), "text": "It is red."}, Example(RED, "It is red.")),
    ],
)
def test_one_input(served: Served, model: str, inputs: Any, example: Example) -> None:
    in_body = served.post("/predict", {"inputs": inputs, "model": model, "truncate": True, "raw_scores": False})
    in_url = served.post("/predict", {"inputs": inputs}, params={"model": model})
    for response in (in_body, in_url):
        assert response.status_code == 200, response.text
        check_classes(response.json(), served, model, example)


def test_a_list_of_inputs(served: Served) -> None:
    inputs = ["a claim", ["in a list"], {"image": data_uri(RED), "text": "It is red."}]
    examples = [Example(None, "a claim"), Example(None, "in a list"), Example(RED, "It is red.")]
    response = served.post("/predict", {"inputs": inputs, "model": "second"})
    assert response.status_code == 200, response.text
    for classes, example in zip(response.json(), examples, strict=True):
        check_classes(classes, served, "second", example)
    assert len(served.post("/predict", {"inputs": ["one"], "model": "second"}).json()) == 1


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"inputs": "a"}, 400, "model_missing", "model"),
        ({"inputs": "a", "model": "secret"}, 404, "model_not_found", "model"),
        ({"inputs": "", "model": "first"}, 400, "invalid_item", "inputs"),
        ({"inputs": ["a", ["b", "secret"]], "model": "first"}, 400, "invalid_item", "inputs.1"),
        ({"inputs": ["a", 5], "model": "first"}, 400, "invalid_item", "inputs.1"),
        ({"inputs": ["a", {"text": "b", "image": "/secret"}], "model": "first"}, 422, "image_refused", "inputs.1"),
        ({"inputs": [], "model": "first"}, 400, "invalid_request", None),
        ({"inputs": 5, "model": "first"}, 400, "invalid_request", None),
        ({"inputs": "a", "model": "first", "raw_scores": True}, 400, "invalid_request", None),
        ({"inputs": "a", "model": "first", "secret": True}, 400, "invalid_request", None),
        ({"inputs": ["a"] * 17, "model": "first"}, 413, "too_many_items", "inputs"),
    ],
)
def test_refusals(served: Served, body: Any, status: int, code: str, param: str | None) -> None:
    response = served.post("/predict", body)
    check_problem(response, status, code)
    assert response.json()["error"]["param"] == param
    assert "secret" not in response.text


def test_url_and_body_must_agree(served: Served) -> None:
    response = served.post("/predict", {"inputs": "a", "model": "first"}, params={"model": "second"})
    check_problem(response, 400, "model_twice")
    assert served.post("/predict", {"inputs": "a", "model": "first"}, params={"model": "first"}).status_code == 200
