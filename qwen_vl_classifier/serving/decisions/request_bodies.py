"""The body of a request for decisions: what is accepted, and the questions and pictures that are in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from qwen_vl_classifier.files.bounded import is_deeper
from qwen_vl_classifier.serving.decisions.placeholders import Placeholders
from qwen_vl_classifier.serving.decisions.questions import LETTERS, Content, Kind, Question, spelled
from qwen_vl_classifier.serving.http.problems import RefusedError, explain_invalid
from qwen_vl_classifier.serving.items import MAX_IMAGES
from qwen_vl_classifier.serving.schemas import Picture, StrictModel

ZERO_SHOT = "/zero-shot"
"""Behind the name of a classifier: its backbone answers every question, also those that the classifier could."""

MAX_QUESTIONS = 64
"""Most questions of one request."""

MAX_DEPTH = 32
"""How deep objects and lists of a request may be nested in each other."""

MAX_FIELDS = 256
"""Most fields of one object of a request, such as its state."""

INVALID = 422
"""The status of a request that does not fit the schema, as in other servers of this dialect."""

_MAX_ASSETS = 4


def _check_content(value: Any, _: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(value, (str, dict, list)):
        raise ValueError("is not text; expected text, an object or a list")
    if is_deeper(value, MAX_DEPTH):
        raise ValueError(f"is nested too deep; expected at most {MAX_DEPTH} levels")
    return value


def _check_options(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Check the options of a choice, whose names no message may repeat."""
    if not isinstance(value, dict) or not value:
        raise ValueError("has no options; expected an object of options and what each means")
    try:
        return check(value)
    except ValidationError:
        raise ValueError("describes an option by a number or truth value; expected text or null") from None


AnyContent: TypeAlias = Annotated[str | dict[str, Any] | list[Any], WrapValidator(_check_content)]


class NoulCriteria(StrictModel):
    """What the two answers of a yes/no question mean."""

    true: AnyContent | None = None
    false: AnyContent | None = None


class NoulQuestion(StrictModel):
    """A yes/no question."""

    type: Literal["noul"]
    instructions: AnyContent | None = None
    criteria: NoulCriteria | None = None


class ChoiceQuestion(StrictModel):
    """Which of several options fits best."""

    type: Literal["choice"]
    instructions: AnyContent | None = None
    criteria: Annotated[dict[str, AnyContent | None], WrapValidator(_check_options)] = Field(
        description="options and what each means; if all are names that /v1/models lists, these classifiers answer"
    )


class ScoreQuestion(StrictModel):
    """Which level of a scale fits best."""

    type: Literal["score"]
    instructions: AnyContent | None = None
    criteria: list[AnyContent] = Field(min_length=1, max_length=len(LETTERS), description="levels, lowest first")


class Asset(StrictModel):
    """A picture of the state."""

    type: Literal["image"] | None = None
    format: str | None = Field(default=None, description="accepted and ignored: the content says what the picture is")
    data_base64: Picture | None = None
    part: str | None = Field(default=None, description="in a form, the name of the part that is the picture")


_QUESTIONS: dict[Kind, type[NoulQuestion | ChoiceQuestion | ScoreQuestion]] = {
    "noul": NoulQuestion,
    "choice": ChoiceQuestion,
    "score": ScoreQuestion,
}


class DecisionRequest(StrictModel):
    """Questions about one state."""

    model: str | None = Field(
        default=None,
        description=f"a name that /v1/models lists; with {ZERO_SHOT} behind it, its backbone answers every question; "
        "not needed if one is listed",
    )
    state: AnyContent = Field(description="what the questions are about")
    questions: dict[
        str, Annotated[NoulQuestion | ChoiceQuestion | ScoreQuestion, WrapValidator(lambda value, _: value)]
    ] = Field(min_length=1, max_length=MAX_QUESTIONS, description="by name; answers have the same names")
    assets: dict[str, Annotated[Asset, WrapValidator(lambda value, _: value)]] | None = Field(
        default=None,
        max_length=_MAX_ASSETS,
        description="pictures by the placeholder that stands for each in texts of state, instructions or criteria",
    )
    images: list[Picture] | None = Field(
        default=None, max_length=MAX_IMAGES, description="pictures that come before the state"
    )


