"""What requests and answers look like: the one place from which both the checks and the OpenAPI page are made.

Requests and lists follow OpenAI's shapes; errors follow RFC 9457 (problem details) and carry OpenAI's `error` object
too, so that either kind of client finds what it looks for.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator

from qwen_vl_classifier.data.example import Decision

MAX_IMAGES = 8
"""Most pictures in one example."""

Image = Annotated[str, Field(description="data URI or base64 of a JPEG, PNG or WebP file")]


class ClassifyItem(BaseModel):
    """One example: picture(s) and text."""

    model_config = ConfigDict(extra="forbid")

    image: Image | Annotated[list[Image], Field(max_length=MAX_IMAGES)] | None = Field(
        default=None, description="one picture, several in reading order, or null for text alone"
    )
    text: str = Field(description="the words that go with it")

    @field_validator("image", mode="before")
    @classmethod
    def _is_text(cls, image: Any) -> Any:
        # By hand, since pydantic would list each of the ways in which a picture may be given.
        pictures = image if isinstance(image, list) else [] if image is None else [image]
        if not all(isinstance(picture, str) for picture in pictures):
            raise ValueError("is no text; wanted a data URI or base64, a list of these, or null")
        if len(pictures) > MAX_IMAGES:
            raise ValueError(f"holds {len(pictures)} pictures; wanted at most {MAX_IMAGES}")
        return image

    @field_validator("text")
    @classmethod
    def _has_words(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is blank; wanted words")
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; tokenizers cannot read it
            raise ValueError("holds an unpaired surrogate; wanted whole characters") from None
        return text

    @property
    def images(self) -> list[str]:
        """The pictures as a list, empty for text alone."""
        if self.image is None:
            return []
        return [self.image] if isinstance(self.image, str) else self.image


class ClassifyRequest(BaseModel):
    """Examples to classify. Each is checked by itself, so that one bad example spoils no other."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(default=None, description="a name that /v1/models lists; not needed if it lists one")
    input: list[Annotated[Any, WithJsonSchema(ClassifyItem.model_json_schema())]] = Field(
        min_length=1, description="examples"
    )


class ItemError(BaseModel):
    """Why one example has no result."""

    code: Literal["invalid_item", "invalid_image", "too_large", "internal_error"]
    message: str


class ClassifyResult(BaseModel):
    """The result of one example, or its error and nothing else."""

    index: int = Field(description="position in the request's input, from 0")
    label: Literal[0, 1] | None = Field(default=None, description="1 where score reaches threshold")
    probs: tuple[float, float] | None = Field(default=None, description="probability of class 0 and of class 1")
    score: float | None = Field(default=None, description="calibrated probability of class 1")
    threshold: float | None = Field(default=None, description="score from which the label is 1")
    decision: Decision | None = Field(default=None, description="yes or no as the label says, or abstain")
    error: ItemError | None = None


class Usage(BaseModel):
    """What a request cost, in tokens that the model read; examples with an error count nothing."""

    prompt_tokens: int
    total_tokens: int


class ClassifyAnswer(BaseModel):
    """Results in the order of the request's input."""

    id: str
    object: Literal["list"] = "list"
    created: int = Field(description="seconds since 1970")
    model: str
    data: list[ClassifyResult]
    usage: Usage


class ServedModel(BaseModel):
    """One classifier that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970, when it was loaded")
    owned_by: Literal["qwen-vl-classifier"] = "qwen-vl-classifier"
    label_names: tuple[str, str]
    threshold: float


class ServedModels(BaseModel):
    """All classifiers that can be asked."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class Health(BaseModel):
    """That all is well; anything else is a problem."""

    status: Literal["live", "ready"]


class OpenAIError(BaseModel):
    """OpenAI's error object."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None = None
    code: str


class Problem(BaseModel):
    """Problem details (RFC 9457), with OpenAI's error object."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: str
    error: OpenAIError


def problem(status: int, code: str, detail: str) -> Problem:
    """Describe why a request has no answer.

    Args:
        status: The HTTP status.
        code: What happened, in one word for programs.
        detail: What happened, in one line for people. It is sent to the caller: no path, no key.
    """
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind: Any = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        error=OpenAIError(message=detail, type=kind, code=code),
    )


def explain_invalid(error: ValidationError) -> str:
    """Say in one line what is wrong with a request, repeating nothing of it: neither values nor unknown names."""
    problems = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        unknown = item["type"] == "extra_forbidden"
        where = ".".join(map(str, item["loc"][:-1] if unknown else item["loc"]))
        what = _WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
        problems.append(f"{where} {what}" if where else what)
    return "; ".join(dict.fromkeys(problems))


_WORDS = {
    "extra_forbidden": "has a field that is not known; leave it out",
    "list_type": "is no list; wanted a list",
    "missing": "is missing",
    "model_type": "is no object; wanted an object",
    "string_type": "is no text; wanted text",
    "too_short": "is empty; wanted at least one",
}
