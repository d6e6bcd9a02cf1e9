"""The tokens of a prompt: a chat template around the pictures and the text of one example.

A template is rendered once for each number of pictures, with a mark in place of the text. Template and text are
tokenised apart, the text with special tokens off: `<|image_pad|>` inside a text stays text and cannot shift the
pictures of other examples.

Pictures come before the text in Qwen's own templates, so that many texts about a picture share what was computed for
it. A template may also put all pictures behind the text, as that of a reranker does, whose query is a text and whose
document is a picture. There, the text stands amid words of the template, and is tokenised together with them: a full
stop and the newline behind it may be one token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any, TypeAlias

from qwen_vl_classifier.backbone.prompts.text_tokens import TextTokens
from qwen_vl_classifier.backbone.prompts.thinking import RenderingError, render_prompt
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.errors import CheckpointError

Range: TypeAlias = tuple[int, int]
"""Half-open."""

TEXT_MARK = "\u2063USER TEXT\u2063"  # stands for the user's text while the template is rendered
_EDGE = "\u2003"  # a blank on both sides of the mark; one that is gone afterwards is one that the template strips


@dataclass(frozen=True, slots=True)
class _Parts:
    """A chat template around a number of pictures and a text; each picture is one token.

    Attributes:
        head: Token ids before the text.
        tail: Token ids behind it.
        strips: Whether the template strips blanks from the beginning of the text, and from its end.
        outer: Token ids of head and tail without `words`.
        words: What the template has between its special tokens and the text, before and behind it.
    """

    head: list[int]
    tail: list[int]
    strips: tuple[bool, bool]
    outer: tuple[list[int], list[int]]
    words: tuple[str, str]

    def stripped(self, text: str) -> str:
        """Return a text without the blanks that the template would strip."""
        if self.strips[0]:
            text = text.lstrip()
        return text.rstrip() if self.strips[1] else text


class Prompt:
    """Put pictures and texts into a chat template.

    Args:
        tokenizer: A transformers tokenizer.
        template: A Jinja chat template.
        texts: Tokenises texts.
        image_token_id: The id of the token that stands for a picture.
    """

    def __init__(self, tokenizer: Any, template: str, texts: TextTokens, image_token_id: int) -> None:
        self.template = template
        self._tokenizer = tokenizer
        self._texts = texts
        self._image_token_id = image_token_id
        self._parts = lru_cache(maxsize=256)(self._render)

    @cached_property
    def text_first(self) -> bool:
        """Whether the template puts pictures behind the text."""
        try:
            return self._image_token_id in self._parts(1).tail
        except CheckpointError:  # reported when the template is rendered for an example
            return False

    @property
    def strips(self) -> bool:
        """Whether the template strips blanks from texts."""
        if not any(part in self.template for part in ("trim", "strip")):
            return False
        try:
            return any(self._parts(0).strips) or any(self._parts(1).strips)
        except CheckpointError:  # reported when the template is rendered for an example
            return False

    def tokens(self, text: str, images: int) -> tuple[list[int], Range]:
        """Return the token ids of a prompt, each picture as one token, and which of them are the user's text.

        Raises:
            TextError: The text is too long.
            CheckpointError: The template cannot be rendered, or does not place text and pictures as it should.
        """
        parts = self._parts(images)
        text = parts.stripped(text)
        ids = self._texts.ids(text)
        if not self.text_first:
            return [*parts.head, *ids, *parts.tail], (len(parts.head), len(parts.head) + len(ids))
        before, after = parts.words
        head, tail = parts.outer
        whole = [*head, *self._texts.joined(before, text, after), *tail]
        return whole, self.text_range(whole, images)

    def interleaved(self, pieces: Sequence[str | None]) -> list[int]:
        """Return the token ids of a prompt whose pictures are within its text, each picture as one token.

        The text is tokenised together with the words of the template beside it, and special tokens that are written in
        it by themselves, as text: so does transformers' `apply_chat_template` with `sanitize_control_tokens`.

        Args:
            pieces: Texts in their order, with `None` in the place of each picture.

        Raises:
            TextError: The text is too long.
            CheckpointError: The template cannot be rendered, or places pictures by rules of its own.
        """
        parts = self._parts(0)
        texts = list(pieces)
        if texts and texts[0] is not None and parts.strips[0]:
            texts[0] = texts[0].lstrip()
        if texts and texts[-1] is not None and parts.strips[1]:
            texts[-1] = texts[-1].rstrip()
        runs = [parts.words[0]]  # between pictures
        for text in texts:
            if text is None:
                runs.append("")
            else:
                runs[-1] += text
        runs[-1] += parts.words[1]
        split = [[part for part in self._control_tokens.split(run) if part] for run in runs]
        tokenised = iter(self._texts.ids_of_parts([part for run in split for part in run]))
        ids = list(parts.outer[0])
        for number, run in enumerate(split):
            ids += self._picture if number else []
            for _ in run:
                ids += next(tokenised)
        return [*ids, *parts.outer[1]]

    @cached_property
    def _picture(self) -> list[int]:
        """Token ids that the template writes for a picture."""
        none, one, two = map(self._parts, range(3))
        ids = one.head[len(none.head) :]
        heads = [*none.head, *ids] == one.head and [*one.head, *ids] == two.head
        added = set(self._tokenizer.get_added_vocab().values())
        if not heads or not added.issuperset(ids) or not none.tail == one.tail == two.tail:
            raise CheckpointError(
                "the checkpoint's chat template numbers pictures, or puts words or the text before them, so pictures "
                "cannot be placed within a text; put them before it"
            )
        return ids

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Matches tokens that are special, or that the template writes; in a group, so that splitting keeps them."""
        tokens = self._tokenizer.added_tokens_decoder.values()
        words = [token.content for token in tokens if token.special or token.content in self.template]
        words = sorted((word for word in words if not word.isspace()), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, words)) or '(?!)'})")

    def text_range(self, ids: Sequence[int], images: int) -> Range:
        """Find the user's text among the token ids of a prompt, each picture as one token.

        Where words of the template are tokenised together with the text, a token of both belongs to the text.
        """
        parts = self._parts(images)
        if not self.text_first:
            return len(parts.head), max(len(parts.head), len(ids) - len(parts.tail))
        start = _in_common(ids, parts.head)
        return start, len(ids) - _in_common(ids[start:][::-1], parts.tail[::-1])

    def offsets(self, text: str, images: int) -> list[Range]:
        """Return for each token of the user's text the characters that it stands for."""
        parts = self._parts(images)
        stripped = parts.stripped(text)
        shift = text.find(stripped)
        if not self.text_first:
            return [(start + shift, end + shift) for start, end in self._texts.offsets(stripped)]
        before, after = parts.words
        first, last = (place - len(parts.outer[0]) for place in self.tokens(text, images)[1])
        offsets = self._texts.offsets(before + stripped + after)[first:last]
        inside = [[min(max(place - len(before), 0), len(stripped)) + shift for place in pair] for pair in offsets]
        return [(start, end) for start, end in inside]

    def _render(self, images: int) -> _Parts:
        """Render the template for a number of pictures."""
        try:
            rendered = render_prompt(self._tokenizer, self.template, _EDGE + TEXT_MARK + _EDGE, images=images)
        except RenderingError as error:
            raise CheckpointError(
                f"the checkpoint's chat template cannot be rendered ({error}); "
                f"use the template of an instruction-tuned Qwen-VL checkpoint ({spelled('chat_template')})"
            ) from error
        head, mark, tail = rendered.partition(TEXT_MARK)
        strips = not head.endswith(_EDGE), not tail.startswith(_EDGE)
        head, tail = head.removesuffix(_EDGE), tail.removeprefix(_EDGE)
        (head_ids, head_ends), (tail_ids, tail_ends) = map(self._tokenised, (head, tail))
        placed = [ids.count(self._image_token_id) for ids in (head_ids, tail_ids)]
        if not mark or TEXT_MARK in tail or sorted(placed) != [0, images]:
            raise CheckpointError(
                f"the checkpoint's chat template does not place the text once and {images} picture(s) all before it or "
                "all behind it; "
                f"use the template of an instruction-tuned Qwen-VL checkpoint ({spelled('chat_template')})"
            )
        added = set(self._tokenizer.get_added_vocab().values())
        first = max((place + 1 for place, token in enumerate(head_ids) if token in added), default=0)
        last = next((place for place, token in enumerate(tail_ids) if token in added), len(tail_ids))
        words = head[head_ends[first] :], tail[: tail_ends[last]]
        return _Parts(head_ids, tail_ids, strips, (head_ids[:first], tail_ids[last:]), words)

    def _tokenised(self, part: str) -> tuple[list[int], list[int]]:
        """Tokenise a part of the template, special tokens and all.

        Returns:
            Token ids, and where the characters of the first so many tokens end: of none, of one, of all.
        """
        with self._texts.lock:
            encoded = self._tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [0, *(end for _, end in encoded["offset_mapping"])]


def _in_common(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))
