"""`/v1/explain`: numbers and a picture, as offline."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from qwen_vl_classifier import Example, explain
from tests.serving.client import check_problem, data_uri, picture
from tests.serving.served import Served

RED = picture("red")
PNG = "data:image/png;base64,"


@pytest.mark.parametrize("method", [None, "gradients", "tokens", "occlusion"])
@pytest.mark.parametrize("image", [None, RED])
def test_as_offline(served: Served, method: Any, image: bytes | None) -> None:
    body = {"model": "first", "text": "It is red.", "image": image and data_uri(image)}
    response = served.post("/v1/explain", body | ({"method": method} if method else {}))
    assert response.status_code == 200, response.text
    content = response.json()
    expected = explain(served.classifiers["first"], Example(image, "It is red."), method=method or "gradients")
    assert content["model"] == "first"
    assert content["decision"] in ("yes", "no")
    assert content["method"] == (method or "gradients")
    assert content["baseline"] == expected.baseline
    assert content["probability"] == pytest.approx(expected.probability, abs=1e-6)
    assert content["log_odds"] == pytest.approx(expected.log_odds, abs=1e-4)
    assert [word["word"] for word in content["words"]] == [word for word, _ in expected.words]
    assert [word["contribution"] for word in content["words"]] == pytest.approx(
        [value for _, value in expected.words], abs=1e-3
    )
    assert [len(grid) for grid in content["patches"]] == [len(grid) for grid in expected.patches]
    assert content["heat_map"].startswith(PNG)
    with Image.open(io.BytesIO(base64.b64decode(content["heat_map"].removeprefix(PNG)))) as heat_map:
        assert heat_map.format == "PNG"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/png", "image/png"),
        ("IMAGE/PNG;q=0.9, */*;q=0.1", "image/png"),
        ("*/*", "application/json"),
        ("image/png, application/json", "application/json"),
        ("text/html", "application/json"),
    ],
)
def test_the_picture_alone_where_it_is_asked_for(served: Served, accept: str, kind: str) -> None:
    body = {"model": "first", "text": "It is red.", "image": data_uri(RED), "method": "tokens"}
    response = served.post("/v1/explain", body, headers={"Accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"] == kind
    if kind == "image/png":
        with Image.open(io.BytesIO(response.content)) as heat_map:
            assert heat_map.format == "PNG"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"text": "a"}, 400, "model_missing"),
        ({"model": "secret", "text": "a"}, 404, "model_not_found"),
        ({"model": ["first"], "text": "a"}, 400, "invalid_request"),
        ({"model": "first", "text": "a", "method": "secret"}, 400, "invalid_request"),
        ({"model": "first", "text": "a", "baseline": "secret"}, 400, "invalid_request"),
        ({"model": "first", "text": "a", "image": data_uri(RED), "baseline": "average"}, 400, "invalid_item"),
        ({"model": "first", "text": " "}, 400, "invalid_item"),
        ({"model": "first", "text": "a", "image": "/secret"}, 422, "image_refused"),
        ({"model": "second", "text": "a", "method": "tokens"}, 400, "invalid_item"),
    ],
)
def test_refusals(served: Served, body: Any, status: int, code: str) -> None:
    response = served.post("/v1/explain", body)
    check_problem(response, status, code)
    assert "secret" not in response.text
