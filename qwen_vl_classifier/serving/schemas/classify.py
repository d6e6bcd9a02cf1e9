"""`/v1/classify`: several examples, each answered or refused by itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag, WrapValidator, model_validator

from qwen_vl_classifier.data.example import Decision
from qwen_vl_classifier.serving.schemas.examples import (
    PICTURE,
    ClassifyItem,
    Messages,
    MessagesItem,
    Request,
    one_or_several,
)
from qwen_vl_classifier.serving.schemas.models import Pair

_AnyItem: TypeAlias = Annotated[ClassifyItem | MessagesItem, WrapValidator(lambda value, _: value)]
"""An item that is checked later, by itself, so that a bad one spoils no other."""

ModelNames: TypeAlias = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[list[str], Field(min_length=1), Tag("<several>")]
    | Annotated[None, Tag("<none>")],
    Discriminator(lambda value: "<none>" if value is None else one_or_several(value)),
]


class ClassifyRequest(Request):
    """Examples to classify in `input`, or one example in `messages`."""

    model: ModelNames = Field(
        default=None,
        description="a name that /v1/models lists, or several; not needed if it lists one",
    )
    input: list[_AnyItem] | None = Field(default=None, min_length=1, description="examples")
    messages: Messages | None = Field(default=None, description="one example as messages of a chat")

    @model_validator(mode="after")
    def _one_form(self) -> ClassifyRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("wanted either input or messages")
        return self


class ClassifyForm(Request):
    """One example as a form: files, and text."""

    image: list[Annotated[str, Field(json_schema_extra={"format": "binary"})]] = Field(
        default=[], description="files, or their data URIs, in reading order"
    )
    text: str = Field(description="the words that go with them")
    model: list[str] = Field(default=[], description="names that /v1/models lists; not needed if it lists one")


class ErrorOfItem(BaseModel):
    """Why one example has no result."""

    code: str = Field(description="what happened, in one word for programs")
    status: int = Field(description="the status that a request of this example alone would get")
    message: str = Field(description="what happened, in one line for people")


class ClassifyResult(BaseModel):
    """The result of one example, or its error and nothing else."""

    index: int = Field(description="position in the request's input, from 0")
    model: str | None = Field(default=None, description="whose result it is, where several models were asked")
    label: Literal[0, 1] | None = Field(default=None, description="1 where score reaches threshold")
    probs: Pair | None = Field(default=None, description="probability of class 0 and of class 1")
    score: float | None = Field(default=None, description="calibrated probability of class 1")
    threshold: float | None = Field(default=None, description="score from which the label is 1")
    decision: Decision | None = Field(default=None, description="yes or no as the label says, or abstain")
    error: ErrorOfItem | None = None


class Usage(BaseModel):
    """What a request cost, in tokens that the model read; examples with an error count nothing."""

    prompt_tokens: int
    total_tokens: int


class ClassifyAnswer(BaseModel):
    """Results in the order of the request's input; where several models were asked, all of an example together."""

    id: str
    object: Literal["list"] = "list"
    created: int = Field(description="seconds since 1970")
    model: str | list[str] = Field(description="who was asked, as in the request")
    data: list[ClassifyResult]
    usage: Usage


EXAMPLES: dict[str, Any] = {
    "text": {"summary": "One text", "value": {"input": [{"text": "It is red."}]}},
    "picture": {
        "summary": "A picture and two statements about it",
        "value": {
            "input": [
                {"image": PICTURE, "text": "It is red."},
                {"image": PICTURE, "text": "It is blue."},
            ]
        },
    },
    "messages": {
        "summary": "Messages as chat clients send them",
        "value": {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": PICTURE}},
                        {"type": "text", "text": "It is red."},
                    ],
                }
            ]
        },
    },
}
"""Bodies for the OpenAPI page."""
