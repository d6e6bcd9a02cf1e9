"""`/v1/moderations`: OpenAI's shapes, with one category for each classifier."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag

from qwen_vl_classifier.serving.schemas.examples import PICTURE, Part, Request

AppliedType: TypeAlias = Literal["text", "image"]


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return "<text>"
    return "<parts>" if value and isinstance(value[0], dict) else "<texts>"


class ModerationRequest(Request):
    """What to look at: one text, several texts, or one example of text and pictures as parts of a message."""

    model: str | None = Field(
        default=None, description="a name that /v1/models lists; all of them if it is missing or one of OpenAI's own"
    )
    input: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[str], Field(min_length=1), Tag("<texts>")]
        | Annotated[list[Part], Field(min_length=1), Tag("<parts>")],
        Discriminator(_kind),
    ]


class ModerationResult(BaseModel):
    """What the classifiers say of one example."""

    flagged: bool = Field(description="whether any category is true")
    categories: dict[str, bool] = Field(description="for each classifier whether its label is 1")
    category_scores: dict[str, float] = Field(description="for each classifier the calibrated probability of class 1")
    category_applied_input_types: dict[str, list[AppliedType]]


class ModerationAnswer(BaseModel):
    """Results in the order of the request's input."""

    id: str
    model: str = Field(description="the names of the classifiers, with commas")
    results: list[ModerationResult]


EXAMPLES: dict[str, Any] = {
    "text": {"summary": "One text", "value": {"input": "It is red."}},
    "texts": {"summary": "Two texts", "value": {"input": ["It is red.", "It is blue."]}},
    "picture": {
        "summary": "A picture and a text",
        "value": {
            "input": [
                {"type": "image_url", "image_url": {"url": PICTURE}},
                {"type": "text", "text": "It is red."},
            ]
        },
    },
}
