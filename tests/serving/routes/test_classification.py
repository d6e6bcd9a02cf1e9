"""`/v1/classify`: every form of a request, each answered as the classifier answers offline."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest

from qwen_vl_classifier import Classifier, Example
from qwen_vl_classifier.serving.items import MAX_IMAGES
from tests.serving.client import base64_of, check_problem, data_uri, picture
from tests.serving.served import Served

RED, BLUE, GREEN = picture("red"), picture("blue", "JPEG", (140, 60)), picture("green", "WEBP")

ROWS: list[tuple[Any, Example]] = [
    ({"image": data_uri(RED), "text": "It is red."}, Example(RED, "It is red.")),
    ({"image": base64_of(BLUE), "text": "It is red."}, Example(BLUE, "It is red.")),
    ({"image": [base64_of(RED), data_uri(BLUE)], "text": "a pair"}, Example((RED, BLUE), "a pair")),
    ({"image": None, "text": "<|image_pad|> no picture"}, Example(None, "<|image_pad|> no picture")),
    ({"image": [], "text": "words"}, Example(None, "words")),
    ({"text": "\u4f60\u597d \U0001f600"}, Example(None, "\u4f60\u597d \U0001f600")),
    ({"image": base64_of(GREEN), "text": "x"}, Example(GREEN, "x")),
    ({"messages": [{"role": "user", "content": "words"}]}, Example(None, "words")),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "first line"},
                        {"type": "image_url", "image_url": {"url": data_uri(RED), "detail": "low"}},
                        {"type": "text", "text": "second line"},
                    ],
                },
                {"role": "user", "content": [{"type": "image_url", "image_url": base64_of(BLUE)}]},
            ]
        },
        Example((RED, BLUE), "first line\nsecond line"),
    ),
]
EXAMPLES = [example for _, example in ROWS]


def check_result(result: dict[str, Any], classifier: Classifier, expected: Any) -> None:
    """Check one result against the classifier's own probabilities."""
    np.testing.assert_allclose(result["probs"], expected, atol=1e-6)
    assert result["score"] == result["probs"][1]
    assert result["threshold"] == classifier.threshold
    assert result["label"] == int(result["score"] >= classifier.threshold)
    assert result["decision"] == ("yes" if result["label"] else "no")


