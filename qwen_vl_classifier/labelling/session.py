"""A session of labelling: questions for browsers, answers on disk, heads and the data set that follow them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from qwen_vl_classifier.classifier.probabilities import Float
from qwen_vl_classifier.config.spelling import named
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ConfigError, DataError, JournalError, NotCurrentError, one_line, shown
from qwen_vl_classifier.labelling.answers.agreement import agreement_of
from qwen_vl_classifier.labelling.answers.journal import Journal
from qwen_vl_classifier.labelling.answers.labelled_rows import LabelledFile, LabelledRow
from qwen_vl_classifier.labelling.answers.records import Record, is_annotator, is_browser
from qwen_vl_classifier.labelling.answers.row_states import ANSWERED, FROM_DATA, NOT_SURE, SKIPPED, RowStates
from qwen_vl_classifier.labelling.answers.tally import Tally
from qwen_vl_classifier.labelling.asking import SILENT_SECONDS, SKIP, Desk, Desks, Item, LabelSpec, Question
from qwen_vl_classifier.labelling.background import Background
from qwen_vl_classifier.labelling.choosing import Chooser, Mask
from qwen_vl_classifier.labelling.labels_so_far import LabelsSoFar, given_values
from qwen_vl_classifier.labelling.pool import Pool
from qwen_vl_classifier.labelling.pool_features import PoolFeatures
from qwen_vl_classifier.labelling.queues import Queue
from qwen_vl_classifier.labelling.refitting import Refitting, Task
from qwen_vl_classifier.labelling.selection import Selection

_log = logging.getLogger(__name__)

_STEADY = 2  # upcoming rows that stay when heads have changed: the page has loaded their pictures
_MOST_SECONDS = 86_400.0  # on one question, that are recorded


class Session:
    """Asks one annotator about the rows of a pool, in any number of browsers, beside other processes.

    Each answer is on disk before `answer` returns. All that is known follows from the journal: a session that is killed
    and begun again goes on where it was. Heads are refitted, and the data set is written, in a thread of their own.

    All methods may be called by any thread.

    Args:
        pool: The rows.
        labels: What is asked.
        journal: The journal of the data set, just opened.
        one_of: Whether each row has exactly one of the labels.
        annotator: Who answers.
        random_share: Of the questions, how many are drawn at random.
        queue: Rows to ask before others, or these alone.
        start: For each label the margins of all rows from before any answer, shape (n,), or `None`.
        clock: Tells seconds, for browsers that fall silent.

    Raises:
        ConfigError: The name of the annotator is not usable, or the journal is about other rows.
        JournalError: The journal is damaged, or cannot be read.
    """

    def __init__(
        self,
        pool: Pool,
        labels: Sequence[LabelSpec],
        journal: Journal,
        *,
        one_of: bool = False,
        annotator: str,
        random_share: float = 0.25,
        queue: Queue | None = None,
        start: Sequence[Float | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not is_annotator(annotator):
            raise ConfigError(
                f"{named('annotator')} {shown(annotator)}; expected 1 to 200 printable characters; give another name"
            )
        self.pool, self.labels, self.journal = pool, tuple(labels), journal
        self.one_of, self.annotator = one_of, annotator
        self._clock = clock
        self._file = LabelledFile(journal.out)
        self._tally = Tally()
        given = given_values(pool, labels, one_of=one_of)
        self._states = RowStates(pool.keys, labels, one_of=one_of, given=given)
        self._so_far = LabelsSoFar(pool, labels, self._states, one_of=one_of)
        features = PoolFeatures(pool.features, pool.taps, pool.groups, seed=journal.seed)
        self._refitting = Refitting(features, len(labels), start=start or (), seed=journal.seed)
        self._selection = Selection(
            pool.keys,
            self._states,
            self._tally,
            Chooser(features, random_share=random_share, seed=journal.seed, order=pool.order(journal.seed)),
            annotator=annotator,
            random_share=random_share,
            queue=queue,
            start=start or (),
        )
        self._missing = 0 if queue is None else queue.missing
        self._desks = Desks()
        self._elsewhere: dict[int, tuple[float, str]] = {}  # rows that other annotators are shown: since when, to whom
        self._strangers: set[str] = set()  # keys of answered rows that the data does not have
        self._model = 0  # version of the heads
        self._problem = ""  # with the data set
        self._lock = threading.RLock()
        self._changes = 0  # of the answers that stand
        self._fold(journal.read_all())
        if self._strangers and len(self._strangers) == len({*self._tally.keys()}):
            raise ConfigError(
                f"{journal.path}: none of its {len(self._strangers):,} answered rows is in this data of {len(pool):,} "
                f"rows; it was begun with {journal.data or 'other data'}; give that data, or another file with "
                f"{named('out')}"
            )
        self._background = Background(self._follow_others, self._refit, self._refitting.measure, self._write)

    @property
    def outside(self) -> bool:
        """Whether a picture of the data set is outside its folder, so that whoever reads it has to allow that."""
        return self._file.outside

    def questions(self, browser: str, ahead: int = 4) -> list[Question]:
        """Return the question of a browser, and those that will probably follow.

        The first is reserved for this browser until it is answered, or the browser is silent for two minutes. The list
        is empty where all rows are done, or the rest is open in other browsers.

        Args:
            browser: A name that the browser has made for itself.
            ahead: How many are to follow; one of the next row is among them, if there is a next row.

        Raises:
            DataError: The name of the browser is not possible.
            JournalError: The journal cannot be read.
        """
        with self._lock:
            desk = self._desk(browser)
            self._fill(desk, ahead)
            found: list[Question] = []
            items = [item for item in (desk.current, *desk.upcoming) if item is not None]
            for number, item in enumerate(items):
                found += [self._question(item, slot) for slot in item.labels]
                if number and len(found) > ahead:
                    break
            return found

    def answer(self, browser: str, key: str, label: str | None, answer: str, seconds: float = 0.0) -> None:
        """Record an answer; on return it is on disk.

        An answer to a row that is not the browser's own question counts too: after a kill the page may repeat an answer
        that was not confirmed. The same answer given again is recorded once.

        Args:
            browser: Which one.
            key: Of the row.
            label: Of the question.
            answer: "yes" or "no", or the word of a class; "unsure"; or "skip", which passes over the whole row.
            seconds: How long the question was on the screen.

        Raises:
            NotCurrentError: There is no such row or label.
            DataError: It is not one of these answers.
            JournalError: It could not be saved, and does not count.
        """
        row = self.pool.row_of(key)
        if row is None or label not in self._states.slots:
            raise NotCurrentError(
                f"row {shown(key)}, label {shown(label)}: there is no such question; ask for questions"
            )
        if answer not in self.journal.answers:
            raise DataError(f"answer {shown(answer)}; expected one of {', '.join(self.journal.answers)}")
        slot = self._states.slots.index(label)
        with self._lock:
            desk = self._desk(browser)
            items = [item for item in (desk.current, *desk.upcoming) if item is not None]
            item = next((item for item in items if item.row == row and slot in item.labels), None)
            mine = self._tally.of(key, label, self.annotator)
            if item is None and mine and mine[-1].answer == answer:
                return
            record = Record.new(
                "answer",
                key=key,
                label=label,
                annotator=self.annotator,
                browser=browser,
                answer=answer,
                source=self._selection.source_of(row) if item is None else item.source,
                seconds=round(min(max(float(seconds), 0.0), _MOST_SECONDS), 3),
            )
            self.journal.append(record)
            self._follow()
            if item is not None:
                item.labels = [] if answer == SKIP else [one for one in item.labels if one != slot]
                item.taken_back = None
                self._drop_done(desk)
        self._background.wake()

    def undo(self, browser: str) -> Question | None:
        """Take back the last answer of a browser, and ask its question again.

        Where the browser has given none, the annotator's last answer in a browser that is not there any more is taken
        back, as on the day after.

        Args:
            browser: Which one.

        Returns:
            The question, which is the browser's current one now; `None` where there is nothing to take back.

        Raises:
            JournalError: That could not be saved.
        """
        with self._lock:
            desk = self._desk(browser)
            record = self._last(browser)
            row = None if record is None else self.pool.row_of(record.key)
            if record is None or row is None:
                return None
            self.journal.append(
                Record.new(
                    "undo",
                    key=record.key,
                    label=record.label,
                    annotator=self.annotator,
                    browser=browser,
                    undoes=record.id,
                )
            )
            self._follow()
            slot = self._states.slots.index(record.label)
            slots = [slot] if record.source == "check" else [slot, *self._selection.open_slots(row)]
            item = Item(row, record.source or "uncertain", [*dict.fromkeys(slots)], taken_back=record.answer)
            if desk.current is not None and desk.current.row != row:
                desk.upcoming.insert(0, desk.current)
            desk.current = item
            self._desks.give_up(row)
            question = self._question(item, slot)
        self._background.wake()
        return question

    def progress(self) -> dict[str, Any]:
        """Describe how far labelling is, for the page."""
        with self._lock:
            with suppress(JournalError):  # the next answer says so
                self._follow()
            states, scope = self._states, self._selection.scope()
            counts = np.bincount(states.state[scope], minlength=5)
            heads = [self._refitting.to_json(number) for number in range(len(self.labels))]
            return {
                "rows": int(scope.sum()),
                "answered": int(counts[ANSWERED]),
                "skipped": int(counts[SKIPPED]),
                "unsure": int(counts[NOT_SURE]),
                "given": int(counts[FROM_DATA]),
                "random": int((self._counted() & (states.state == ANSWERED)).sum()),
                "left": self._selection.left(),
                "refit": {
                    "labels": self._refitting.labels,
                    "seconds": self._refitting.seconds,
                    "running": self._background.is_busy,
                },
                "labels": [known | head for known, head in zip(self._so_far.counts(), heads, strict=True)],
                "agreement": agreement_of(states.both.values(), ties=len(states.ties)),
                "annotators": self._tally.counts(),
                "notes": [*self._notes()],
            }

    def labelled(self) -> list[Example]:
        """Return the rows that have a label, in the order of the data, as `train` takes them.

        They have two further columns: `sampled`, which is "random" where a row belongs to the random sample of the
        data, and `annotator`. Several labels stand in columns of their names, the word of a class in the column
        "label". Of rows with the same content, each has the label.
        """
        return [row.to_example(self._so_far.plain_names) for row in self._rows()]

    def wait_until_fitted(self, timeout: float) -> bool:
        """Wait until heads have followed all answers; return whether they have in time.

        Args:
            timeout: Seconds.
        """
        return self._background.settle(timeout)

    def close(self) -> None:
        """End the background thread, and write the data set.

        Raises:
            JournalError: It cannot be written; answers are in the journal.
        """
        if self._background.stop():
            self._follow_others()
            self._write()
            while self.journal.has_grown() and not self._problem:  # by another process, which may have ended since
                self._follow_others()
                self._write()
        if self._problem:
            raise JournalError(f"{self._problem}; answers are kept in {self.journal.path}: run the same command again")

    def _desk(self, browser: str) -> Desk:
        """Return the desk of a browser, after what other processes have written."""
        if not is_browser(browser):
            raise DataError(
                f"browser {shown(browser)}; expected 1 to 64 letters, digits, hyphens and underscores; reload the page"
            )
        self._follow()
        now = self._clock()
        desk = self._desks.of(browser, now)
        self._desks.clear_silent(now)
        return desk

    def _follow(self) -> None:
        self._fold(self.journal.read_new())

    def _fold(self, records: Sequence[Record]) -> None:
        """Add records to what is known."""
        touched: dict[int, None] = {}
        changed = False
        for record in records:
            row = self.pool.row_of(record.key)
            if record.event == "show":
                if row is not None and record.annotator != self.annotator:
                    self._elsewhere[row] = (record.time, record.annotator)
                continue
            if not self._tally.apply(record):
                continue
            changed = True
            if row is None:
                self._strangers.add(record.key)
            else:
                touched[row] = None
                if self._elsewhere.get(row, (0, ""))[1] == record.annotator:
                    del self._elsewhere[row]
        for row in touched:
            self._states.update(row, self._tally)
        if changed:
            self._changes += 1

    def _fill(self, desk: Desk, ahead: int) -> None:
        """Give a browser a question and what follows, as far as there is any."""
        self._drop_done(desk)
        if desk.model != self._model:
            del desk.upcoming[_STEADY:]
            desk.model = self._model
        had = desk.current
        missing = max(1, ahead) + (desk.current is None) - len(desk.upcoming)
        if missing > 0:
            desk.upcoming += self._selection.take(missing, [*self._desks.items()], self._shown_elsewhere())
        if desk.current is None:
            if not desk.upcoming:
                desk.upcoming = self._desks.upcoming(desk)[:1]
            desk.current = desk.upcoming.pop(0) if desk.upcoming else None
            if desk.current is not None:
                self._desks.give_up(desk.current.row)
        if desk.current is not None and desk.current is not had and len(self._tally.counts()) > 1:
            self._show(desk.current)

    def _drop_done(self, desk: Desk) -> None:
        """Take from a desk what was answered, here or elsewhere."""
        for item in [desk.current, *desk.upcoming]:
            if item is not None and item.taken_back is None:
                item.labels = self._selection.pending(item)
        desk.upcoming = [item for item in desk.upcoming if item.labels]
        if desk.current is not None and not desk.current.labels:
            desk.current = None

    def _show(self, item: Item) -> None:
        """Tell other processes that a row is being asked; where that fails, they may ask it too."""
        with suppress(JournalError):
            self.journal.append(
                Record.new(
                    "show",
                    key=self.pool.keys[item.row],
                    label=self._states.slots[item.labels[0]],
                    annotator=self.annotator,
                    browser="-",
                ),
                durable=False,
            )

    def _shown_elsewhere(self) -> list[int]:
        now = time.time()
        old = [row for row, (since, _) in self._elsewhere.items() if abs(now - since) >= SILENT_SECONDS]
        for row in old:
            del self._elsewhere[row]
        return [*self._elsewhere]

    def _question(self, item: Item, slot: int) -> Question:
        before = None
        if item.taken_back is not None and slot == item.labels[0]:
            before = item.taken_back
        elif item.source in ("check", "queued"):
            before = self._states.word(slot, item.row)
        return Question(self.pool.keys[item.row], self._states.slots[slot], item.row, item.source, before)

    def _last(self, browser: str) -> Record | None:
        """Return the answer that an undo takes back."""
        records = [record for record in self._tally.newest(self.annotator) if self.pool.row_of(record.key) is not None]
        own = (record for record in records if record.browser == browser)
        left = (record for record in records if not self._desks.is_active(record.browser))
        return next(own, None) or next(left, None)

    def _notes(self) -> Iterator[str]:
        if self._strangers:
            yield f"{len(self._strangers):,} answered rows are not in this data; their answers are kept"
        if self._missing:
            yield f"{self._missing:,} rows of the queue are not in this data"
        if self.journal.damaged:
            yield f"{len(self.journal.damaged):,} damaged lines of {self.journal.path.name} are left out"
        if self._problem:
            yield self._problem
        if self._refitting.problem or self._background.problem:
            yield self._refitting.problem or self._background.problem

    def _rows(self) -> list[LabelledRow]:
        with self._lock:
            return self._so_far.rows(self._counted())

    def _counted(self) -> Mask:
        return self._selection.counted(self._desks.items())

    def _follow_others(self) -> int:
        """Read what other processes have written; return how often the answers that stand have changed."""
        with self._lock:
            self._follow()
            return self._changes

    def _tasks(self) -> list[Task]:
        """Return the labels of each head."""
        with self._lock:
            counted = self._counted()
            if not self.one_of:
                return [Task(*self._states.labelled(slot), counted) for slot in range(len(self.labels))]
            rows, values = self._states.labelled(0)
            return [Task(rows, (values == number).astype(np.int64), counted) for number in range(len(self.labels))]

    def _refit(self) -> None:
        self._refitting.refit(self._tasks(), self._publish)

    def _publish(self) -> None:
        """Choose by the new heads from now on."""
        with self._lock:
            self._selection.set_heads([*self._refitting.heads])
            self._model += 1

    def _write(self) -> None:
        """Write the data set, if there is anything in it or was."""
        rows = self._rows()
        try:
            if rows or self.journal.out.exists():
                self._file.write(rows)
            self._problem = ""
        except OSError as error:
            self._problem = (
                f"{self.journal.out}: cannot be written ({one_line(error.strerror or type(error).__name__)})"
            )
            _log.warning("%s", self._problem)