class DecisionForm(StrictModel):
    """A request whose pictures are files: each is a part that an asset names."""

    request: str = Field(description="the request as JSON")


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request that fits the schema.

    Attributes:
        model: As it was given.
        state: What the questions are about.
        questions: By name.
        placeholders: Where its pictures belong.
    """

    model: str | None
    state: Content
    questions: dict[str, Question]
    placeholders: Placeholders


def parse_request(content: DecisionRequest, max_chars: int, parts: dict[str, bytes] | None = None) -> ParsedRequest:
    """Check questions and assets, one by one.

    Args:
        content: The body.
        max_chars: Most characters of a question together with the state.
        parts: The other parts of a form, by name.

    Raises:
        RefusedError: 422, one does not fit the schema; 413, one is too long.
    """
    questions = {
        name: _question(question, f"questions.{number}")
        for number, (name, question) in enumerate(content.questions.items())
    }
    own = len(spelled(content.state))
    for number, (name, question) in enumerate(questions.items()):
        _check_name(name, f"questions.{number}")
        if own + question.length > max_chars:
            where = "state" if own > max_chars else f"questions.{number}"
            detail = f"state and question have more than {max_chars:,} characters; send shorter ones"
            raise RefusedError(413, "text_too_large", detail, param=where)
    pictures = {
        name: _picture(name, asset, parts or {}, f"assets.{number}")
        for number, (name, asset) in enumerate((content.assets or {}).items())
    }
    placeholders = Placeholders(pictures, content.images or ())
    written: list[Content | None] = [content.state]
    for question in questions.values():
        written += [question.instructions, *question.criteria, *question.criteria.values()]
    for number, name in enumerate(pictures):
        if not placeholders.stand_in(name, written):
            raise unfit(f"assets.{number}", "is not used: its placeholder is in no text of the request")
    return ParsedRequest(content.model, content.state, questions, placeholders)


def _check_name(name: str, where: str) -> None:
    """Make sure that an answer can be given under a name: JSON can spell half of a surrogate pair, and UTF-8 cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise unfit(where, "has a name with an unpaired surrogate; expected valid Unicode") from None


def _question(given: Any, where: str) -> Question:
    kind = given.get("type") if isinstance(given, dict) else None
    schema = _QUESTIONS.get(kind) if isinstance(kind, str) else None  # type: ignore[call-overload]
    if schema is None:
        raise unfit(where, f"has an unknown type; expected {', '.join(_QUESTIONS)}")
    try:
        question = schema.model_validate(given)
    except ValidationError as error:
        raise unfit(where, f"is not valid: {explain_invalid(error)}") from None
    criteria: dict[str, Content | None]
    if isinstance(question, NoulQuestion):
        meanings = question.criteria or NoulCriteria()
        criteria = {"true": meanings.true, "false": meanings.false}
    elif isinstance(question, ScoreQuestion):
        criteria = {str(level): text for level, text in enumerate(question.criteria)}
    else:
        criteria = dict(question.criteria)
    return Question(question.type, question.instructions, criteria)


def _picture(name: str, given: Any, parts: dict[str, bytes], where: str) -> str | bytes:
    if not name.strip():
        raise unfit(where, "has a blank placeholder; expected a text that stands for the picture")
    try:
        asset = Asset.model_validate(given)
    except ValidationError as error:
        raise unfit(where, f"is not valid: {explain_invalid(error)}") from None
    if asset.part is not None and asset.part in parts:
        return parts[asset.part]
    if asset.part is not None or asset.data_base64 is None:
        raise unfit(where, "has no picture; expected data_base64, or in a form the name of a part")
    return asset.data_base64


def unfit(where: str, why: str) -> RefusedError:
    """Say that a part of a request does not fit the schema."""
    return RefusedError(INVALID, "invalid_request", f"{where} {why}", param=where)
