"""Rows to ask in an order that a person or a classifier has given: ids in a file, or the scores of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Queue:
    """Rows to ask, in order.

    Attributes:
        rows: Their numbers in the pool.
        only: Whether nothing else is to be asked, and labels that are there already are to be confirmed or corrected.
        missing: How many rows of the file or run are not in the data.
    """

    rows: tuple[int, ...]
    only: bool
    missing: int = 0
