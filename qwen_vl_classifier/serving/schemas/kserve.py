"""`/v2`: the open inference protocol of KServe, version 2."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from qwen_vl_classifier.data.example import Decision
from qwen_vl_classifier.serving.schemas.examples import PICTURE, Request


class InferTensor(Request):
    """An input: its data in row-major order, flat or as lists of lists."""

    name: Literal["text", "image"]
    shape: list[int] = Field(min_length=1, max_length=2, description="[n], or [n, 1]")
    datatype: Literal["BYTES"]
    data: list[Any] = Field(description="texts; of pictures base64 or a data URI, or an empty text for none")
    parameters: dict[str, Any] | None = None


class RequestedOutput(Request):
    """An output that is asked for."""

    name: Literal["probability", "label", "decision"]
    parameters: dict[str, Any] | None = None


class InferRequest(Request):
    """Examples as columns: the input `text`, and `image` where there are pictures."""

    id: str | None = Field(default=None, max_length=200, description="given back as it is")
    parameters: dict[str, Any] | None = None
    inputs: list[InferTensor] = Field(min_length=1, max_length=2)
    outputs: list[RequestedOutput] | None = Field(default=None, description="all if it is missing or empty")


class OutputTensor(BaseModel):
    """An output."""

    name: str
    shape: list[int]
    datatype: Literal["FP64", "INT64", "BYTES"]
    data: list[float] | list[int] | list[Decision] = Field(description="row-major and flat")


class InferAnswer(BaseModel):
    """Results as columns."""

    id: str | None = None
    model_name: str
    outputs: list[OutputTensor]


class ServerLive(BaseModel):
    """That the server is alive."""

    live: Literal[True] = True


class ServerReady(BaseModel):
    """That the server is ready."""

    ready: Literal[True] = True


class ServerMetadata(BaseModel):
    """What the server is."""

    name: Literal["qwen-vl-classifier"] = "qwen-vl-classifier"
    version: str
    extensions: list[str] = []


class ModelReady(BaseModel):
    """That a model is ready."""

    name: str
    ready: Literal[True] = True


class TensorMetadata(BaseModel):
    """Name, type and shape of an input or output; -1 stands for the number of examples."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes and returns."""

    name: str
    versions: list[str] = []
    platform: Literal["qwen-vl-classifier"] = "qwen-vl-classifier"
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


EXAMPLES: dict[str, Any] = {
    "text": {
        "summary": "A picture with a text, and a text alone",
        "value": {
            "inputs": [
                {
                    "name": "text",
                    "shape": [2],
                    "datatype": "BYTES",
                    "data": ["It is red.", "Red is a colour."],
                },
                {"name": "image", "shape": [2], "datatype": "BYTES", "data": [PICTURE, ""]},
            ]
        },
    }
}
