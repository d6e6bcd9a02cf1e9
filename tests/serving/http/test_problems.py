"""What callers are told when there is no answer."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError

from qwen_vl_classifier.serving.http.problems import Defects, explain_invalid, problem
from qwen_vl_classifier.serving.routes.classification import ClassifyRequest
from qwen_vl_classifier.serving.routes.explanations import ExplainRequest
from qwen_vl_classifier.serving.routes.moderations import ModerationRequest

REQUESTS = (ClassifyRequest, ModerationRequest, ExplainRequest)

SECRET = "s3cret"


def explained(model: type[BaseModel], value: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    return explain_invalid(caught.value)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (504, "server_error"),
    ],
)
def test_a_problem_carries_the_error_object_of_openai(status: int, kind: str) -> None:
    found = problem(status, "code", "what happened", param="input.3")
    assert found.status == status
    assert found.title
    assert found.error.model_dump() == {"message": "what happened", "type": kind, "param": "input.3", "code": "code"}


class TestExplaining:
    @pytest.mark.parametrize(
        ("model", "value", "said"),
        [
            (ClassifyRequest, [], "is not an object"),
            (ClassifyRequest, {}, "expected either input or messages"),
            (ClassifyRequest, {"input": [], "messages": None}, "input is too short; expected at least 1"),
            (ClassifyRequest, {"input": [1], "model": 1}, "model is not text"),
            (ClassifyRequest, {"input": [1], "model": ["a", 1]}, "model.1 is not text"),
            (ClassifyRequest, {"input": [1], SECRET: 1}, "has an unknown field; leave it out"),
            (
                ClassifyRequest,
                {"messages": [{"role": SECRET, "content": [{"type": SECRET}, {"type": ["text"]}]}]},
                "messages.0.role is unknown; expected 'user'; "
                "messages.0.content.0 has an unknown type; expected another; "
                "messages.0.content.1 has an unknown type; expected another",
            ),
            (
                ClassifyRequest,
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {SECRET: 1}}]}]},
                "messages.0.content.0.image_url.url is missing; "
                "messages.0.content.0.image_url has an unknown field; leave it out",
            ),
            (ModerationRequest, {"input": 5}, "input is not text"),
            (ModerationRequest, {"input": ["a", 5]}, "input.1 is not text"),
            (ExplainRequest, {"text": "a", "image": ["x"] * 9}, "image is too long; expected at most 8"),
        ],
    )
    def test_in_words_of_our_own(self, model: type[BaseModel], value: Any, said: str) -> None:
        assert explained(model, value).startswith(said)

    @settings(max_examples=100)
    @given(
        st.sampled_from(REQUESTS),
        st.recursive(
            st.sampled_from([SECRET, 1, 1.5, None, True]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            SECRET,
                            "input",
                            "messages",
                            "content",
                            "type",
                            "image_url",
                            "model",
                            "image",
                        ]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ),
    )
    def test_nothing_that_was_sent_is_repeated(self, model: type[BaseModel], value: Any) -> None:
        try:
            model.model_validate(value)
        except ValidationError as error:
            said = explain_invalid(error)
            assert said
            assert SECRET not in said
            assert "\n" not in said
            assert len(said) < 1000

    def test_many_problems_are_counted(self) -> None:
        class Strict(BaseModel):
            model_config = ConfigDict(strict=True)
            values: list[str]

        said = explained(Strict, {"values": [1] * 50})
        assert said.count("is not text") == 5
        assert said.endswith("; and 45 more")

    def test_ways_to_give_a_field_are_not_named(self) -> None:
        class Either(BaseModel):
            value: Annotated[Annotated[Literal[1], Tag("<one>")] | Annotated[Literal[2], Tag("<two>")], Field()]

        assert "<" not in explained(Either, {"value": 3})


class TestDefects:
    @staticmethod
    def answer(app: Any) -> list[dict[str, Any]]:
        class State:
            class state:
                class metrics:
                    rejected = staticmethod(lambda reason: None)

        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError

        asyncio.run(Defects(app)({"type": "http", "app": State}, receive, send))
        return sent

    def test_one_is_500_without_detail_and_the_log_has_it(self, caplog: pytest.LogCaptureFixture) -> None:
        async def broken(scope: Any, receive: Any, send: Any) -> None:
            raise RuntimeError(SECRET)

        start, body = self.answer(broken)
        assert start["status"] == 500
        assert SECRET.encode() not in body["body"]
        assert json.loads(body["body"])["error"]["code"] == "internal_error"
        assert SECRET in caplog.text

    def test_half_an_answer_is_not_followed_by_another(self, caplog: pytest.LogCaptureFixture) -> None:
        sent: list[Any] = []

        async def broken(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise RuntimeError(SECRET)

        async def send(message: Any) -> None:
            sent.append(message)

        with pytest.raises(RuntimeError):
            asyncio.run(Defects(broken)({"type": "http"}, None, send))  # type: ignore[arg-type]
        assert [message["status"] for message in sent] == [200]
        assert SECRET in caplog.text
