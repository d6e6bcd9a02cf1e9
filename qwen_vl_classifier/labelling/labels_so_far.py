"""What the states of rows come to: the rows of the data set, and how many have each label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.table import name_in
from qwen_vl_classifier.data.targets import label_matrix
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
    for slot, known in enumerate(_known(pool.everything, labels, one_of=one_of)):
        first = np.full(len(pool), NO_LABEL, dtype=np.int16)
        there = np.flatnonzero(known != NO_LABEL)
        first[pool.numbers[there]] = known[there]  # one of those that a row has, whichever it is
        differing = np.unique(pool.numbers[there][known[there] != first[pool.numbers[there]]])
        first[differing] = NO_LABEL
        found[slot] = first
    return found


def _known(
    examples: Sequence[Example], labels: Sequence[LabelSpec], *, one_of: bool
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the values of rows for each slot, shape (rows,): `NO_LABEL` where a row has none that can be read."""
    columns = {column for example in examples for column in example.fields}
    names = [label.name for label in labels]
    unread = BadRows("100%")
    if is_plain(labels, one_of=one_of):
        yield np.array([int(one.label) if one.label in (0, 1) else NO_LABEL for one in examples])
    elif one_of:
        has_words = PLAIN_LABEL in columns or any(example.label is not None for example in examples)
        if not has_words and not columns.issuperset(names):
            yield np.full(len(examples), NO_LABEL)
            return
        matrix = label_matrix(examples, names, one_of=True, bad=unread)
        yield np.where((matrix == 1).any(axis=1), matrix.argmax(axis=1), NO_LABEL)
    else:
        for name in names:
            if name_in(columns, name) in columns:
                yield label_matrix(examples, [name], bad=unread)[:, 0]
            else:
                yield np.full(len(examples), NO_LABEL)
