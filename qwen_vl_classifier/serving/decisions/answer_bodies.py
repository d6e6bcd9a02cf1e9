"""The body of an answer to questions, and how it follows from probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from pydantic import BaseModel, Field

from qwen_vl_classifier.data.example import Decision
from qwen_vl_classifier.serving.decisions.placeholders import TextSource
from qwen_vl_classifier.serving.decisions.question_plan import Readers
from qwen_vl_classifier.serving.decisions.questions import (
    Question,
    choice_confidence,
    chosen,
    expected_level,
    score_confidence,
)
from qwen_vl_classifier.serving.decisions.request_bodies import AnyContent
from qwen_vl_classifier.serving.models.model_set import ModelSet
from qwen_vl_classifier.serving.schemas import Pair


class ClassifierReading(BaseModel):
    """The answer of one trained classifier."""

    model: str
    version: str = Field(description="as /v1/models lists it")
    probability: float = Field(description="calibrated probability of class 1")
    label: Literal[0, 1] = Field(description="1 where probability reaches threshold")
    label_name: str
    threshold: float
    abstention: Pair | None = Field(default=None, description="probabilities between which the decision is abstain")
    decision: Decision = Field(description="yes or no, as the label, or abstain")
    text_from: TextSource = Field(description="where the text that it read came from")
    ignored: list[Literal["instructions", "criteria"]] = Field(
        description="parts of the question that it ignored: what it decides was fixed in training"
    )


class NoulAnswer(BaseModel):
    """The answer to a yes/no question."""

    type: Literal["noul"] = "noul"
    noul: float = Field(description="probability of yes")
    classifier: ClassifierReading | None = Field(default=None, description="missing where the answer is zero-shot")


class ChoiceAnswer(BaseModel):
    """The answer to a choice."""

    type: Literal["choice"] = "choice"
    choice: str = Field(description="the most probable option")
    confidence: float = Field(description="0 where all options are equally likely, 1 where one is certain")
    probabilities: dict[str, float] = Field(
        description="by option, summing to 1; of classifiers, their probabilities of class 1 divided by their sum; of "
        "the exclusive classes of a panel, in proportion to the panel's own"
    )
    classifiers: list[ClassifierReading] | None = Field(
        default=None, description="probability of each option by itself; missing where the answer is zero-shot"
    )


class ScoreAnswer(BaseModel):
    """The answer to a question for a level."""

    type: Literal["score"] = "score"
    score: float = Field(description="mean of the levels 0, 1, ... by their probabilities")
    legend: dict[str, AnyContent] = Field(description="the levels")
    confidence: float = Field(description="0 where all levels are equally likely, 1 where one is certain")
    probabilities: dict[str, float] = Field(description="by level, summing to 1")


Answer: TypeAlias = NoulAnswer | ChoiceAnswer | ScoreAnswer


class DecisionUsage(BaseModel):
    """Tokens that models read; what several answers are read from counts once."""

    input_tokens: int
    output_tokens: Literal[0] = 0


class DecisionAnswers(BaseModel):
    """Answers by the names of their questions."""

    id: str
    object: Literal["structured_decision"] = "structured_decision"
    created: int = Field(description="seconds since 1970")
    model: str
    answers: dict[str, Answer]
    usage: DecisionUsage


def classifiers_answer(
    served: ModelSet,
    question: Question,
    readers: Readers,
    scores: Mapping[str, float],
    shares: Mapping[str, float] | None = None,
) -> NoulAnswer | ChoiceAnswer:
    """Return the answer of trained classifiers.

    Args:
        served: The classifiers.
        question: A yes/no question, or a choice between several of them.
        readers: Which of them answer it, and what they read.
        scores: The calibrated probability of class 1 by the name of each that was asked.
        shares: The probability of each option, to which those of a choice are proportional; `None` for `scores`.
    """
    readings = [_reading(served, name, scores[name], readers.text_from, question) for name in readers.names.values()]
    if question.kind == "noul":
        return NoulAnswer(noul=readings[0].probability, classifier=readings[0])
    by_option = shares or {option: scores[name] for option, name in readers.names.items()}
    total = sum(by_option.values())
    probabilities = {option: share / total if total else 1 / len(by_option) for option, share in by_option.items()}
    return ChoiceAnswer(
        choice=chosen(probabilities),
        confidence=choice_confidence(probabilities),
        probabilities=probabilities,
        classifiers=readings,
    )


def _reading(served: ModelSet, name: str, score: float, text_from: TextSource, question: Question) -> ClassifierReading:
    classifier = served.models[name]
    prediction = classifier.decision_of(score)
    ignored: list[Literal["instructions", "criteria"]] = []
    if question.instructions and text_from == "state":
        ignored.append("instructions")
    if any(question.criteria.values()):
        ignored.append("criteria")
    return ClassifierReading(
        model=name,
        version=served.version_of(name).digest,
        probability=prediction.probability,
        label=1 if prediction.label else 0,
        label_name=classifier.label_names[prediction.label],
        threshold=classifier.threshold,
        abstention=None if classifier.abstention is None else list(classifier.abstention),
        decision=prediction.decision,
        text_from=text_from,
        ignored=ignored,
    )


def zero_shot_answer(question: Question, probabilities: list[float]) -> Answer:
    """Return the answer of a backbone, from the probabilities of the question's labels in their order."""
    by_option = dict(zip(question.criteria, probabilities, strict=True))
    if question.kind == "noul":
        return NoulAnswer(noul=by_option["true"])
    if question.kind == "choice":
        confidence = choice_confidence(by_option)
        return ChoiceAnswer(choice=chosen(by_option), confidence=confidence, probabilities=by_option)
    return ScoreAnswer(
        score=expected_level(probabilities),
        legend={level: text or "" for level, text in question.criteria.items()},
        confidence=score_confidence(probabilities),
        probabilities=by_option,
    )
