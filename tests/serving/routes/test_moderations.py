"""`/v1/moderations`, as OpenAI's clients use it."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_vl_classifier import Example
from tests.serving.client import check_problem, data_uri, picture
from tests.serving.served import NAMES, Served

RED = picture("red")
PARTS = [
    {"type": "image_url", "image_url": {"url": data_uri(RED)}},
    {"type": "text", "text": "It is red."},
]


@pytest.mark.parametrize(
    ("sent", "examples"),
    [
        ("a claim", [Example(None, "a claim")]),
        (["a claim"], [Example(None, "a claim")]),
        (["a claim", "another"], [Example(None, "a claim"), Example(None, "another")]),
        (PARTS, [Example(RED, "It is red.")]),
        ([{"type": "text", "text": "a claim"}], [Example(None, "a claim")]),
    ],
)
@pytest.mark.parametrize("model", [None, "omni-moderation-latest", "text-moderation-007", "first", "second"])
def test_classifiers_are_categories(served: Served, sent: Any, examples: list[Example], model: str | None) -> None:
    response = served.post("/v1/moderations", {"input": sent} | ({"model": model} if model else {}))
    assert response.status_code == 200, response.text
    content = response.json()
    assert content.keys() == {"id", "model", "version", "results"}
    names = [model] if model in NAMES else list(NAMES)
    assert content["model"] == ",".join(names)
    assert content["id"].startswith("modr-")
    assert len(content["results"]) == len(examples)
    for result, example in zip(content["results"], examples, strict=True):
        assert list(result["categories"]) == list(result["category_scores"]) == names
        for name in names:
            classifier = served.classifiers[name]
            (expected,) = classifier.predict_proba([example])[:, 1]
            assert result["category_scores"][name] == pytest.approx(expected, abs=1e-6)
            assert result["categories"][name] == (result["category_scores"][name] >= classifier.threshold)
            assert result["category_applied_input_types"][name] == (["text", "image"] if example.image else ["text"])
        assert result["flagged"] == any(result["categories"].values())


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"input": "a", "model": "secret"}, 404, "model_not_found", "model"),
        ({"input": "a", "model": "omni-moderation-secret!"}, 404, "model_not_found", "model"),
        ({"input": ""}, 400, "invalid_item", "input"),
        ({"input": ["a", " "]}, 400, "invalid_item", "input.1"),
        ({"input": ["a", "x" * 8001]}, 413, "text_too_large", "input.1"),
        ({"input": [PARTS[0]]}, 400, "invalid_item", "input"),
        ({"input": [PARTS[1], {"type": "image_url", "image_url": {"url": "/secret"}}]}, 422, "image_refused", "input"),
        ({"input": [PARTS[1], "secret"]}, 400, "invalid_request", None),
        ({"input": [["secret"]]}, 400, "invalid_request", None),
        ({"input": []}, 400, "invalid_request", None),
        ({}, 400, "invalid_request", None),
        ({"input": ["a"] * 17}, 413, "too_many_items", "input"),
    ],
)
def test_refusals(served: Served, body: Any, status: int, code: str, param: str | None) -> None:
    response = served.post("/v1/moderations", body)
    check_problem(response, status, code)
    assert response.json()["error"]["param"] == param
    assert "secret" not in response.text
