"""Rows whose pictures cannot be used: collected over a whole data set, and reported together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ImageCode, ImageError

MOST_LISTED = 10
"""Rows that an error lists; it counts the others."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        position: Its index among the examples that were given, from 0.
        name: What messages call it: its line or row number in its file, or its position from 1.
        problem: What is wrong with it.
        code: The same in one word for programs.
    """

    position: int
    name: str
    problem: str
    code: ImageCode


class BadRows:
    """Collects the rows of one data set that cannot be used."""

    def __init__(self) -> None:
        self._rows: dict[int, BadRow] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[BadRow]:
        """Yield the rows in the order of the data set."""
        return (self._rows[position] for position in sorted(self._rows))

    def __contains__(self, position: int) -> bool:
        return position in self._rows

    def add(self, position: int, example: Example, error: ImageError) -> None:
        """Record that the example at a position cannot be used; the first error of each row counts."""
        name = example.origin or f"row {position + 1}"
        self._rows.setdefault(position, BadRow(position, name, str(error), error.code))

    def raise_any(self, total: int) -> None:
        """Raise one error that lists the first ten rows, if there are any.

        Args:
            total: Rows in the data set.

        Raises:
            ImageError: Its code is that of the first row.
        """
        if self._rows:
            rows = list(self)
            raise ImageError(
                "\n".join([*report(rows, total), "Correct these rows or take them out, then run again."]),
                code=rows[0].code,
            )


def report(rows: Sequence[BadRow], total: int, *, what: str = "rows") -> list[str]:
    """Describe rows that cannot be used, one line for the count and one for each of the first ten."""
    lines = [f"{len(rows):,} of {total:,} {what} cannot be used:"]
    lines += [f"  {row.name}: {row.problem}" for row in rows[:MOST_LISTED]]
    if len(rows) > MOST_LISTED:
        lines.append(f"  and {len(rows) - MOST_LISTED:,} more")
    return lines
