"""`/v2`, as clients of KServe's open inference protocol ask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen_vl_classifier import Example
from tests.serving.client import base64_of, check_problem, data_uri, picture
from tests.serving.served import Served

RED, BLUE = picture("red"), picture("blue")

TEXT = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}


def text(*data: Any, **changed: Any) -> dict[str, Any]:
    return TEXT | {"shape": [len(data)], "data": list(data)} | changed


def image(*data: Any, **changed: Any) -> dict[str, Any]:
    return text(*data, name="image", **changed)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("model", ["first", "second"])
def test_columns_in_columns_out(served: Served, model: str, columns: bool) -> None:
    examples = [Example(RED, "It is red."), Example(None, "words"), Example(BLUE, "It is red.")]
    inputs = [
        image(data_uri(RED), "", base64_of(BLUE)),
        text("It is red.", "words", "It is red."),
    ]
    if columns:
        inputs = [tensor | {"shape": [3, 1], "data": [[value] for value in tensor["data"]]} for tensor in inputs]
    response = served.post(f"/v2/models/{model}/infer", {"id": "my-id", "inputs": inputs})
    assert response.status_code == 200, response.text
    content = response.json()
    assert (content["id"], content["model_name"]) == ("my-id", model)
    probability, label, decision = content["outputs"]
    assert (probability["name"], probability["datatype"], probability["shape"]) == ("probability", "FP64", [3, 2])
    assert (label["name"], label["datatype"], label["shape"]) == ("label", "INT64", [3])
    assert (decision["name"], decision["datatype"], decision["shape"]) == ("decision", "BYTES", [3])
    expected = served.classifiers[model].predict_proba(examples)
    np.testing.assert_allclose(np.reshape(probability["data"], (3, 2)), expected, atol=1e-6)
    assert label["data"] == [int(p >= served.classifiers[model].threshold) for p in probability["data"][1::2]]
    assert decision["data"] == ["yes" if value else "no" for value in label["data"]]


def test_outputs_may_be_chosen(served: Served) -> None:
    body = {"inputs": [text("a")], "outputs": [{"name": "decision", "parameters": {"x": 1}}, {"name": "label"}]}
    content = served.post("/v2/models/first/infer", body).json()
    assert [output["name"] for output in content["outputs"]] == ["decision", "label"]
    assert "id" not in content


@pytest.mark.parametrize(
    ("inputs", "status", "code"),
    [
        ([], 400, "invalid_request"),
        ([image("")], 400, "invalid_tensor"),
        ([text("a"), text("b")], 400, "invalid_tensor"),
        ([text("a", "b"), image("")], 400, "invalid_tensor"),
        ([text("a", shape=[2])], 400, "invalid_tensor"),
        ([text("a", shape=[1, 2])], 400, "invalid_tensor"),
        ([text("a", shape=[-1])], 400, "invalid_tensor"),
        ([text(shape=[0])], 400, "invalid_tensor"),
        ([text(5)], 400, "invalid_tensor"),
        ([text(["secret", "b"])], 400, "invalid_tensor"),
        ([text("a", shape=[1, 1, 1])], 400, "invalid_request"),
        ([text("a", shape=["1"])], 400, "invalid_request"),
        ([text("a", datatype="FP32")], 400, "invalid_request"),
        ([text("a", name="secret")], 400, "invalid_request"),
        ([text("a", secret=1)], 400, "invalid_request"),
        ([text("a", " ")], 400, "invalid_item"),
        ([text("a"), image("/secret")], 422, "image_refused"),
        ([text(*"abcdefghijklmnopq")], 413, "too_many_items"),
    ],
)
def test_refusals(served: Served, inputs: Any, status: int, code: str) -> None:
    response = served.post("/v2/models/first/infer", {"inputs": inputs})
    check_problem(response, status, code)
    assert "secret" not in response.text


def test_binary_data_is_refused(served: Served) -> None:
    headers = {"Inference-Header-Content-Length": "10"}
    response = served.post("/v2/models/first/infer", {"inputs": [text("a")]}, headers=headers)
    check_problem(response, 400, "unsupported_binary")


def test_what_the_server_is(served: Served) -> None:
    content = served.client.get("/v2").json()
    assert content["name"] == "qwen-vl-classifier"
    assert content["version"]
    assert served.client.get("/v2/health/live").json() == {"live": True}
    assert served.client.get("/v2/health/ready").json() == {"ready": True}


def test_what_a_model_is(served: Served) -> None:
    content = served.client.get("/v2/models/second").json()
    assert content["name"] == "second"
    assert [tensor["name"] for tensor in content["inputs"]] == ["text", "image"]
    assert [(tensor["name"], tensor["shape"]) for tensor in content["outputs"]] == [
        ("probability", [-1, 2]),
        ("label", [-1]),
        ("decision", [-1]),
    ]
    assert served.client.get("/v2/models/second/ready").json() == {"name": "second", "ready": True}


@pytest.mark.parametrize("path", ["/v2/models/secret", "/v2/models/secret/ready", "/v2/models/%2e%2e"])
def test_models_that_are_not_served(served: Served, path: str) -> None:
    response = served.client.get(path)
    check_problem(response, 404, "model_not_found")
    assert "secret" not in response.text
    check_problem(served.post("/v2/models/secret/infer", {"inputs": [TEXT]}), 404, "model_not_found")
