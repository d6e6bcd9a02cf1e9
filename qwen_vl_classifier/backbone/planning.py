"""Which examples run together. Pure Python: no tensors, no model.

A *row* is one sequence: a prefix (template and pictures) followed by the suffixes of all examples that share it.
A *batch* is a list of rows padded to the longest. Sorting by length keeps padding small, and a budget of tokens
keeps memory bounded whatever the mix.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

T = TypeVar("T")

_WINDOW = 256  # examples that are decoded and planned together
_ENOUGH = 0.25  # share of the token budget from which on a batch is large enough
_LIKE = 0.85  # how long a row is at least, of the longest, to join a batch that is large enough

Row: TypeAlias = tuple[int, ...]
"""Indices of the examples that share the row's prefix."""

Batch: TypeAlias = tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """The size of one example, in tokens.

    Attributes:
        prefix: Equal for two examples exactly if their prefixes are the same, pixel by pixel.
        prefix_length: Number of tokens up to the end of the last picture.
        suffix_length: Number of tokens after it.
    """

    prefix: Hashable
    prefix_length: int
    suffix_length: int


def windows_of(items: Iterable[T]) -> Iterator[list[T]]:
    """Cut a stream into pieces that are decoded and planned together."""
    window: list[T] = []
    for item in items:
        window.append(item)
        if len(window) == _WINDOW:
            yield window
            window = []
    if window:
        yield window


def plan(
    items: Sequence[Item], *, token_budget: int, share_prefixes: bool = True, hidden_size: int = 1024
) -> list[Batch]:
    """Arrange examples in batches of at most `token_budget` tokens, padding included.

    Args:
        items: The sizes of the examples.
        token_budget: Most tokens in a batch; a single row that is longer runs alone.
        share_prefixes: Whether examples with the same prefix share a row.
        hidden_size: Of the decoder; it weighs a longer row against another copy of its prefix.

    Returns:
        Batches, longest rows first so that a lack of memory shows at once. Every index of `items` appears in
        exactly one row of one batch.
    """
    rows = sorted(_rows(items, share_prefixes, token_budget, hidden_size), key=lambda row: row[1], reverse=True)
    batches: list[Batch] = []
    current: list[Row] = []
    longest = 0
    for indices, length in rows:
        held = longest * len(current)
        full = longest * (len(current) + 1) > token_budget
        # Once a batch is large enough to be efficient, much shorter rows would bring more padding than they save.
        padded = held >= token_budget * _ENOUGH and length < longest * _LIKE
        if current and (full or padded):
            batches.append(tuple(current))
            current, longest = [], 0
        current.append(indices)
        longest = max(longest, length)
    if current:
        batches.append(tuple(current))
    return batches


def _rows(items: Sequence[Item], share_prefixes: bool, token_budget: int, hidden_size: int) -> list[tuple[Row, int]]:
    """Group examples by prefix; return each row with its length in tokens."""
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.prefix if share_prefixes else index, []).append(index)
    rows: list[tuple[Row, int]] = []
    for indices in groups.values():
        prefix = items[indices[0]].prefix_length
        # Suffixes of one row do not see each other, yet attention is computed for every pair of its tokens, about
        # 4 * hidden operations each and three times as slow as a matrix product; another copy of the prefix costs about
        # 24 * hidden**2 for each of its tokens. S suffix tokens in k rows cost S**2 / k of the one and k of the other,
        # least with S / k = sqrt(2 * hidden * prefix) in a row.
        room = min(token_budget - prefix, max(math.isqrt(2 * hidden_size * prefix), 64))
        row: list[int] = []
        used = 0
        for index in indices:
            suffix = items[index].suffix_length
            if row and used + suffix > room:
                rows.append((tuple(row), prefix + used))
                row, used = [], 0
            row.append(index)
            used += suffix
        rows.append((tuple(row), prefix + used))
    return rows
