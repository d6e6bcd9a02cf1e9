"""`/v1/classify`: examples as JSON, as messages of a chat or as a form, for classifiers and panels of labels."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from fastapi import APIRouter, Request
from pydantic import BaseModel, Discriminator, Field, Tag, WrapValidator, model_validator

from qwen_vl_classifier.data.example import Decision, PanelPrediction
from qwen_vl_classifier.serving.http.forms import Part
from qwen_vl_classifier.serving.http.incoming import Incoming, admitted, refused
from qwen_vl_classifier.serving.http.openapi import CLASSIFYING, problems, takes
from qwen_vl_classifier.serving.http.problems import RefusedError
from qwen_vl_classifier.serving.items import DEFECT, Item, ItemError, ItemResult
from qwen_vl_classifier.serving.models.model_set import ModelSet
from qwen_vl_classifier.serving.observability.logs import add_to_log
from qwen_vl_classifier.serving.schemas import (
    PICTURE,
    ClassifyItem,
    Messages,
    MessagesItem,
    Pair,
    StrictModel,
    item_of_messages,
    one_or_several,
    parse_item,
)

if TYPE_CHECKING:  # it brings torch
    from qwen_vl_classifier.classifier.panel import Panel

_AnyItem: TypeAlias = Annotated[ClassifyItem | MessagesItem, WrapValidator(lambda value, _: value)]
"""An item that is checked later, by itself, so that a bad one spoils no other."""

ModelNames: TypeAlias = Annotated[
    Annotated[str, Tag("<one>")]
    | Annotated[list[str], Field(fail_fast=True, min_length=1), Tag("<several>")]
    | Annotated[None, Tag("<none>")],
    Discriminator(lambda value: "<none>" if value is None else one_or_several(value)),
]


class ClassifyRequest(StrictModel):
    """Examples to classify in `input`, or one example in `messages`."""

    model: ModelNames = Field(
        default=None,
        description="a name that /v1/models lists, or several; not needed if it lists one; PANEL/LABEL names one label "
        "of a panel",
    )
    input: list[_AnyItem] | None = Field(default=None, min_length=1, description="examples")
    messages: Messages | None = Field(default=None, description="one example as messages of a chat")

    @model_validator(mode="after")
    def _one_form(self) -> ClassifyRequest:
        if (self.input is None) == (self.messages is None):
            raise ValueError("expected either input or messages")
        return self


class ClassifyForm(StrictModel):
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


class LabelResult(BaseModel):
    """What one label of a panel says of an example."""

    label: Literal[0, 1] = Field(description="1 where score reaches threshold")
    score: float = Field(description="calibrated probability of class 1")
    threshold: float = Field(description="score from which the label is 1")
    decision: Decision = Field(description="yes or no, as the label, or abstain")


class ClassifyResult(BaseModel):
    """The result of one example, or its error and nothing else.

    A classifier gives `label` to `decision`, a panel `labels`, and a panel of exclusive classes `class`, `probability`
    and `probabilities`.
    """

    index: int = Field(description="position in the request's input, from 0")
    model: str | None = Field(default=None, description="the model of this result, where several were requested")
    label: Literal[0, 1] | None = Field(default=None, description="1 where score reaches threshold")
    probs: Pair | None = Field(default=None, description="probability of class 0 and of class 1")
    score: float | None = Field(default=None, description="calibrated probability of class 1")
    threshold: float | None = Field(default=None, description="score from which the label is 1")
    decision: Decision | None = Field(default=None, description="yes or no, as the label, or abstain")
    labels: dict[str, LabelResult] | None = Field(default=None, description="of a panel: the result for each label")
    class_: str | None = Field(
        default=None, alias="class", description="of a panel of exclusive classes: the most probable class"
    )
    probability: float | None = Field(default=None, description="probability of that class")
    probabilities: dict[str, float] | None = Field(default=None, description="of all classes; they sum to 1")
    error: ErrorOfItem | None = None


class Usage(BaseModel):
    """What a request cost, in tokens that the model read; examples with an error count nothing."""

    prompt_tokens: int
    total_tokens: int


class ClassifyAnswer(BaseModel):
    """Results in the order of the request's input; where several models were requested, all of an example together."""

    id: str
    object: Literal["list"] = "list"
    created: int = Field(description="seconds since 1970")
    model: str | list[str] = Field(description="the model or models, as in the request")
    version: str | list[str] = Field(description="of each of them, as /v1/models lists it")
    data: list[ClassifyResult]
    usage: Usage


