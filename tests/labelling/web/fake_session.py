"""A session that asks rows in their order and keeps answers in memory, and an application around it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from qwen_vl_classifier import Example
from qwen_vl_classifier.errors import JournalError, NotCurrentError
from qwen_vl_classifier.images.limits import current_limits
from qwen_vl_classifier.labelling.asking import Question
from qwen_vl_classifier.labelling.web.browser_token import BrowserToken
from qwen_vl_classifier.labelling.web.labelling_app import create_labelling_app
from qwen_vl_classifier.labelling.web.labelling_state import LabellingService
from qwen_vl_classifier.labelling.web.screen_pictures import ScreenPictures
from tests.serving.page.stub import running
from tests.waiting import LIMIT

PORT = 4321
"""The port in the name of the cookie, whatever port a test listens on."""

JSON = {"content-type": "application/json"}


class FakeRows:
    """Rows whose keys are "row-0", "row-1", ..."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)

    def row_of(self, key: str) -> int | None:
        keys = [f"row-{number}" for number in range(len(self.examples))]
        return keys.index(key) if key in keys else None


@dataclass
class FakeSession:
    """One label, rows in order; `full` has no room for answers."""

    rows: FakeRows
    answered: list[tuple[str, str]] = field(default_factory=list)
    full: bool = False

    def questions(self, browser: str, ahead: int = 4) -> list[Question]:
        done = {key for key, _ in self.answered}
        left = [row for row in range(len(self.rows.examples)) if f"row-{row}" not in done]
        return [Question(f"row-{row}", "label", row, "random") for row in left[: 1 + ahead]]

    def answer(self, browser: str, key: str, label: str | None, answer: str, seconds: float) -> None:
        if label != "label":
            raise NotCurrentError("no such label")
        if self.full:
            raise JournalError("the disk is full; make room, and answer again")
        self.answered.append((key, answer))

    def undo(self, browser: str) -> Question | None:
        if not self.answered:
            return None
        key, before = self.answered.pop()
        row = self.rows.row_of(key)
        assert row is not None
        return Question(key, "label", row, "random", before)

    def progress(self) -> dict[str, Any]:
        return {"answered": len(self.answered), "rows": len(self.rows.examples)}

    def labelled(self) -> list[Example]:
        return [self.rows.examples[row] for key, _ in self.answered if (row := self.rows.row_of(key)) is not None]


@dataclass
class FakeFinishing:
    """Finishes when told to."""

    page: str | None = None
    trained: list[list[Example]] = field(default_factory=list)

    def start(self, labelled: list[Example]) -> None:
        self.trained.append(labelled)

    def state(self) -> dict[str, Any]:
        return {"state": "running" if self.trained else "no"}

    def report(self) -> str | None:
        return self.page


@dataclass
class Served:
    """An application that is served, with what is behind it."""

    session: FakeSession
    finishing: FakeFinishing
    token: BrowserToken
    url: str

    def client(self, *, cookie: bool = True, **headers: str) -> httpx.Client:
        if cookie:
            headers["cookie"] = self.token.set_cookie.partition(";")[0]
        return httpx.Client(base_url=self.url, headers=headers, timeout=LIMIT, trust_env=False)

    def answer(self, client: httpx.Client, **changes: Any) -> httpx.Response:
        body = {"browser": "one", "key": "row-0", "label": "label", "answer": "yes", "seconds": 1.5}
        return client.post("/api/answers", json=body | changes)


@contextlib.contextmanager
def served(examples: Sequence[Example]) -> Iterator[Served]:
    """Serve examples on a free port."""
    rows = FakeRows(examples)
    session, finishing, token = FakeSession(rows), FakeFinishing(), BrowserToken(PORT)
    labelling = LabellingService(
        session=session,
        rows=rows,
        pictures=ScreenPictures(rows.examples, current_limits()),
        finishing=finishing,
        setup={"title": "Is it red?", "rows": len(rows.examples)},
        allowed=frozenset({"yes", "no", "skip", "unsure"}),
    )
    with running(create_labelling_app(labelling, token)) as url:
        yield Served(session, finishing, token, url)


def picture(size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    """Return a red JPEG."""
    content = io.BytesIO()
    Image.new("RGB", size, "red").save(content, "JPEG", **options)
    return content.getvalue()
