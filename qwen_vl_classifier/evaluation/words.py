"""Words of a text in any script, and which tokens they are made of."""

from __future__ import annotations

import bisect
import itertools
import unicodedata
from collections.abc import Sequence


def join_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[str, list[int]]]:
    """Join the tokens of a text to words.

    Words are runs of letters and digits, or of punctuation, between spaces; in scripts without spaces, single
    characters. Words that share a token become one. A token of spaces alone counts with the word after it.

    Args:
        text: The text.
        offsets: For each token, the half-open range of its characters.

    Returns:
        Words with the numbers of their tokens, in the order of the text; text without any word in it is one word, if
        it has tokens at all.

    Example:
        >>> join_tokens("a redcar.", [(0, 1), (1, 5), (5, 8), (8, 9)])
        [('a', [0]), ('redcar', [1, 2]), ('.', [3])]
    """
    pieces = _pieces(text)
    if not pieces:
        return [(text, list(range(len(offsets))))] if offsets else []
    ends = [end for _, end in pieces]
    tokens: list[list[int]] = [[] for _ in pieces]
    joined = [False] * len(pieces)  # with the piece before
    for token, (start, end) in enumerate(offsets):
        piece = min(bisect.bisect_right(ends, start), len(pieces) - 1)  # the first that ends after the token begins
        tokens[piece].append(token)
        while piece + 1 < len(pieces) and pieces[piece + 1][0] < end:
            piece += 1
            joined[piece] = True
    words: list[tuple[str, list[int]]] = []
    start = 0
    for (first, end), glued, own in zip(pieces, joined, tokens, strict=True):
        if glued:
            words[-1] = (text[start:end], words[-1][1] + own)
        else:
            start = first
            words.append((text[first:end], own))
    return words


def _pieces(text: str) -> list[tuple[int, int]]:
    """Cut a text into runs of one kind of character; spaces are left out."""
    pieces = []
    for kind, run in itertools.groupby(enumerate(text), key=lambda item: _kind(item[1])):
        indices = [index for index, _ in run]
        if kind == "alone":
            pieces += [(index, index + 1) for index in indices]
        elif kind != "space":
            pieces.append((indices[0], indices[-1] + 1))
    return pieces


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    # Marks are letters too: many scripts, and decomposed accents, write vowels with them.
    if unicodedata.category(character)[0] in "PS" and character not in "'’":
        return "punctuation"
    hangul = "\uac00" <= character <= "\ud7a3"  # as wide as other East Asian script, but written with spaces
    return "alone" if unicodedata.east_asian_width(character) == "W" and not hangul else "letter"
