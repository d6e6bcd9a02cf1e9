"""Collect the rows of a data set that cannot be used, to report them together or leave them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from qwen_vl_classifier.config.fields import most_errors
from qwen_vl_classifier.config.spelling import flags_in_use, spelled
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import DataError, ImageError, first_of

T = TypeVar("T")

_LISTED = 10  # in an error
_RECORDED = 100  # in a record


def how_to_leave_out() -> str:
    """Name the option that leaves out rows which cannot be used."""
    return "--skip-bad-rows" if flags_in_use() else spelled("max_errors")


def listed_problems(problems: Sequence[object], total: int, what: str) -> list[str]:
    """Return lines for an error: how many of how many rows cannot be used, and the first ten of them.

    Args:
        problems: What is wrong with each row, in one line that names it.
        total: Rows in the data set.
        what: What the message calls the rows.
    """
    lines = [f"{len(problems):,} of {total:,} {what} cannot be used:"]
    lines += [f"  {problem}" for problem in problems[:_LISTED]]
    return lines + ([f"  and {len(problems) - _LISTED:,} more"] if len(problems) > _LISTED else [])


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        position: Its index among the examples, from 0; of a row that did not become one, among all rows.
        name: What messages call it: its line or row number in its file, or its position from 1.
        error: What is wrong with it.
    """

    position: int
    name: str
    error: DataError

    def __str__(self) -> str:
        return f"{self.name}: {self.error}"


class Examples(list[Example]):
    """The examples of a data set, without its rows that cannot be used.

    Attributes:
        unread: These rows, in order.
    """

    def __init__(self, examples: Iterable[Example], unread: Sequence[BadRow] = ()) -> None:
        super().__init__(examples)
        self.unread = tuple(unread)


class BadRows:
    """Collects the rows of one data set that cannot be used.

    There are two kinds: rows that did not become examples, such as one without a label, and examples that turned out
    later to be bad, such as one whose picture is damaged. `max_errors` counts both. Only the second kind has positions
    among the examples, and only that is counted by `len` and yielded by iteration.

    Args:
        max_errors: How many are allowed: a number, or a percentage of all rows such as "5%". Empty allows none.
        what: What messages call the rows.
        can_leave_out: Whether the user may set `max_errors`; then the error names it.
        given: The examples of the data set, with its rows that did not become examples if they are `Examples`.
    """

    def __init__(
        self,
        max_errors: str | int = "",
        *,
        what: str = "rows",
        can_leave_out: bool = False,
        given: Iterable[Example] = (),
    ) -> None:
        self.max_errors = max_errors
        self.what = what
        self.can_leave_out = can_leave_out
        self._unread = given.unread if isinstance(given, Examples) else ()
        self._rows: dict[int, BadRow] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __bool__(self) -> bool:
        """Tell whether there is a row of either kind."""
        return bool(self._rows or self._unread)

    def __iter__(self) -> Iterator[BadRow]:
        """Yield the bad examples in the order of the data set."""
        return (self._rows[position] for position in sorted(self._rows))

    def __contains__(self, position: int) -> bool:
        return position in self._rows

    def add(self, position: int, example: Example | None, error: DataError) -> None:
        """Record that the row at a position cannot be used; the first error of each row counts."""
        name = example.origin if example is not None and example.origin else f"row {position + 1}"
        self._rows.setdefault(position, BadRow(position, name, error))

    def check(self, total: int) -> None:
        """Raise one error that lists the first ten rows, if there are more than `max_errors` allows.

        Args:
            total: Examples of the data set, bad ones included.

        Raises:
            ImageError: With the code of the first row; or a `DataError`, if that is one. It is raised too if all rows
                are bad.
        """
        rows, total = [*self._unread, *self], total + len(self._unread)
        if len(rows) <= most_errors(self.max_errors, total) and (len(rows) < total or not rows):
            return
        advice = f", or leave them out with {how_to_leave_out()}" if self.can_leave_out else ""
        if self.max_errors:
            advice = f"; {spelled('max_errors', self.max_errors)} allows fewer" if len(rows) < total else ""
        message = "\n".join(
            [
                *listed_problems(rows, total, self.what),
                f"Correct these rows or take them out, then run again{advice}.",
            ]
        )
        first = rows[0].error
        raise ImageError(message, code=first.code) if isinstance(first, ImageError) else DataError(message)

    def without(self, rows: Sequence[T]) -> Sequence[T]:
        """Return a sequence that has one item for each row without those of bad rows."""
        return [item for position, item in enumerate(rows) if position not in self._rows] if self._rows else rows

    def to_json(self, total: int) -> dict[str, Any]:
        """Describe the rows that were left out, for a record.

        Args:
            total: Examples of the data set, bad ones included.

        Returns:
            `total` of them, `of` how many rows, the `positions` of those that were among the examples, from 0, and
            `lines`: the name and error of each of the first 100.
        """
        rows = [*self._unread, *self]
        return {
            "total": len(rows),
            "of": total + len(self._unread),
            "what": self.what,
            "positions": [row.position for row in self],
            "lines": [str(row) for row in rows[:_RECORDED]],
        }

    def note(self, total: int) -> str:
        """Name the rows that were left out in one sentence.

        Args:
            total: Examples of the data set, bad ones included.
        """
        names, total = [row.name for row in (*self._unread, *self)], total + len(self._unread)
        return (
            f"{len(names):,} of {total:,} {self.what} cannot be used and were left out: {first_of(names, most=_LISTED)}"
        )
