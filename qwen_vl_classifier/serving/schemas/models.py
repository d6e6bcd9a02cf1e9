"""What is served, and how the server is."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ServedModel(BaseModel):
    """One classifier that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970, when it was loaded")
    owned_by: Literal["qwen-vl-classifier"] = "qwen-vl-classifier"
    label_names: tuple[str, str]
    threshold: float = Field(description="score from which the label is 1")
    abstention: tuple[float, float] | None = Field(
        description="scores from the first to the second get the decision abstain; null where there is no such band"
    )


class ServedModels(BaseModel):
    """All classifiers that can be asked."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class Health(BaseModel):
    """That all is well; anything else is a problem."""

    status: Literal["live", "ready"]
