"""Where each row stands: its labels so far, whether it has to be asked again, and why it was asked."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.labelling.answers.records import Record
from qwen_vl_classifier.labelling.answers.tally import Outcome, Tally
from qwen_vl_classifier.labelling.asking import NO, YES, LabelSpec
from qwen_vl_classifier.training.splitting import RowNumbers

OPEN, ANSWERED, SKIPPED, NOT_SURE, FROM_DATA = range(5)
"""States of rows; the last one has a label in the data, and no answer."""

NO_LABEL = -1
"""In place of the number of a label's value."""


class RowStates:
    """The state of all rows, kept up to date row by row.

    A slot is what an answer fills: one for each label, or a single one where a row has exactly one of several classes.

    Args:
        keys: Of the rows.
        labels: What is asked.
        one_of: Whether each row has exactly one of them.
        given: Shape (slots, n): values that the data has, `NO_LABEL` where it has none.

    Attributes:
        slots: What records call each slot: the name of a label, or `None`.
        words: The answers that stand for the values 0, 1, ... of a slot.
        values: Shape (slots, n): the value of each row, `NO_LABEL` where there is none.
        passed: Shape (slots, n): whether a slot need not be asked.
        has_given: Shape (n,): whether the data has a label of a row.
        state: Shape (n,).
        ties: Slots of rows at which annotators disagree evenly.
        partial: Rows of which some slots were answered and some have to be asked.
        sources: Why each answered row was asked first.
        source_counts: How many rows have each source.
        both: Slots of rows with labels of several annotators, each with the answer of each annotator.
        alone: For each annotator, the rows that nobody else has answered.
        reviewed: Shape (slots, n): whether a question of a queue about a slot was answered.
        version: Counts changes of values.
    """

    def __init__(
        self, keys: Sequence[str], labels: Sequence[LabelSpec], *, one_of: bool, given: npt.NDArray[np.int16]
    ) -> None:
        self.slots: tuple[str | None, ...] = (None,) if one_of else tuple(label.name for label in labels)
        self.words = tuple(label.name for label in labels) if one_of else (NO, YES)
        self.values = given.copy()
        self.passed = given != NO_LABEL
        self.has_given = self.passed.any(axis=0)
        self.state = np.where(self.passed.all(axis=0), FROM_DATA, OPEN).astype(np.int8)
        self.ties: set[tuple[int, int]] = set()
        self.partial: set[int] = set()
        self.sources: dict[int, str] = {}
        self.source_counts: Counter[str] = Counter()
        self.both: dict[tuple[int, int], dict[str, str | None]] = {}
        self.alone: defaultdict[str, set[int]] = defaultdict(set)
        self.reviewed = np.zeros(given.shape, dtype=np.bool_)
        self.version = 0
        self._keys = keys
        self._given = given
        self._orders: list[dict[int, None]] = [dict.fromkeys(np.flatnonzero(one).tolist()) for one in self.passed]
        self._names: dict[int, tuple[str, ...]] = {}

    def update(self, row: int, tally: Tally) -> None:
        """Bring one row up to date with the answers that stand."""
        key = self._keys[row]
        last = [tally.last(key, name) for name in self.slots]
        outcomes = [tally.outcome(key, name) for name in self.slots]
        skipped = any(one.skipped for one in outcomes)
        for slot, outcome in enumerate(outcomes):
            given = int(self._given[slot, row])
            value = given if outcome.word is None else self.words.index(outcome.word)
            self._set(slot, row, NO_LABEL if outcome.is_tie else value)
            self.passed[slot, row] = outcome.is_passed or skipped or given != NO_LABEL
            self.reviewed[slot, row] = any(record.source == "queued" for record in last[slot].values())
            place = (slot, row)
            (self.ties.add if outcome.is_tie else self.ties.discard)(place)
            answers = {name: record.answer for name, record in last[slot].items()}
            self.both[place] = {name: answer for name, answer in answers.items() if answer in self.words}
            if len(self.both[place]) < 2:
                del self.both[place]
        self._set_source(row, [record for one in last for record in one.values()])
        self._set_alone(row, {name for one in last for name in one})
        self._names[row] = tuple(sorted({name for one in outcomes for name in one.annotators}))
        done, touched = bool(self.passed[:, row].all()), any(one.is_passed for one in outcomes)
        (self.partial.add if touched and not done else self.partial.discard)(row)
        self.state[row] = self._state_of(outcomes, done=done)

    def done(self) -> npt.NDArray[np.bool_]:
        """Return which rows need not be asked, shape (n,)."""
        found: npt.NDArray[np.bool_] = self.passed.all(axis=0)
        return found

    def labelled(self, slot: int) -> tuple[RowNumbers, RowNumbers]:
        """Return the rows that have a value in a slot, in the order in which they were answered, and the values."""
        rows = np.fromiter(self._orders[slot], dtype=np.int64, count=len(self._orders[slot]))
        return rows, self.values[slot, rows].astype(np.int64)

    def annotators(self, row: int) -> tuple[str, ...]:
        """Return who gave the labels of a row."""
        return self._names.get(row, ())

    def word(self, slot: int, row: int) -> str | None:
        """Return the answer that stands for the value of a row in a slot."""
        value = int(self.values[slot, row])
        return None if value == NO_LABEL else self.words[value]

    def _set(self, slot: int, row: int, value: int) -> None:
        if value != self.values[slot, row]:
            self.values[slot, row] = value
            self.version += 1
            self._orders[slot].pop(row, None)
            if value != NO_LABEL:
                self._orders[slot][row] = None

    def _set_source(self, row: int, records: Sequence[Record]) -> None:
        first = min(records, key=lambda record: (record.at, record.id), default=None)
        old = self.sources.pop(row, None)
        if old is not None:
            self.source_counts[old] -= 1
        if first is not None:
            self.sources[row] = first.source or "uncertain"
            self.source_counts[self.sources[row]] += 1

    def _set_alone(self, row: int, names: set[str]) -> None:
        for rows in self.alone.values():
            rows.discard(row)
        if len(names) == 1:
            self.alone[names.pop()].add(row)

    @staticmethod
    def _state_of(outcomes: Sequence[Outcome], *, done: bool) -> int:
        if any(one.word is not None or one.is_tie for one in outcomes):
            return ANSWERED
        if any(one.skipped for one in outcomes):
            return SKIPPED
        if any(one.unsure for one in outcomes):
            return NOT_SURE
        return FROM_DATA if done else OPEN
