"""Pictures in a state: a request holds them beside it, and a placeholder in its text says where each one belongs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from qwen_vl_classifier.serving.decisions.questions import Content, Question, spelled
from qwen_vl_classifier.serving.items import Item

TextSource: TypeAlias = Literal["state", "instructions"]


class Placeholders:
    """Put the pictures of a request where its placeholders stand.

    Args:
        pictures: By the placeholder that stands for each. Where one begins with another, the longer one counts.
        first: Pictures that come before everything.
    """

    def __init__(self, pictures: Mapping[str, str | bytes], first: Sequence[str] = ()) -> None:
        self._pictures = pictures
        self._first = tuple(first)
        names = sorted(pictures, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def stand_in(self, name: str, contents: Sequence[Content | None]) -> bool:
        """Tell whether a placeholder stands in any of several contents."""
        return any(name in text for content in contents for text in (spelled(content), *leaves(content)))

    def prompt(self, text: str) -> Item:
        """Return the item of a prompt, with each picture in the place of its placeholder."""
        words, places = "", [0] * len(self._first)
        sources: list[str | bytes] = list(self._first)
        for part in self._pattern.split(text):
            if part in self._pictures:
                sources.append(self._pictures[part])
                places.append(len(words))
            else:
                words += part
        return Item(words, tuple(sources), tuple(places))

    def example(self, state: Content, question: Question) -> tuple[Item, TextSource]:
        """Return the example that a trained classifier reads, and where its text is from.

        The text is that of the state: each text, number and truth value in its order, one a line, with the placeholders
        taken out. Names of fields are not read. Where the state has nothing but pictures, the text is that of the
        question's instructions. Pictures are those of the state, in their order.
        """
        texts: list[str] = []
        sources: list[str | bytes] = list(self._first)
        for line in leaves(state):
            parts = self._pattern.split(line)
            sources += [self._pictures[part] for part in parts if part in self._pictures]
            texts.append("".join(part for part in parts if part not in self._pictures).strip() if parts[1:] else line)
        text = "\n".join(line for line in texts if line)
        if text.strip():
            return Item(text, tuple(sources)), "state"
        asked = (self._pattern.sub("", line) for line in leaves(question.instructions))
        return Item("\n".join(line for line in asked if line), tuple(sources)), "instructions"


def leaves(content: Content | None) -> Iterator[str]:
    """Yield the texts, numbers and truth values of a content as text, in their order."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, (dict, list)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from leaves(value)
    elif content is not None:
        yield json.dumps(content)
