"""What the states of rows come to: the rows of the data set, and how many have each label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.labelling.answers.labelled_rows import GIVEN, LabelledRow
from qwen_vl_classifier.labelling.answers.row_states import NO_LABEL, RowStates
from qwen_vl_classifier.labelling.asking import PLAIN_LABEL, LabelSpec
from qwen_vl_classifier.labelling.choosing import Mask
from qwen_vl_classifier.labelling.pool import Pool

UNCOUNTED = "uncounted"
"""How a row was chosen that was drawn at random, but after a row that nobody has answered yet."""


class LabelsSoFar:
    """The labels of a pool.

    Args:
        pool: The rows.
        labels: What is asked.
        states: Where each row stands.
        one_of: Whether each row has exactly one of the labels.

    Attributes:
        plain_names: What 0 and 1 are called where there is one label without a name of its own, else `None`.
    """

    def __init__(self, pool: Pool, labels: Sequence[LabelSpec], states: RowStates, *, one_of: bool) -> None:
        self._pool, self._labels, self._states, self._one_of = pool, labels, states, one_of
        self.plain_names: tuple[str, str] | None = None
        if is_plain(labels, one_of=one_of):
            self.plain_names = labels[0].no, labels[0].yes

    def counts(self) -> list[dict[str, Any]]:
        """Return for each label its name, and how many rows have it and have it not."""
        found = []
        for number, label in enumerate(self._labels):
            values = self._states.values[0 if self._one_of else number]
            yes = int((values == (number if self._one_of else 1)).sum())
            found.append({"name": label.name, "yes": yes, "no": int((values != NO_LABEL).sum()) - yes})
        return found

    def rows(self, counted: Mask) -> list[LabelledRow]:
        """Return all rows of the data that have a label, in order.

        Args:
            counted: Shape (n,): the rows of the pool that are a random sample.
        """
        values = self._states.values
        labelled = (values != NO_LABEL).any(axis=0)
        found = []
        for position in np.flatnonzero(labelled[self._pool.numbers]).tolist():
            row = int(self._pool.numbers[position])
            found.append(
                LabelledRow(
                    position,
                    self._pool.everything[position],
                    self._columns(values[:, row].tolist()),
                    "random" if counted[row] else self._source(row),
                    self._states.annotators(row),
                )
            )
        return found

    def _source(self, row: int) -> str:
        source = self._states.sources.get(row, GIVEN) if self._states.annotators(row) else GIVEN
        return UNCOUNTED if source == "random" else source

    def _columns(self, values: Sequence[int]) -> Mapping[str, int | str | None]:
        if self._one_of:
            return {PLAIN_LABEL: self._labels[values[0]].name}
        pairs = zip(self._labels, values, strict=True)
        return {label.name: None if value == NO_LABEL else value for label, value in pairs}


def is_plain(labels: Sequence[LabelSpec], *, one_of: bool) -> bool:
    """Tell whether there is one label, yes or no, in the column that every verb reads."""
    return not one_of and [label.name for label in labels] == [PLAIN_LABEL]


def given_values(pool: Pool, labels: Sequence[LabelSpec], *, one_of: bool) -> npt.NDArray[np.int16]:
    """Return the labels that the data has already, as numbers of values.

    Where rows of the same content have different labels, they count as having none.

    Returns:
        Shape (slots, n), `NO_LABEL` where a row has none.
    """
    found = np.full((1 if one_of else len(labels), len(pool)), NO_LABEL, dtype=np.int16)
    if not is_plain(labels, one_of=one_of):
        return found
    known = [int(example.label) if example.label in (0, 1) else NO_LABEL for example in pool.everything]
    spoiled = set()
    for number, value in zip(pool.numbers.tolist(), known, strict=True):
        if value != NO_LABEL:
            if found[0, number] not in (NO_LABEL, value):
                spoiled.add(number)
            found[0, number] = value
    found[0, [*spoiled]] = NO_LABEL
    return found