_EXAMPLES: dict[str, Any] = {
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

router = APIRouter(tags=["classify"])


@router.post(
    "/v1/classify",
    operation_id="classify",
    response_model_exclude_none=True,
    responses=problems(*CLASSIFYING),
    openapi_extra=takes(ClassifyRequest, _EXAMPLES, form=ClassifyForm),
)
@router.post("/classify", include_in_schema=False, response_model_exclude_none=True)
async def classify(request: Request) -> ClassifyAnswer:
    """Classify examples; of several, one that cannot be classified has an `error` in its own place."""
    with admitted(request) as incoming:
        items, model, alone = await _read(incoming)
        names = incoming.names(model)
        add_to_log(items=len(items), models=len(names))
        outcomes = await incoming.wait(incoming.service.classify(items, names, incoming.admitted, incoming.served))
        if alone and isinstance(outcomes[0], ItemError):
            raise refused(outcomes[0])
        if all(isinstance(outcome, ItemError) and outcome.code == "internal_error" for outcome in outcomes):
            raise RefusedError(500, "internal_error", DEFECT)  # no result at all, by no fault of the caller
        return _answer(incoming.served, outcomes, names, several=isinstance(model, list))


async def _read(incoming: Incoming) -> tuple[list[Item | ItemError], str | list[str] | None, bool]:
    """Return the examples of a body, the models it names, and whether its one example's error is the request's."""
    if incoming.is_form():
        item, names = await incoming.form(_of_form)
        return [item], names, True

    def examples(content: ClassifyRequest) -> tuple[list[Item | ItemError], str | list[str] | None, bool]:
        if content.messages is not None:
            return [item_of_messages(content.messages)], content.model, True
        items = content.input or []
        incoming.check_count(len(items), "input")
        return [parse_item(item) for item in items], content.model, False

    return await incoming.json(ClassifyRequest, examples)


def _of_form(parts: Sequence[Part]) -> tuple[Item, str | list[str] | None]:
    """Return the example of a form, and the models that it names.

    Raises:
        RefusedError: 400, fields that are not known or not there, or text that is no UTF-8.
    """
    texts: dict[str, list[str]] = {"text": [], "model": []}
    images: list[str | bytes] = []
    for part in parts:
        if part.name == "image":
            images.append(part.data if part.is_file else _utf8(part))
        elif part.name in texts:
            texts[part.name].append(_utf8(part))
        else:
            raise _invalid_form("a field is not known; expected image, text and model")
    if len(texts["text"]) != 1:
        raise _invalid_form(f"the form has {len(texts['text'])} fields named text; expected one")
    names = texts["model"]
    return Item(texts["text"][0], tuple(images)), names[0] if len(names) == 1 else names or None


def _utf8(part: Part) -> str:
    try:
        return part.data.decode()
    except UnicodeDecodeError:
        raise _invalid_form("a field is not UTF-8 text; send pictures as files of the field image") from None


def _invalid_form(why: str) -> RefusedError:
    return RefusedError(400, "invalid_form", why)


def _answer(
    served: ModelSet, outcomes: Sequence[ItemResult | ItemError], names: Sequence[str], *, several: bool
) -> ClassifyAnswer:
    tokens = sum(outcome.tokens for outcome in outcomes if isinstance(outcome, ItemResult))
    versions = [served.version_of(name).digest for name in names]
    return ClassifyAnswer(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=list(names) if several else names[0],
        version=versions if several else versions[0],
        data=[
            _result(served, index, outcome, name, several) for index, outcome in enumerate(outcomes) for name in names
        ],
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )


def _result(served: ModelSet, index: int, outcome: ItemResult | ItemError, name: str, several: bool) -> ClassifyResult:
    model = name if several else None
    if isinstance(outcome, ItemError):
        error = ErrorOfItem(code=outcome.code, status=outcome.status, message=outcome.message)
        return ClassifyResult(index=index, model=model, error=error)
    if name in outcome.panels:
        return _panel_result(served.saved_panels[name], index, model, outcome.panels[name])
    classifier = served.models[name]
    probabilities = outcome.probabilities[name]
    prediction = classifier.decision_of(probabilities[1])
    return ClassifyResult(
        index=index,
        model=model,
        label=1 if prediction.label else 0,
        probs=list(probabilities),
        score=prediction.probability,
        threshold=classifier.threshold,
        decision=prediction.decision,
    )


def _panel_result(panel: Panel, index: int, model: str | None, prediction: PanelPrediction) -> ClassifyResult:
    if panel.one_of:
        probabilities = {name: one.probability for name, one in prediction.labels.items()}
        return ClassifyResult.model_validate(
            {
                "index": index,
                "model": model,
                "class": prediction.label_name,
                "probability": prediction.probability,
                "probabilities": probabilities,
            }
        )
    labels = {
        name: LabelResult(
            label=1 if one.label else 0, score=one.probability, threshold=classifier.threshold, decision=one.decision
        )
        for classifier, (name, one) in zip(panel.classifiers, prediction.labels.items(), strict=True)
    }
    return ClassifyResult(index=index, model=model, labels=labels)
