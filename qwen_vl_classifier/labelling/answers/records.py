"""Records of the journal: what one line of it says, and how it is written and read."""

from __future__ import annotations

import datetime
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.errors import first_of, one_line
from qwen_vl_classifier.files.bounded import parse_json

_KEY = re.compile("[0-9a-f]{16}")
_ID = re.compile("[0-9a-f]{32}")
_BROWSER = re.compile(r"[\w-]{1,64}", re.ASCII)
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z", re.ASCII)
_MOST_SECONDS = 10**6
_SOURCES = ("random", "uncertain", "diverse", "check", "queued", "agreement")
_MOST_NAME = 200  # characters of an annotator's name


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a journal after the first.

    Attributes:
        event: "answer"; "undo" of an answer; or "show", a question that a browser has now, so that other processes
            ask something else meanwhile.
        id: Its own name, 32 hexadecimal digits.
        at: When, in UTC, by ISO 8601.
        key: Of the row.
        label: Of the question; `None` where it is which of several classes.
        annotator: Who.
        browser: In which browser.
        answer: yes, no, the word of a class, skip or unsure; of an answer alone.
        source: Why the row was asked.
        seconds: How long the question was on the screen.
        undoes: The `id` of the answer that an undo takes back.
    """

    event: Literal["answer", "undo", "show"]
    id: str
    at: str
    key: str
    label: str | None
    annotator: str
    browser: str
    answer: str | None = None
    source: str | None = None
    seconds: float | None = None
    undoes: str | None = None

    @classmethod
    def new(cls, event: Literal["answer", "undo", "show"], **values: Any) -> Record:
        """Make a record of this moment with a name of its own."""
        now = datetime.datetime.now(datetime.UTC)
        return cls(event, uuid.uuid4().hex, f"{now:%Y-%m-%dT%H:%M:%S}.{now.microsecond // 1000:03d}Z", **values)

    @property
    def time(self) -> float:
        """When, in seconds since 1970."""
        return datetime.datetime.fromisoformat(self.at).timestamp()

    def line(self) -> bytes:
        """Return it as a line of the file."""
        values = {name: value for name, value in asdict(self).items() if value is not None or name == "label"}
        return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def read_record(content: bytes, *, labels: Sequence[str | None], answers: Sequence[str]) -> Record:
    """Read one line of a journal.

    Args:
        content: The line.
        labels: What a question can be about; `None` where it is which of several classes.
        answers: What an answer can be.

    Raises:
        ValueError: It is not a record; the message says why.
    """
    try:
        values = parse_json(content)
    except ValueError:
        raise ValueError("not JSON") from None
    if not isinstance(values, dict):
        raise ValueError("not an object")
    event = values.get("event")
    if event not in ("answer", "undo", "show"):
        raise ValueError(f"event {described(event)}")
    names = ("id", "at", "key", "label", "annotator", "browser", "answer", "source", "seconds", "undoes")
    given: dict[str, Any] = {name: values.get(name) for name in names}
    for name, pattern in (("id", _ID), ("at", _TIME), ("key", _KEY), ("browser", _BROWSER)):
        if not isinstance(given[name], str) or not pattern.fullmatch(given[name]):
            raise ValueError(f"{name} {described(given[name])}")
    if not is_annotator(given["annotator"]):
        raise ValueError(f"annotator {described(given['annotator'])}")
    if given["label"] not in labels:
        raise ValueError(f"label {described(given['label'])}")
    if event == "answer" and given["answer"] not in answers:
        raise ValueError(f"answer {described(given['answer'])}")
    if event == "undo" and not (isinstance(given["undoes"], str) and _ID.fullmatch(given["undoes"])):
        raise ValueError(f"undoes {described(given['undoes'])}")
    if given["source"] is not None and given["source"] not in _SOURCES:
        raise ValueError(f"source {described(given['source'])}")
    if given["seconds"] is not None and not is_number(given["seconds"], 0, _MOST_SECONDS):
        raise ValueError(f"seconds {described(given['seconds'])}")
    try:
        datetime.datetime.fromisoformat(given["at"])
    except ValueError:
        raise ValueError(f"at {described(given['at'])}") from None
    return Record(event, **given)


def is_annotator(name: object) -> bool:
    """Tell whether something can be the name of an annotator: 1 to 200 printable characters."""
    return isinstance(name, str) and 0 < len(name.strip()) <= len(name) <= _MOST_NAME and name.isprintable()


def is_browser(name: object) -> bool:
    """Tell whether something can be the name of a browser: 1 to 64 letters, digits, hyphens and underscores."""
    return isinstance(name, str) and _BROWSER.fullmatch(name) is not None


def described(value: object) -> str:
    """Describe what a file may hold, or what is given now, in part of a line."""
    if isinstance(value, list):
        parts = [
            f"{one.get('name')} ({one.get('no')}/{one.get('yes')})" if isinstance(one, dict) else one for one in value
        ]
        return one_line(first_of([str(part)[:80] for part in parts], most=5))
    if value is None:
        return "none"
    return one_line(repr(value), 200)
