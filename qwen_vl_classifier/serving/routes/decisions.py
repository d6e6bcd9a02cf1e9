"""`/v1/systemone`: typed questions about a state, as transformers and vLLM answer them, for trained classifiers.

A yes/no question goes to the classifier that is named as the model, a choice between names of classifiers to these; any
other question is answered zero-shot by the backbone. What only a trained classifier can tell (its calibrated
probability, threshold and abstention) rides in a field of its own.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from qwen_vl_classifier.serving.decisions.answer_bodies import (
    Answer,
    DecisionAnswers,
    DecisionUsage,
    classifiers_answer,
    zero_shot_answer,
)
from qwen_vl_classifier.serving.decisions.question_plan import QuestionPlan
from qwen_vl_classifier.serving.decisions.request_bodies import (
    INVALID,
    MAX_FIELDS,
    ZERO_SHOT,
    DecisionForm,
    DecisionRequest,
    ParsedRequest,
    parse_request,
)
from qwen_vl_classifier.serving.http.forms import Part
from qwen_vl_classifier.serving.http.incoming import Incoming, admitted, check_classifier, refused
from qwen_vl_classifier.serving.http.openapi import CLASSIFYING, problems, takes
from qwen_vl_classifier.serving.http.problems import RefusedError
from qwen_vl_classifier.serving.items import ItemError
from qwen_vl_classifier.serving.models.label_names import label_of
from qwen_vl_classifier.serving.observability.logs import add_to_log
from qwen_vl_classifier.serving.schemas import PICTURE

_TONES = {"calm": "A polite message", "angry": "An upset message"}
_EXAMPLES: dict[str, Any] = {
    "text": {
        "summary": "A yes/no question, answered by the classifier",
        "value": {"state": "It is red.", "questions": {"holds": {"type": "noul"}}},
    },
    "picture": {
        "summary": "A yes/no question about a picture and a text",
        "value": {
            "state": {"photo": "img-1", "claim": "It is red."},
            "questions": {"holds": {"type": "noul", "instructions": "Does the claim hold?"}},
            "assets": {"img-1": {"type": "image", "data_base64": PICTURE}},
        },
    },
    "zero_shot": {
        "summary": "Questions for the backbone's own language head",
        "value": {
            "state": "I was charged twice!",
            "questions": {
                "tone": {"type": "choice", "instructions": "What is the tone?", "criteria": _TONES},
                "urgency": {"type": "score", "instructions": "How urgent is it?", "criteria": ["Can wait", "Today"]},
            },
        },
    },
}

router = APIRouter(tags=["decisions"])


@router.post(
    "/v1/systemone",
    operation_id="decide",
    response_model_exclude_none=True,
    responses=problems(*CLASSIFYING),
    openapi_extra=takes(DecisionRequest, _EXAMPLES, form=DecisionForm),
)
async def decide(request: Request) -> DecisionAnswers:
    """Answer typed questions about a state: by trained classifiers where these can, else zero-shot by the backbone."""
    with admitted(request) as incoming:
        parsed = await _read(incoming)
        incoming.check_count(len(parsed.questions), "questions")
        is_label = parsed.model in incoming.served.models  # of a panel, whose labels may have any name
        (name,) = incoming.names(parsed.model and (parsed.model if is_label else parsed.model.removesuffix(ZERO_SHOT)))
        in_words = bool(parsed.model) and parsed.model != name
        if not in_words and any(question.kind == "noul" for question in parsed.questions.values()):
            check_classifier(incoming.served, name)
        plan = QuestionPlan(parsed, incoming.served, name, in_words=in_words)
        add_to_log(items=len(parsed.questions), models=len(plan.names) + bool(plan.prompts))
        answers, tokens = await incoming.wait(_answers(incoming, plan))
    return DecisionAnswers(
        id=f"decision-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=parsed.model or name,
        answers={question: answers[question] for question in parsed.questions},
        usage=DecisionUsage(input_tokens=tokens),
    )


async def _read(incoming: Incoming) -> ParsedRequest:
    if incoming.is_form():
        return await incoming.form(lambda parts: _of_form(incoming, parts))
    most = incoming.service.config.max_text_chars
    return await incoming.json(
        DecisionRequest, lambda content: parse_request(content, most), invalid=INVALID, fields=MAX_FIELDS
    )


def _of_form(incoming: Incoming, parts: Sequence[Part]) -> ParsedRequest:
    """Return the request of a form, with pictures from its other parts.

    Raises:
        RefusedError: 400, parts that are missing or named twice; 422, the request does not fit the schema.
    """
    by_name = {part.name: part.data for part in parts}
    if len(by_name) < len(parts) or "request" not in by_name:
        raise RefusedError(400, "invalid_form", "the form has no part named request, or two parts of one name")
    content = incoming.fitting(by_name.pop("request"), DecisionRequest, invalid=INVALID, fields=MAX_FIELDS)
    return parse_request(content, incoming.service.config.max_text_chars, by_name)


async def _answers(incoming: Incoming, plan: QuestionPlan) -> tuple[dict[str, Answer], int]:
    """Run the passes that a plan needs, and return the answers and the tokens that were read."""
    answers: dict[str, Answer] = {}
    tokens = 0
    where = {key: f"questions.{number}" for number, key in enumerate(plan.parsed.questions)}
    if plan.examples:
        outcomes = await incoming.service.classify(plan.examples, plan.names, incoming.admitted, plan.served)
        for key, readers in plan.readers.items():
            outcome = outcomes[readers.example]
            if isinstance(outcome, ItemError):
                raise refused(outcome, "state" if readers.text_from == "state" else where[key])
            scores = {name: outcome.probabilities[name][1] for name in readers.names.values()}
            shares = None
            if readers.panel:
                labels_of_panel = outcome.panels[readers.panel].labels
                shares = {option: labels_of_panel[label_of(name)].probability for option, name in readers.names.items()}
            answers[key] = classifiers_answer(plan.served, plan.parsed.questions[key], readers, scores, shares)
        tokens += sum(outcome.tokens for outcome in outcomes if not isinstance(outcome, ItemError))
    if plan.prompts:
        labels = [plan.parsed.questions[key].labels for key in plan.prompts]
        prompts = list(plan.prompts.values())
        found = await incoming.service.read_labels(prompts, labels, plan.panel, incoming.admitted)
        for key, result in zip(plan.prompts, found, strict=True):
            if isinstance(result, ItemError):
                raise refused(result, where[key])
            tokens += result.tokens
            answers[key] = zero_shot_answer(plan.parsed.questions[key], list(result.probabilities.values()))
    return answers, tokens
