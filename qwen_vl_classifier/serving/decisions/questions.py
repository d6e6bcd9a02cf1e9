"""Questions of three types, the prompt that asks one, and the answer from the probabilities of its options.

Prompt and answers are those of transformers' `DecisionPipeline` for a model without a decision head of its own, so that
a client gets the same numbers from either.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Content: TypeAlias = str | dict[str, Any] | list[Any]
"""Text, or JSON."""

Kind: TypeAlias = Literal["noul", "choice", "score"]

NO_AND_YES = ("No", "Yes")
LETTERS = tuple(string.ascii_uppercase)


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        kind: "noul" (yes or no), "choice" (one of several options) or "score" (a level of several).
        instructions: What is asked.
        criteria: What each option means, by its name: of a noul "true" and "false", of a score "0", "1", ...
    """

    kind: Kind
    instructions: Content | None
    criteria: dict[str, Content | None]

    @property
    def labels(self) -> tuple[str, ...]:
        """The words that stand for the options in a prompt, in their order; fewer than options if there are no more."""
        return NO_AND_YES[::-1] if self.kind == "noul" else LETTERS[: len(self.criteria)]

    @property
    def length(self) -> int:
        """How many characters its instructions and options have."""
        return len(spelled(self.instructions)) + sum(
            len(name) + len(spelled(text)) for name, text in self.criteria.items()
        )

    def prompt(self, state: Content) -> str:
        """Write the prompt that asks this of a state."""
        described = list(zip(self.labels, self.criteria, map(spelled, self.criteria.values()), strict=True))
        match self.kind:
            case "noul":
                options = [f"{label}: {text}" for label, _, text in described if text]
                ending = "Answer Yes or No only."
            case "choice":
                options = [f"{label}. {name}" + (f": {text}" if text else "") for label, name, text in described]
                ending = f"Answer with the letter of the option that fits best (A to {self.labels[-1]}) only."
            case "score":
                options = [f"{label}. {text}" for label, _, text in described]
                ending = f"Answer with the letter of the level that fits best (A to {self.labels[-1]}) only."
        lines = "\n".join(line for line in (spelled(self.instructions), *options) if line)
        return f"{spelled(state)}\n\n{lines}\n{ending}"


def spelled(content: Content | None) -> str:
    """Return content as a prompt has it: text as it is, anything else as JSON, and nothing for `None`."""
    if content is None or isinstance(content, str):
        return content or ""
    return json.dumps(content, ensure_ascii=False)


def chosen(probabilities: dict[str, float]) -> str:
    """Return the most probable option, of equal ones the first."""
    return max(probabilities, key=probabilities.__getitem__)


def choice_confidence(probabilities: dict[str, float]) -> float:
    """Return how far the most probable option is from one chosen by chance (0) towards certainty (1)."""
    count = len(probabilities)
    return 1.0 if count == 1 else max(0.0, (max(probabilities.values()) - 1 / count) / (1 - 1 / count))


def expected_level(probabilities: Sequence[float]) -> float:
    """Return the mean of the levels 0, 1, ... by their probabilities."""
    return sum(level * probability for level, probability in enumerate(probabilities))


def score_confidence(probabilities: Sequence[float]) -> float:
    """Return 1 minus the mean distance from the most probable level, as a fraction of that of equally likely levels."""
    count = len(probabilities)
    if count == 1:
        return 1.0
    best = max(range(count), key=probabilities.__getitem__)
    distance = sum(probability * abs(level - best) for level, probability in enumerate(probabilities))
    by_chance = sum(abs(level - (count - 1) / 2) for level in range(count)) / count
    return max(0.0, 1 - distance / by_chance)
