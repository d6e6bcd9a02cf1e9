"""Choose what answers each question of a request: trained classifiers, or the backbone's language head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen_vl_classifier.serving.decisions.placeholders import TextSource
from qwen_vl_classifier.serving.decisions.questions import LETTERS, Question
from qwen_vl_classifier.serving.decisions.request_bodies import ParsedRequest, unfit
from qwen_vl_classifier.serving.http.problems import RefusedError
from qwen_vl_classifier.serving.items import Item
from qwen_vl_classifier.serving.models.label_names import label_model
from qwen_vl_classifier.serving.models.model_set import ModelSet


@dataclass(frozen=True, slots=True)
class Readers:
    """The classifiers that answer one question.

    Attributes:
        names: Their names, by the option that each stands for; of a yes/no question by its own name.
        example: The number of the example that they read.
        text_from: Where its text is from.
        panel: The saved panel of exclusive classes whose probabilities the options have, or `None`.
    """

    names: dict[str, str]
    example: int
    text_from: TextSource
    panel: str | None = None


class QuestionPlan:
    """Which model answers which question of a request.

    Args:
        parsed: The request.
        served: The classifiers that are served.
        name: The classifier or saved panel that is its model.
        in_words: Whether the backbone answers every question.

    Attributes:
        parsed: The same.
        panel: The classifiers that share the backbone of the model.
        names: The classifiers and saved panels that answer.
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
            names = {} if in_words else _answering(question, name, served)
            if names:
                item, source = parsed.placeholders.example(parsed.state, question)
                if item not in self.examples:
                    self.examples.append(item)
                panel = name if _are_classes(served, name, names) else None
                used = names.values() if panel is None else [panel]
                self.names += [one for one in used if one not in self.names]
                self.readers[key] = Readers(names, self.examples.index(item), source, panel)
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


def _answering(question: Question, name: str, served: ModelSet) -> dict[str, str]:
    """Return the names of the classifiers that answer a question, by option; none if it is for the backbone."""
    if question.kind == "noul":
        return {name: name}
    if question.kind != "choice":
        return {}
    labels = served.saved_panels[name].names if name in served.saved_panels else ()
    for names in (
        {option: label_model(name, option) for option in question.criteria if option in labels},
        {option: option for option in question.criteria if option in served.models},
    ):
        if len(names) == len(question.criteria):
            return names
    return {}


def _are_classes(served: ModelSet, name: str, names: Mapping[str, str]) -> bool:
    """Tell whether the classifiers that answer are classes of one saved panel, of which an example has exactly one."""
    saved = served.saved_panels.get(name)
    return saved is not None and saved.one_of and set(names.values()) <= set(served.classifiers_of(name))
