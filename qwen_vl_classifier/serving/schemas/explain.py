"""`/v1/explain`: what moved one probability."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, Field

from qwen_vl_classifier.data.example import Decision
from qwen_vl_classifier.serving.schemas.examples import PICTURE, ClassifyItem

# As in `evaluation.explain`, which cannot be imported here: it brings torch.
ExplainMethod: TypeAlias = Literal["gradients", "tokens", "occlusion"]
ExplainBaseline: TypeAlias = Literal["average", "empty"]


class ExplainRequest(ClassifyItem):
    """One example whose answer is to be explained."""

    model: str | None = Field(default=None, description="a name that /v1/models lists; not needed if it lists one")
    method: ExplainMethod = Field(default="gradients", description="how; occlusion is slow")
    baseline: ExplainBaseline | None = Field(
        default=None,
        description="picture to compare with: the average training picture, or an empty one; null for the average if "
        "the classifier has one",
    )


class Contribution(BaseModel):
    """A word and what it adds."""

    word: str
    contribution: float


class ExplainAnswer(BaseModel):
    """What moved one probability: contributions in log odds, positive where they speak for class 1."""

    model: str
    probability: float = Field(description="calibrated probability of class 1")
    decision: Decision
    log_odds: float
    unit: str
    method: ExplainMethod
    exact: bool
    baseline: ExplainBaseline | None = Field(description="picture that squares are compared with; null for none")
    words: list[Contribution]
    patches: list[list[list[float]]] = Field(description="for each picture rows and columns of squares")
    template: float
    rest: float
    summary: list[str] = Field(description="what contributions start from, and a warning where that outweighs them")
    heat_map: str = Field(description="data URI of a PNG: picture(s) and words, coloured by what they add")


EXAMPLES: dict[str, Any] = {
    "picture": {"summary": "A picture and a text", "value": {"image": PICTURE, "text": "It is red."}},
}
