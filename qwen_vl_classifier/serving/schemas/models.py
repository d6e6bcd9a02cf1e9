"""What is served, and how the server is."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, Field

# Not tuples: in JSON schema these are of a form that many generators of clients do not know.
Pair: TypeAlias = Annotated[list[float], Field(min_length=2, max_length=2)]
LabelNames: TypeAlias = Annotated[list[str], Field(min_length=2, max_length=2)]


class ServedModel(BaseModel):
    """One classifier that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970, when it was loaded")
    owned_by: Literal["qwen-vl-classifier"] = "qwen-vl-classifier"
    label_names: LabelNames = Field(description="what class 0 and class 1 are called")
    threshold: float = Field(description="score from which the label is 1")
    abstention: Pair | None = Field(
        description="scores between which the decision is abstain, both included; null where it never is"
    )


class ServedModels(BaseModel):
    """All classifiers that can be asked."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class Health(BaseModel):
    """That all is well; anything else is a problem."""

    status: Literal["live", "ready"]
