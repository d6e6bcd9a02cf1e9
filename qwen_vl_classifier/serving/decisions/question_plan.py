"""Choose what answers each question of a request: trained classifiers, or the backbone's language head."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vl_classifier.serving.decisions.placeholders import TextSource
from qwen_vl_classifier.serving.decisions.questions import LETTERS, Question
from qwen_vl_classifier.serving.decisions.request_bodies import ParsedRequest, unfit
from qwen_vl_classifier.serving.http.problems import RefusedError
from qwen_vl_classifier.serving.items import Item
from qwen_vl_classifier.serving.models.model_set import ModelSet


@dataclass(frozen=True, slots=True)
class Readers:
    """The classifiers that answer one question.

    Attributes:
        names: Their names.
        example: The number of the example that they read.
        text_from: Where its text is from.
    """

    names: list[str]
    example: int
    text_from: TextSource


class QuestionPlan:
    """Which model answers which question of a request.

    Args:
        parsed: The request.
        served: The classifiers that are served.
        name: The classifier that is its model.
        in_words: Whether the backbone answers every question.

    Attributes:
        parsed: The same.
        panel: The classifiers that share the backbone of the model.
        names: The classifiers that answer.
        examples: What they read, each example once.
        readers: By question, the classifiers that answer it, the number of its example, and where its text is from.
        prompts: By question, what the backbone reads.

    Raises:
        RefusedError: 400, the backbone cannot answer a question.
    """

    def __init__(self, parsed: ParsedRequest, served: ModelSet, name: str, *, in_words: bool) -> None:
        self.parsed = parsed
        self.served = served
        self.panel = served.panel_of(name)
        self.names: list[str] = []
        self.examples: list[Item] = []
        self.readers: dict[str, Readers] = {}
        self.prompts: dict[str, Item] = {}
        for number, (key, question) in enumerate(parsed.questions.items()):
            names = [] if in_words else _answering(question, name, served)
            if names:
                item, source = parsed.placeholders.example(parsed.state, question)
                if item not in self.examples:
                    self.examples.append(item)
                self.names += [one for one in names if one not in self.names]
                self.readers[key] = Readers(names, self.examples.index(item), source)
            else:
                self.prompts[key] = self._prompt(question, f"questions.{number}")

    def _prompt(self, question: Question, where: str) -> Item:
        reader = self.panel.label_reader
        if reader.unavailable is not None:
            seen = f"this question needs the backbone's language head, but {reader.unavailable}"
            advice = "ask a yes/no question, or a choice between names of classifiers"
            raise RefusedError(400, "no_zero_shot", f"{seen}; {advice}", param=where)
        if len(question.criteria) > len(question.labels):
            raise unfit(where, f"has {len(question.criteria)} options; expected at most {len(LETTERS)}")
        item = self.parsed.placeholders.prompt(question.prompt(self.parsed.state))
        if not reader.has(question.labels):
            detail = "the labels of this question are not single tokens of the checkpoint; ask another type of question"
            raise RefusedError(400, "no_zero_shot", detail, param=where)
        if item.images and not reader.takes_pictures:
            detail = "the checkpoint's chat template has no place for pictures within a text; ask without pictures"
            raise RefusedError(400, "no_zero_shot", detail, param=where)
        return item


def _answering(question: Question, name: str, served: ModelSet) -> list[str]:
    """Return the names of the classifiers that answer a question; none if it is for the backbone."""
    if question.kind == "noul":
        return [name]
    options = list(question.criteria)
    return options if question.kind == "choice" and all(option in served.models for option in options) else []
