"""Choose which examples run together in one pass.

A *row* is one sequence: a prefix (template and pictures) followed by the suffixes of all examples that share it.
A *batch* is a list of rows padded to the longest. Sorting by length keeps padding small, and a budget of tokens
keeps memory bounded whatever the mix.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TypeAlias

import numpy as np

from qwen_vl_classifier.backbone.processor import EncodedExample

_ENOUGH = 0.25  # fraction of the token budget from which on a batch is large enough
_MOST_PLACES = 2  # tokens and padding of a batch whose layers see no padding, as a multiple of the token budget
_SIMILAR = 0.85  # a row joins a batch that is large enough if it has at least this fraction of the longest row's length

PlannedRow: TypeAlias = tuple[int, ...]
"""Indices of the examples that share the row's prefix."""

PlannedBatch: TypeAlias = tuple[PlannedRow, ...]


def plan(
    examples: Sequence[EncodedExample],
    *,
    token_budget: int,
    share_prefixes: bool = True,
    hidden_size: int = 1024,
    attention: float = 1.0,
    state_tokens: int = 0,
    padded: bool = True,
) -> list[PlannedBatch]:
    """Arrange examples in batches of at most `token_budget` tokens, padding included where layers compute it.

    Args:
        examples: What is to be encoded; only keys of pictures and numbers of tokens count.
        token_budget: Most tokens in a batch; a single row that is longer runs alone.
        share_prefixes: Whether examples with the same prefix share a row.
        hidden_size: Width of the decoder; it decides between a longer row and another copy of its prefix.
        attention: Fraction of the layers that compute attention for all pairs of tokens in a row, whether they see each
            other or not; it decides that too. With 0, a row takes as many texts as the budget allows.
        state_tokens: Memory of a row beside that of its tokens, as a number of tokens.
        padded: Whether layers compute padding. Where they do not, rows of any lengths fill a batch.

    Returns:
        Batches, longest rows first so that a lack of memory shows at once. Every index of `examples` appears in
        exactly one row of one batch.
    """
    room = max(1, token_budget - state_tokens)  # for the tokens of a row that runs alone
    rows = _rows(examples, share_prefixes, room, int(hidden_size / attention) if attention else None)
    rows.sort(key=lambda row: row[1], reverse=True)
    batches: list[PlannedBatch] = []
    current: list[PlannedRow] = []
    longest, used = 0, 0
    for indices, length in rows:
        held = longest * len(current)
        places = (longest + state_tokens) * (len(current) + 1)
        if padded:
            # Once a batch is large enough to be efficient, much shorter rows would bring more padding than they save.
            wasteful = held >= token_budget * _ENOUGH and length < longest * _SIMILAR
            full = places > token_budget or wasteful
        else:
            full = used + length > token_budget or places > token_budget * _MOST_PLACES
        if current and full:
            batches.append(tuple(current))
            current, longest, used = [], 0, 0
        current.append(indices)
        longest = max(longest, length)
        used += length
    if current:
        batches.append(tuple(current))
    return batches


def with_common_prefixes(examples: Sequence[EncodedExample]) -> list[EncodedExample]:
    """Let examples about the same pictures share the tokens that they begin with, where all pictures are among these.

    So several questions about one long text cost it once. Meant for prompts that differ in nothing but their end, as
    `Processor.encode_interleaved` makes them.
    """
    found = list(examples)
    groups: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.pictures.key, []).append(index)
    for indices in groups.values():
        group = [examples[index] for index in indices]
        first, last = min(example.ids for example in group), max(example.ids for example in group)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        common = min(sum(1 for _ in same), *(len(example.ids) - 1 for example in group))  # something is left to read
        if len(group) > 1 and common >= max((end for example in group for _, end in example.spans.image), default=1):
            key = hashlib.blake2b(np.asarray(group[0].ids[:common]).tobytes(), digest_size=16).digest()
            for index, example in zip(indices, group, strict=True):
                spans = replace(example.spans, text=(common, len(example.ids)))
                found[index] = replace(example, prefix_length=common, spans=spans, shares_prefix=True, prefix_key=key)
    return found


def _rows(
    examples: Sequence[EncodedExample], share_prefixes: bool, token_budget: int, hidden_size: int | None
) -> list[tuple[PlannedRow, int]]:
    """Group examples by prefix; return each row with its length in tokens."""
    groups: dict[Hashable, list[int]] = {}
    for index, example in enumerate(examples):
        shared = share_prefixes and example.shares_prefix
        groups.setdefault((example.pictures.key, example.prefix_key) if shared else index, []).append(index)
    rows: list[tuple[PlannedRow, int]] = []
    for indices in groups.values():
        prefix = examples[indices[0]].prefix_length
        # Suffixes of one row do not see each other, yet attention is computed for every pair of its tokens, about
        # 4 * hidden operations each and three times as slow as a matrix product; another copy of the prefix costs about
        # 24 * hidden**2 for each of its tokens. S suffix tokens in k rows cost S**2 / k of the one and k of the other,
        # least with S / k = sqrt(2 * hidden * prefix) in a row. If only some layers have attention, it costs less.
        room = token_budget - prefix
        if hidden_size is not None:
            room = min(room, max(math.isqrt(2 * hidden_size * prefix), 64))
        row: list[int] = []
        used = 0
        for index in indices:
            suffix = len(examples[index].ids) - prefix
            if row and used + suffix > room:
                rows.append((tuple(row), prefix + used))
                row, used = [], 0
            row.append(index)
            used += suffix
        rows.append((tuple(row), prefix + used))
    return rows
