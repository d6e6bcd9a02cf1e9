"""One example of a request and its result: what routes give to `Service`, and what it gives back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from qwen_vl_classifier.data.example import PanelPrediction
from qwen_vl_classifier.errors import (
    ClosedError,
    ExampleError,
    ExplanationError,
    ImageCode,
    OutOfMemoryError,
    QueueFullError,
)

MAX_IMAGES = 8
"""Most pictures in one example."""

ItemCode: TypeAlias = (
    Literal["invalid_item", "text_too_large", "example_too_large", "explanation_too_large"]
    | Literal["out_of_memory", "internal_error"]
    | ImageCode
)
"""What is wrong with one example, for programs."""

STATUS: dict[ItemCode, int] = {
    "invalid_item": 400,
    "text_too_large": 413,
    "example_too_large": 413,
    "explanation_too_large": 413,
    "image_too_large": 413,
    "image_format": 415,
    "image_damaged": 422,
    "image_missing": 422,
    "image_refused": 422,
    "out_of_memory": 413,
    "internal_error": 500,
}
"""The HTTP status of a request that is refused for one of these."""

DEFECT = "the server failed; try again later"
"""The message of an unexpected error, which names no details."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Item:
    """One example of a request.

    Attributes:
        text: The words.
        images: Its pictures in order: text as it stood in the request, for a `MediaReader` to read, or an image file
            that was uploaded.
        places: Where its pictures stand in the text: for each, how many characters are before it. `None` for a
            classifier's prompt, which has all of them before the text.
    """

    text: str
    images: tuple[str | bytes, ...] = ()
    places: tuple[int, ...] | None = None

    @property
    def pieces(self) -> list[str | None]:
        """The text, with `None` where a picture stands in it."""
        found: list[str | None] = []
        start = 0
        for place in self.places or ():
            found += [self.text[start:place], None]
            start = place
        return [piece for piece in [*found, self.text[start:]] if piece != ""]


@dataclass(frozen=True, slots=True)
class ItemResult:
    """The probabilities of one example.

    Attributes:
        probabilities: By the classifier's name, the probabilities of class 0 and of class 1.
        tokens: How many tokens were read, by all backbones together.
        panels: The answers of saved panels, by name.
    """

    probabilities: dict[str, tuple[float, float]]
    tokens: int
    panels: Mapping[str, PanelPrediction] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LabelResult:
    """The probabilities of words as the next token of one example.

    Attributes:
        probabilities: By the word; they sum to 1.
        tokens: How many tokens were read.
    """

    probabilities: dict[str, float]
    tokens: int


@dataclass(frozen=True, slots=True)
class ItemError:
    """Why one example has no result.

    Attributes:
        code: What is wrong, in one word for programs.
        message: What is wrong, in one line for people. It is sent to the caller: no path, no part of the request.
    """

    code: ItemCode
    message: str

    @property
    def status(self) -> int:
        """The HTTP status of a request that is refused for this."""
        return STATUS[self.code]


def check_item(item: Item, *, max_text_chars: int) -> ItemError | None:
    """Check an example without opening its pictures; return what is wrong with it, or `None`."""
    if len(item.text) > max_text_chars:
        return ItemError(
            "text_too_large",
            f"text has more than {max_text_chars:,} characters; send a shorter one",
        )
    if not item.text.strip():
        return ItemError("invalid_item", "text is blank; expected words")
    try:
        item.text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; tokenizers cannot read it
        return ItemError("invalid_item", "text holds an unpaired surrogate; expected valid Unicode")
    if len(item.images) > MAX_IMAGES:
        return ItemError(
            "invalid_item", f"an example has {len(item.images)} pictures; expected at most {MAX_IMAGES}; send fewer"
        )
    return None


def error_of(error: BaseException) -> ItemError:
    """Return the error of one item as its caller sees it; the log has the details.

    Raises:
        QueueFullError: It is one, and the whole request's.
        ClosedError: The same.
    """
    if isinstance(error, (QueueFullError, ClosedError)):
        raise error
    if isinstance(error, (ExampleError, ExplanationError)):  # of what a request holds, so its text names no path
        return ItemError(error.code, str(error))
    if isinstance(error, OutOfMemoryError):
        _log.error("one item is too large: %s", error)
        return ItemError("out_of_memory", "the server ran out of memory; send a smaller picture or text")
    _log.error("an item could not be classified", exc_info=error)
    return ItemError("internal_error", DEFECT)
