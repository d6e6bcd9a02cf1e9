"""What the routes of `label` work with: a session, its rows and pictures, and what makes a classifier in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.labelling.asking import Question
from qwen_vl_classifier.labelling.web.screen_pictures import ScreenPictures
from qwen_vl_classifier.serving.worker import Worker

T = TypeVar("T")


class Rows(Protocol):
    """The rows of a session, as `Pool` has them."""

    @property
    def examples(self) -> Sequence[Example]:
        """One for each row."""

    def row_of(self, key: str) -> int | None:
        """Return the number of the row with a key, if there is one."""


class Asks(Protocol):
    """What asks and keeps answers, as `Session` does; called by one thread."""

    def questions(self, browser: str, ahead: int = 4) -> list[Question]:
        """Return the current question of a browser, and those to follow."""

    def answer(self, browser: str, key: str, label: str | None, answer: str, seconds: float) -> None:
        """Keep an answer."""

    def undo(self, browser: str) -> Question | None:
        """Take back the last answer of a browser."""

    def progress(self) -> dict[str, Any]:
        """Return how far labelling is."""

    def labelled(self) -> list[Example]:
        """Return the rows with answers."""


class Finishes(Protocol):
    """What makes a classifier of the answers, as `Finishing` does."""

    def start(self, labelled: list[Example]) -> None:
        """Begin, unless it has begun."""

    def state(self) -> dict[str, Any]:
        """Return how far it is, for the page."""

    def report(self) -> str | None:
        """Return the page of the report, once there is one."""


@dataclass
class LabellingService:
    """All that the routes need.

    Attributes:
        session: What asks; only `call` may call it.
        rows: Its rows.
        pictures: Their pictures.
        finishing: What makes a classifier.
        setup: What the page shows that does not change.
        allowed: The words that are answers.
    """

    session: Asks
    rows: Rows
    pictures: ScreenPictures
    finishing: Finishes
    setup: Mapping[str, Any]
    allowed: frozenset[str]

    def __post_init__(self) -> None:
        self._worker = Worker("labelling")

    async def call(self, work: Callable[[], T]) -> T:
        """Run what uses the session, one call after another in a thread of its own.

        Raises:
            ClosedError: The end has begun.
        """
        return await self._worker.run(work)

    def drain(self) -> None:
        """Accept no more work; the server calls it when its end begins."""
        self._worker.stop()
