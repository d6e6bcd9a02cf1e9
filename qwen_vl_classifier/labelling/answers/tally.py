"""What the records of a journal add up to: answers that stand, by row, label and annotator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwen_vl_classifier.labelling.answers.records import Record
from qwen_vl_classifier.labelling.asking import SKIP, UNSURE


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the answers to one question come to.

    Attributes:
        word: The answer of most annotators: yes, no, or the word of a class; `None` where there is none.
        is_tie: Whether two answers have most annotators, equally many.
        annotators: Who gave this answer, in order of name.
        skipped: Whether somebody's last answer is skip.
        unsure: Whether somebody's last answer is unsure.
    """

    word: str | None = None
    is_tie: bool = False
    annotators: tuple[str, ...] = ()
    skipped: bool = False
    unsure: bool = False

    @property
    def is_passed(self) -> bool:
        """Whether the question has been answered in any way, so that it need not be asked again."""
        return self.word is not None or self.is_tie or self.skipped or self.unsure


class Tally:
    """Add up records, one after the other, in the order of the journal.

    The state depends on the records alone, so whoever reads the same journal has the same state.

    Attributes:
        shown: For each row, the last record of a browser that was shown it.
    """

    def __init__(self) -> None:
        self.shown: dict[str, Record] = {}
        self._standing: dict[str, dict[str | None, dict[str, list[Record]]]] = {}
        self._answers: dict[str, Record] = {}  # all that were given, by id
        self._history: dict[str, dict[str, Record]] = {}  # of each annotator, answers that stand, in order
        self._by_source: Counter[tuple[str, str | None]] = Counter()  # of each annotator

    def apply(self, record: Record) -> bool:
        """Add a record; return whether that changed which answers stand."""
        if record.event == "show":
            self.shown[record.key] = record
            return False
        if record.event == "answer":
            if record.id in self._answers:
                return False
            self._answers[record.id] = record
            by_label = self._standing.setdefault(record.key, {}).setdefault(record.label, {})
            by_label.setdefault(record.annotator, []).append(record)
            self._history.setdefault(record.annotator, {})[record.id] = record
            self._by_source[record.annotator, record.source] += 1
            return True
        undone = self._answers.get(record.undoes or "")
        if undone is None or undone.annotator != record.annotator:
            return False
        if self._history[undone.annotator].pop(undone.id, None) is None:  # it was undone before
            return False
        self._by_source[undone.annotator, undone.source] -= 1
        standing = self._standing[undone.key][undone.label]
        standing[undone.annotator].remove(undone)
        if not standing[undone.annotator]:
            del standing[undone.annotator]
        return True

    def keys(self) -> Iterable[str]:
        """Return the keys of rows that were ever answered."""
        return self._standing.keys()

    def last(self, key: str, label: str | None) -> dict[str, Record]:
        """Return the last answer that stands of each annotator to a question."""
        found = self._standing.get(key, {}).get(label, {})
        return {annotator: records[-1] for annotator, records in found.items()}

    def of(self, key: str, label: str | None, annotator: str) -> list[Record]:
        """Return the answers of an annotator to a question that stand, in order."""
        return self._standing.get(key, {}).get(label, {}).get(annotator, [])

    def outcome(self, key: str, label: str | None) -> Outcome:
        """Return what the answers to a question come to."""
        last = self.last(key, label)
        if not last:
            return _NOTHING
        answers = {annotator: record.answer for annotator, record in last.items()}
        skipped, unsure = SKIP in answers.values(), UNSURE in answers.values()
        counts = Counter(answer for answer in answers.values() if answer not in (SKIP, UNSURE))
        if not counts:
            return Outcome(None, False, (), skipped, unsure)
        (word, most), *others = counts.most_common(2)
        if others and others[0][1] == most:
            return Outcome(None, True, (), skipped, unsure)
        names = sorted(annotator for annotator, answer in answers.items() if answer == word)
        return Outcome(word, False, tuple(names), skipped, unsure)

    def newest(self, annotator: str) -> Iterator[Record]:
        """Yield the answers of an annotator that stand, the newest first."""
        return reversed(self._history.get(annotator, {}).values())

    def asked(self, annotator: str, source: str) -> int:
        """Return how many answers of an annotator stand to questions that had a source."""
        return self._by_source[annotator, source]

    def counts(self) -> dict[str, int]:
        """Return how many answers of each annotator stand."""
        return {annotator: len(records) for annotator, records in sorted(self._history.items()) if records}


_NOTHING = Outcome()
