"""What is asked: labels, questions, and which browser has which question."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_classifier.classifier.panel_folder import names_problem
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.labels import PLAIN_NAMES
from qwen_vl_classifier.errors import ConfigError, shown

YES, NO, SKIP, UNSURE = "yes", "no", "skip", "unsure"
"""Answers; where the question is which of several classes, the word of a class stands in place of the first two."""

PLAIN_LABEL = "label"
"""The name of the label where there is one and no name was given: its column in the data set."""

SILENT_SECONDS = 120.0
"""After how many seconds without a request another browser may get the question of a browser."""

_RESERVED = ("id", "image", "text", "sampled", "annotator")  # columns of the data set


@dataclass(frozen=True, slots=True)
class LabelSpec:
    """One label: yes or no to each row; where each row has exactly one of several classes, one of these classes.

    Attributes:
        name: Its name, which is also that of its column in the data set.
        no: What the answer "no" is called.
        yes: What the answer "yes" is called.
    """

    name: str = PLAIN_LABEL
    no: str = PLAIN_NAMES[0]
    yes: str = PLAIN_NAMES[1]

    def to_json(self) -> dict[str, str]:
        """Return it as the journal has it."""
        return {"name": self.name, "no": self.no, "yes": self.yes}


@dataclass(frozen=True, slots=True)
class Question:
    """One question: a label of a row.

    Attributes:
        key: The key of the row, which depends on its pictures and text alone.
        label: The name of the label; `None` where the question is which of several classes.
        row: The number of the row in the pool.
        source: Why it is asked: random, uncertain, diverse, check, queued or agreement.
        answered_before: An answer that is there already, to be confirmed or corrected, or `None`.
    """

    key: str
    label: str | None
    row: int
    source: str
    answered_before: str | None = None

    def to_json(self, example: Example) -> dict[str, Any]:
        """Describe it for the page.

        Args:
            example: The row.
        """
        return {
            "key": self.key,
            "label": self.label,
            "name": name_of(example, self.row),
            "text": example.text,
            "images": [f"/api/rows/{self.key}/images/{number}" for number in range(len(example.images))],
            "source": self.source,
            "before": self.answered_before,
        }


def name_of(example: Example, row: int) -> str:
    """Return what to call a row: its id, the name of its picture's file, its place in the data, or its number."""
    if example.id is not None:
        return example.id
    files = [Path(one).name for one in example.images if isinstance(one, (str, os.PathLike))]
    return files[0] if files else example.origin or f"row {row + 1}"


def check_labels(labels: Sequence[LabelSpec], *, one_of: bool) -> None:
    """Refuse labels that cannot be told apart, or whose columns the data set needs for something else.

    Raises:
        ConfigError: There are none, a name is there twice, blank, too long or taken; or a class is called as an answer
            that is not a class.
    """
    names = [label.name for label in labels]
    if problem := names_problem(names):
        raise ConfigError(f"{spelled('labels')}: {problem}")
    if one_of and len(names) < 2:
        raise ConfigError(f"{spelled('labels')}: one class, {shown(names[0])}; expected two or more; name the others")
    taken = next((name for name in names if name in ((SKIP, UNSURE) if one_of else _RESERVED)), None)
    if taken is not None:
        raise ConfigError(f"{spelled('labels')}: {taken!r} has another meaning here; give that label another name")


@dataclass(slots=True)
class Item:
    """A row that is to be asked.

    Attributes:
        row: Its number in the pool.
        source: Why.
        labels: The numbers of the labels that are to be asked, in order.
        taken_back: The answer that was undone, shown with the first question.
    """

    row: int
    source: str
    labels: list[int]
    taken_back: str | None = None


@dataclass(slots=True)
class Desk:
    """What one browser has before it.

    Attributes:
        seen: When it made its last request, by the clock of the session.
        current: The row that it is asked about now.
        upcoming: The rows after that.
        model: By which version of the models the rows were chosen.
    """

    seen: float
    current: Item | None = None
    upcoming: list[Item] = field(default_factory=list)
    model: int = 0


class Desks:
    """The desks of all browsers. No row is at two desks, and a desk whose browser is silent can be cleared."""

    def __init__(self) -> None:
        self._desks: dict[str, Desk] = {}

    def of(self, browser: str, now: float) -> Desk:
        """Return the desk of a browser, which is there now."""
        desk = self._desks.setdefault(browser, Desk(now))
        desk.seen = now
        return desk

    def clear_silent(self, now: float) -> None:
        """Remove the desks of browsers that have been silent for `SILENT_SECONDS`."""
        silent = [browser for browser, desk in self._desks.items() if now - desk.seen >= SILENT_SECONDS]
        for browser in silent:
            del self._desks[browser]

    def is_active(self, browser: str) -> bool:
        """Tell whether a browser has a desk."""
        return browser in self._desks

    def items(self) -> Iterator[Item]:
        """Yield what is at all desks."""
        for desk in self._desks.values():
            if desk.current is not None:
                yield desk.current
            yield from desk.upcoming

    def give_up(self, row: int, to: Desk | None = None) -> None:
        """Take a row from what is upcoming at any desk but one."""
        for desk in self._desks.values():
            if desk is not to:
                desk.upcoming = [item for item in desk.upcoming if item.row != row]

    def upcoming(self, but: Desk) -> list[Item]:
        """Return what is upcoming at other desks, the last first: it is asked there latest."""
        items = [item for desk in self._desks.values() if desk is not but for item in desk.upcoming]
        return items[::-1]
