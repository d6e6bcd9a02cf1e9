"""`/predict`: the shapes of text-embeddings-inference (TEI)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Discriminator, Field, Tag, WrapValidator

from qwen_vl_classifier.serving.schemas.examples import PICTURE, ClassifyItem, Request


def _kind(value: Any) -> Literal["<text>", "<item>", "<batch>"]:
    if isinstance(value, str):
        return "<text>"
    return "<batch>" if isinstance(value, list) else "<item>"


_AnyInput: TypeAlias = Annotated[
    str | Annotated[list[str], Field(min_length=1, max_length=1)] | ClassifyItem, WrapValidator(lambda value, _: value)
]


class PredictRequest(Request):
    """One input, or a list of them: text, a list of one text, or an object with image and text."""

    inputs: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[ClassifyItem, Tag("<item>")]
        | Annotated[list[_AnyInput], Field(min_length=1), Tag("<batch>")],
        Discriminator(_kind),
    ]
    model: str | None = Field(default=None, description="a name that /v1/models lists; not needed if it lists one")
    truncate: bool | None = Field(default=None, description="taken and not looked at: nothing is ever cut off")
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None
    raw_scores: Literal[False] | None = Field(default=None, description="scores are always probabilities")


class PredictedClass(BaseModel):
    """One of the two classes."""

    score: float = Field(description="its calibrated probability")
    label: str = Field(description="its name")


EXAMPLES: dict[str, Any] = {
    "text": {"summary": "One text", "value": {"inputs": "It is red."}},
    "batch": {
        "summary": "A text, and a picture with a text",
        "value": {"inputs": ["It is red.", {"image": PICTURE, "text": "It is red."}]},
    },
}
