"""Which row a browser gets next: one that was begun, one to check, one to compare annotators, or a new one."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.labelling.answers.records import Record
from qwen_vl_classifier.labelling.answers.row_states import RowStates
from qwen_vl_classifier.labelling.answers.tally import Tally
from qwen_vl_classifier.labelling.asking import Item
from qwen_vl_classifier.labelling.choosing import Choice, Chooser, Mask
from qwen_vl_classifier.labelling.live_head import LiveHead
from qwen_vl_classifier.labelling.queues import Queue

CONTRADICTION = math.log(9)
"""Margin from which the head contradicts an answer: it gives the other one a probability of 0.9."""

EVERY = 10
"""Of how many questions to an annotator one may be a check, and one compares annotators."""

_SETTLING = 5  # answers of an annotator after which a row may come back to be checked
_TRIED = 20  # rows of other annotators


class Selection:
    """Selects rows for one annotator, from what all annotators have answered.

    What comes next depends on the journal, the seed and the heads alone, so a session that goes on after a kill asks
    what it would have asked.

    Args:
        keys: Of all rows.
        states: Where they stand.
        tally: The answers.
        chooser: Chooses new rows.
        annotator: For whom.
        random_share: Of the questions, how many are drawn at random.
        queue: Rows to ask before others, or these alone.
        start: Margins from before any answer, shape (n,), for each label; `None` where there are none.
    """

    def __init__(
        self,
        keys: Sequence[str],
        states: RowStates,
        tally: Tally,
        chooser: Chooser,
        *,
        annotator: str,
        random_share: float,
        queue: Queue | None = None,
        start: Sequence[Float | None] = (),
    ) -> None:
        self.heads: Sequence[LiveHead | None] = ()
        self._keys, self._states, self._tally, self._chooser = keys, states, tally, chooser
        self._annotator, self._random_share = annotator, random_share
        self._queue: npt.NDArray[np.int64] = np.array([] if queue is None else queue.rows, dtype=np.int64)
        self._only = queue is not None and queue.only
        self._queued = {*self._queue.tolist()}
        self._start = [one for one in start if one is not None]
        self._suspects: list[tuple[int, int]] = []

    def set_heads(self, heads: Sequence[LiveHead | None]) -> None:
        """Use new heads, and find the answers that they contradict, the most contradicted first."""
        self.heads = heads
        found: list[tuple[float, int, int]] = []
        for number, head in enumerate(heads):
            if head is None or not head.folds:
                continue
            slot = number if len(self._states.slots) > 1 else 0
            against = np.where(head.labels == 1, -head.out_of_fold, head.out_of_fold)
            found += [(-float(against[i]), slot, int(head.rows[i])) for i in np.flatnonzero(against > CONTRADICTION)]
        self._suspects = [(slot, row) for _, slot, row in sorted(found)]

    def take(self, number: int, at_desks: Sequence[Item], elsewhere: Collection[int] = ()) -> list[Item]:
        """Return the next rows for a browser; fewer where there are not so many.

        Args:
            number: How many.
            at_desks: What browsers have already.
            elsewhere: Rows that other processes show.
        """
        taken = {item.row for item in at_desks} | {*elsewhere}
        own = self._tally.counts().get(self._annotator, 0)
        so_far = own // len(self._states.slots) + len(at_desks)
        special: dict[int, Item] = {}
        for turn in range(number):
            item = self._special([*at_desks, *special.values()], so_far + turn + 1, taken)
            if item is not None:
                special[turn] = item
                taken.add(item.row)
        new = iter(self._new(number - len(special), [*at_desks, *special.values()], taken))
        items = (special.get(turn) or next(new, None) for turn in range(number))
        return [item for item in items if item is not None]

    def pending(self, item: Item) -> list[int]:
        """Return which slots of a row are still to be asked."""
        if item.source == "check":
            return item.labels
        if item.source == "agreement":
            return [slot for slot in item.labels if self._is_to_compare(item.row, slot)]
        return [slot for slot in item.labels if not self._answered[slot, item.row]]

    def open_slots(self, row: int) -> list[int]:
        """Return the slots of a row that have to be asked."""
        slots: list[int] = np.flatnonzero(~self._answered[:, row]).tolist()
        return slots

    def scope(self) -> Mask:
        """Return which rows are asked at all, shape (n,)."""
        found = np.full(len(self._keys), not self._only)
        found[self._queue] = True
        return found

    def left(self) -> int:
        """Return how many rows have to be asked yet."""
        return int((self.scope() & ~self._answered.all(axis=0)).sum())

    def counted(self, at_desks: Iterable[Item] = ()) -> Mask:
        """Return which rows are a random sample of those that have no label in the data, shape (n,).

        Args:
            at_desks: What browsers have: a row that is being asked does not end the sample. It waits for reasons that
                have nothing to do with its label.
        """
        done = self._states.done()
        waiting = _with(done, [item.row for item in at_desks])
        found: Mask = self._chooser.random.counted(waiting) & done & ~self._states.has_given
        return found

    def source_of(self, row: int) -> str:
        """Return why a row would be asked that this session has shown to nobody, as before a kill."""
        return "queued" if row in self._queued else "uncertain"

    @property
    def _answered(self) -> Mask:
        """Which slots need not be asked, shape (slots, n): of a reviewed queue, those that were answered in it."""
        return self._states.reviewed if self._only else self._states.passed

    def _special(self, out: Sequence[Item], turns: int, taken: set[int]) -> Item | None:
        """Return a row that comes before any new one, if one is due.

        Args:
            out: What browsers have.
            turns: How many questions to this annotator there are with this one.
            taken: Rows that are not free.
        """
        for row in sorted(self._states.partial - taken):
            slots = self.open_slots(row)
            if slots and any(self._mine(row, slot) for slot in range(len(self._states.slots))):
                return Item(row, self._states.sources[row], slots)
        finders: tuple[tuple[str, Callable[[set[int]], Item | None]], ...] = (
            ("check", self._check),
            ("agreement", self._agreement),
        )
        for source, find in finders if not self._only else ():
            asked = self._tally.asked(self._annotator, source) + sum(item.source == source for item in out)
            if (asked + 1) * EVERY <= turns and (item := find(taken)) is not None:
                return item
        return None

    def _mine(self, row: int, slot: int) -> Sequence[Record]:
        return self._tally.of(self._keys[row], self._states.slots[slot], self._annotator)

    def _check(self, taken: set[int]) -> Item | None:
        """Return the row with the answer of this annotator that a head contradicts most, and that was not checked."""
        recent = {record.key for record in itertools.islice(self._tally.newest(self._annotator), _SETTLING)}
        for slot, row in self._suspects:
            mine = self._mine(row, slot)
            settled = row not in taken and self._keys[row] not in recent
            if (
                settled
                and mine
                and mine[-1].answer in self._states.words
                and all(one.source != "check" for one in mine)
            ):
                return Item(row, "check", [slot])
        return None

    def _agreement(self, taken: set[int]) -> Item | None:
        """Return a row that one other annotator alone has answered."""
        others = (rows for name, rows in self._states.alone.items() if name != self._annotator)
        free = (row for rows in others for row in rows if row not in taken)
        for row in heapq.nsmallest(_TRIED, free, key=self._keys.__getitem__):  # keys are as good as random
            slots = [slot for slot in range(len(self._states.slots)) if self._is_to_compare(row, slot)]
            if slots:
                return Item(row, "agreement", slots)
        return None

    def _is_to_compare(self, row: int, slot: int) -> bool:
        """Tell whether exactly one other annotator has given a label, and this one has said nothing."""
        last = self._tally.last(self._keys[row], self._states.slots[slot])
        answers = [record.answer for record in last.values()]
        return self._annotator not in last and len(answers) == 1 and answers[0] in self._states.words

    def _new(self, number: int, out: Sequence[Item], taken: Collection[int]) -> list[Item]:
        """Return rows that were not asked, from the queue and by the chooser."""
        waiting = self._queue[~self._answered[:, self._queue].all(axis=0)].tolist()
        queued = deque([row for row in waiting if row not in taken][:number])
        if self._only:
            return [Item(row, "queued", self.open_slots(row)) for row in queued]
        passed = self._states.done()
        passed[[*self._states.partial]] = True
        counts = Counter(item.source for item in out) + self._states.source_counts
        found: list[Choice] = []
        blocked = {*taken}
        while queued and len(found) < number:
            due = self._random_share * (counts["random"] + counts["queued"] + 1) - counts["random"]
            drawn = self._chooser.random.next(_with(passed, blocked)) if due > 0 else None
            choice = Choice(queued.popleft(), "queued") if drawn is None else Choice(drawn, "random")
            if choice.row not in blocked:
                found.append(choice)
                blocked.add(choice.row)
                counts[choice.source] += 1
        if len(found) < number:
            start = self._start[counts.total() % len(self._start)] if self._start else None
            ahead = number - len(found)
            found += self._chooser.choose(
                passed, counts, heads=self.heads, start=start, reserved=sorted(blocked), ahead=ahead
            )
        return [Item(choice.row, choice.source, self.open_slots(choice.row)) for choice in found]


def _with(passed: Mask, rows: Collection[int]) -> Mask:
    found = passed.copy()
    found[[*rows]] = True
    return found