class TestAnswers:
    @pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
    @pytest.mark.parametrize("model", ["first", "second"])
    def test_as_offline(self, served: Served, path: str, model: str) -> None:
        response = served.post(path, {"model": model, "input": [item for item, _ in ROWS]})
        assert response.status_code == 200, response.text
        content = response.json()
        assert content.keys() == {"id", "object", "created", "model", "version", "data", "usage"}
        assert (content["object"], content["model"]) == ("list", model)
        assert content["version"] == served.client.get(f"/v1/models/{model}").json()["version"]
        assert [result["index"] for result in content["data"]] == list(range(len(ROWS)))
        classifier = served.classifiers[model]
        for result, expected in zip(content["data"], classifier.predict_proba(EXAMPLES), strict=True):
            assert result.keys() == {"index", "label", "probs", "score", "threshold", "decision"}
            check_result(result, classifier, expected)
        tokens = sum(len(item.ids) for item in classifier.backbone.prepare(EXAMPLES))
        assert content["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}

    def test_several_models_in_one_pass(self, served: Served) -> None:
        names = ["second", "first"]
        content = served.post("/v1/classify", {"model": names, "input": [item for item, _ in ROWS]}).json()
        assert content["model"] == names
        versions = {model["id"]: model["version"] for model in served.client.get("/v1/models").json()["data"]}
        assert content["version"] == [versions[name] for name in names]
        assert versions["first"] != versions["second"]
        assert [(result["index"], result["model"]) for result in content["data"]] == [
            (index, name) for index in range(len(ROWS)) for name in names
        ]
        for column, name in enumerate(names):
            classifier = served.classifiers[name]
            for result, expected in zip(content["data"][column::2], classifier.predict_proba(EXAMPLES), strict=True):
                check_result(result, classifier, expected)
        tokens = sum(len(item.ids) for item in served.classifiers["first"].backbone.prepare(EXAMPLES))
        assert content["usage"]["total_tokens"] == tokens, "one pass is paid for once"

    def test_one_model_as_a_list_is_answered_as_a_list(self, served: Served) -> None:
        content = served.post("/v1/classify", {"model": ["first"], "input": [{"text": "a"}, {"text": ""}]}).json()
        assert content["model"] == ["first"]
        assert [result["model"] for result in content["data"]] == ["first", "first"]
        assert "error" in content["data"][1]

    def test_messages_alone(self, served: Served) -> None:
        item, example = ROWS[-1]
        content = served.post("/v1/classify", {"model": "first", **item}).json()
        (result,) = content["data"]
        classifier = served.classifiers["first"]
        check_result(result, classifier, classifier.predict_proba([example])[0])

    @pytest.mark.parametrize("as_text", [False, True])
    def test_a_form_with_files(self, served: Served, as_text: bool) -> None:
        first = (None, data_uri(RED)) if as_text else ("x.png", RED, "image/png")
        response = served.client.post(
            "/v1/classify",
            files=[("image", first), ("image", ("../x", BLUE, "text/html"))],
            data={"text": "a pair \u4f60", "model": ["first", "second"]},
        )
        assert response.status_code == 200, response.text
        assert response.json()["model"] == ["first", "second"]
        for result, classifier in zip(response.json()["data"], served.classifiers.values(), strict=True):
            check_result(result, classifier, classifier.predict_proba([Example((RED, BLUE), "a pair \u4f60")])[0])

    def test_a_form_for_one_model(self, served: Served) -> None:
        form = {"text": (None, "words"), "model": (None, "second")}
        content = served.client.post("/v1/classify", files=form).json()
        assert content["model"] == "second"
        assert "model" not in content["data"][0]


class TestBadItems:
    def test_one_has_its_own_error_and_spoils_no_other(self, served: Served) -> None:
        good = {"image": data_uri(RED), "text": "It is red."}
        bad: list[tuple[Any, int, str]] = [
            ({"image": "https://example.org/secret.png", "text": "x"}, 422, "image_refused"),
            ({"image": "/etc/secret", "text": "x"}, 422, "image_refused"),
            ({"image": "file:///etc/secret", "text": "x"}, 422, "image_refused"),
            ({"image": base64_of(b"secret" * 20), "text": "x"}, 415, "image_format"),
            ({"image": [good["image"], data_uri(picture("red", "GIF"))], "text": "x"}, 415, "image_format"),
            ({"image": base64_of(RED[:-20]), "text": "x"}, 422, "image_damaged"),
            ({"image": base64_of(picture("red", size=(201, 1))), "text": "x"}, 413, "image_too_large"),
            ({"image": 5, "text": "x"}, 400, "invalid_item"),
            ({"image": [good["image"]] * (MAX_IMAGES + 1), "text": "x"}, 400, "invalid_item"),
            ({"image": good["image"]}, 400, "invalid_item"),
            ({"text": " "}, 400, "invalid_item"),
            ({"text": "x", "secret": "secret"}, 400, "invalid_item"),
            ({"text": ["secret"]}, 400, "invalid_item"),
            ("secret", 400, "invalid_item"),
            (None, 400, "invalid_item"),
            ({"text": "\ud800"}, 400, "invalid_item"),
            ({"text": "x" * 8001}, 413, "text_too_large"),
            ({"messages": []}, 400, "invalid_item"),
            ({"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}, 400, "invalid_item"),
            ({"messages": [{"role": "system", "content": "secret"}]}, 400, "invalid_item"),
            ({"messages": [{"role": "user", "content": "a"}], "text": "secret"}, 400, "invalid_item"),
        ]
        (expected,) = served.classifiers["first"].predict_proba([Example(RED, "It is red.")])[:, 1]
        for start in range(0, len(bad), 8):
            part = bad[start : start + 8]
            items = [one for item, _, _ in part for one in (item, good)]
            response = served.post("/v1/classify", {"model": "first", "input": items})
            assert response.status_code == 200, response.text
            assert "secret" not in response.text
            results = response.json()["data"]
            for number, (item, status, code) in enumerate(part):
                failed, neighbour = results[2 * number : 2 * number + 2]
                assert failed.keys() == {"index", "error"}
                assert (failed["error"]["status"], failed["error"]["code"]) == (status, code), (item, failed)
                assert neighbour["score"] == pytest.approx(expected, abs=1e-6)

    def test_nothing_but_bad_items_is_answered_too(self, served: Served) -> None:
        response = served.post("/v1/classify", {"model": "first", "input": [{"text": ""}, 5]})
        assert response.status_code == 200
        assert [result["error"]["code"] for result in response.json()["data"]] == ["invalid_item"] * 2
        assert response.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}

    @pytest.mark.parametrize(
        ("image", "text", "status", "code"),
        [
            (RED[:-20], "x", 422, "image_damaged"),
            (b"", "x", 422, None),
            (b"GIF89a", "x", 415, "image_format"),
            (RED, " ", 400, "invalid_item"),
            (RED, "x" * 8001, 413, "text_too_large"),
        ],
    )
    def test_the_error_of_a_single_example_is_the_requests(
        self, served: Served, image: bytes, text: str, status: int, code: str | None
    ) -> None:
        form = served.client.post(
            "/v1/classify", files={"image": ("x.png", image)}, data={"text": text, "model": "first"}
        )
        parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": data_uri(image)}}]
        chat = served.post("/v1/classify", {"model": "first", "messages": [{"role": "user", "content": parts}]})
        for response in (form, chat):
            assert response.status_code in ((415, 422) if code is None else (status,)), response.text
            if code is not None:
                check_problem(response, status, code)


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            ({"input": [{"text": "a"}]}, 400, "model_missing"),
            ({"model": "secret", "input": [{"text": "a"}]}, 404, "model_not_found"),
            ({"model": ["first", "secret"], "input": [{"text": "a"}]}, 404, "model_not_found"),
            ({"model": "\ud800", "input": [{"text": "a"}]}, 404, "model_not_found"),
            ({"model": ["first", "first"], "input": [{"text": "a"}]}, 400, "model_twice"),
            ({"model": [], "input": [{"text": "a"}]}, 400, "invalid_request"),
            ({"model": 1, "input": [{"text": "a"}]}, 400, "invalid_request"),
            ({"model": "first", "input": []}, 400, "invalid_request"),
            ({"model": "first"}, 400, "invalid_request"),
            ({"model": "first", "input": {"text": "secret"}}, 400, "invalid_request"),
            ({"model": "first", "input": [{"text": "a"}], "secret": 1}, 400, "invalid_request"),
            (
                {"model": "first", "input": [{"text": "a"}], "messages": [{"role": "user", "content": "a"}]},
                400,
                "invalid_request",
            ),
            ({"model": "first", "input": [1] * 17}, 413, "too_many_items"),
            ([], 400, "invalid_request"),
            (None, 400, "invalid_request"),
        ],
    )
    def test_requests_that_make_no_sense(self, served: Served, body: Any, status: int, code: str) -> None:
        response = served.post("/v1/classify", body)
        assert check_problem(response, status, code)
        assert "secret" not in response.text

    @pytest.mark.parametrize(
        "fields",
        [
            [("text", b"a"), ("text", b"b")],
            [("model", b"first")],
            [("text", b"a"), ("secret", b"a")],
            [("text", b"\xff")],
            [("text", b"a"), ("image", b"\xff")],
            [],
        ],
    )
    def test_forms_that_make_no_sense(self, served: Served, fields: list[tuple[str, bytes]]) -> None:
        files = [(name, (None, value)) for name, value in fields]
        request = httpx.Request("POST", "http://localhost", files=files or [("", (None, b""))])
        response = served.client.post("/v1/classify", content=request.read(), headers=dict(request.headers))
        check_problem(response, 400, "invalid_form")
        assert "secret" not in response.text

    def test_a_form_of_too_many_pictures(self, served: Served) -> None:
        files = [("image", ("x.png", RED))] * (MAX_IMAGES + 1)
        response = served.client.post("/v1/classify", files=files, data={"text": "a", "model": "first"})
        check_problem(response, 400, "invalid_item")
