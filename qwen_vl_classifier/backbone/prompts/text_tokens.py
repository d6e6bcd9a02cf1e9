"""Tokenise a user's text; the cost is bounded by the longest allowed text, however long the text is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from qwen_vl_classifier.errors import TextError

_SLICE = 16_384  # characters that are tokenised at a time if a text may be too long
_COMPOSED = 4  # most characters that Unicode's NFC joins into one (Unicode Standard Annex 15, expansion factors)


class TextTokens:
    """Tokenise texts up to a limit.

    Args:
        tokenizer: A transformers tokenizer.
        most: Most tokens of a text; `None` sets no limit.

    Attributes:
        lock: Held while the tokenizer works: whether it knows special tokens in a text is a setting that each call
            changes, and another thread's call would turn what a user wrote into special tokens.
    """

    def __init__(self, tokenizer: Any, most: int | None) -> None:
        self.most = most
        self.lock = threading.Lock()
        self._tokenizer = tokenizer

    def __getstate__(self) -> dict[str, Any]:
        """Leave the lock out of copies, which have one of their own: a lock cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy."""
        self.__dict__ |= {**state, "lock": threading.Lock()}

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text; special tokens written in it are treated as plain text.

        Raises:
            TextError: The text has too many tokens.
        """
        if self.most is not None and self._is_surely_longer(text, self.most):
            raise _too_long(f"more than {self.most:,}", self.most)
        ids = self._tokenize(text)
        if self.most is not None and len(ids) > self.most:
            raise _too_long(f"{len(ids):,}", self.most)
        return ids

    def ids_of_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each part of a text, tokenised by itself.

        Raises:
            TextError: They have too many tokens together.
        """
        if self.most is not None and any(self._is_surely_longer(part, self.most) for part in parts):
            raise _too_long(f"more than {self.most:,}", self.most)
        ids: list[list[int]] = self._encode(list(parts))["input_ids"] if parts else []
        count = sum(map(len, ids))
        if self.most is not None and count > self.most:
            raise _too_long(f"{count:,}", self.most)
        return ids

    def joined(self, before: str, text: str, after: str) -> list[int]:
        """Return the token ids of a text together with words on both sides of it, however many."""
        return self._tokenize(before + text + after)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Return for each of the tokens of a text the half-open range of its characters."""
        return list(self._encode(text, return_offsets_mapping=True)["offset_mapping"])

    def _is_surely_longer(self, text: str, most: int) -> bool:
        """Tell whether a text has too many tokens, without tokenising much more than the limit."""
        if len(text) > _COMPOSED * self._longest_token * most:
            return True
        if len(text) <= _SLICE:
            return False
        # A cut may split one token into a few, so near the limit the exact count decides.
        count, enough = 0, most + most // 16 + 64
        for start in range(0, len(text), _SLICE):
            count += len(self._tokenize(text[start : start + _SLICE]))
            if count > enough:
                return True
        return False

    def _tokenize(self, text: str) -> list[int]:
        return list(self._encode(text)["input_ids"])

    def _encode(self, text: str | list[str], **options: bool) -> Any:
        with self.lock:
            return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **options)

    @cached_property
    def _longest_token(self) -> int:
        """Most characters of a token: a byte-level vocabulary writes each byte as one character."""
        return max(map(len, self._tokenizer.get_vocab()))


def _too_long(tokens: str, most: int) -> TextError:
    return TextError(f"the text has {tokens} tokens; expected at most {most:,}; shorten it")


def position_limit(text_config: Any) -> int | None:
    """Return how many positions a model supports, scaled as its rotary embedding is (YaRN and the like).

    Args:
        text_config: transformers' configuration of the language model.
    """
    limit = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if limit is not None and factor:
        return max(int(limit), int(factor * (original or 0)))
    return None if limit is None else int(limit)
