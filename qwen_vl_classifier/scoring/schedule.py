"""Which shard a worker takes next, and what becomes of one whose worker dies. Pure: no processes, no clock.

A shard whose worker died is redone, on another worker where there is one. Once that has happened three times, its rows
are suspects: they are probed by halves (scored, not written), each half that kills a worker is halved again, and a row
that does so alone, twice, is a culprit. Then the shard is redone with its culprits blamed: they become rows with an
error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qwen_vl_classifier.errors import ScoringError
from qwen_vl_classifier.scoring.formats import RowError
from qwen_vl_classifier.scoring.parts import Shard

MOST_DEATHS = 3
"""So many workers may die with a shard before its rows are suspected."""

_CRASHED = "this row ends the process that scores it"  # not how: the same row says the same in every run

MOST_CULPRITS = 16
"""In one shard; where more rows kill their workers, it is not the rows."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is asked to do with a shard.

    Attributes:
        shard: Which.
        blamed: Its rows that are not to be scored, by position in the shard, and the error that each becomes.
        probe: Positions of the rows that are scored without writing; `None` asks for the whole shard, written.
    """

    shard: Shard
    blamed: Mapping[int, RowError] = field(default_factory=dict)
    probe: range | None = None


class Schedule:
    """Hand out shards to workers until all are done.

    Args:
        shards: Those that are to be done; read lazily.

    Attributes:
        unfinished: Number of tasks that were handed out and are neither done nor dead.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self.unfinished = 0
        self._fresh = iter(shards)
        self._again: deque[Task] = deque()
        self._cases: dict[int, _Case] = {}

    def next(self) -> Task | None:
        """Return a task for a worker that is free; `None` where there is none now.

        That is the end if nothing is unfinished; else a worker that dies may bring one back.
        """
        task = self._again.popleft() if self._again else None
        if task is None:
            shard = next(self._fresh, None)
            task = None if shard is None else Task(shard)
        self.unfinished += task is not None
        return task

    def ahead(self, task: Task) -> Task | None:
        """Return a task for a worker that is at another, so that it reads while the model runs; `None` for none.

        Where a worker died before with the task that it is at, it gets nothing beside: if it dies again, it is clear
        with what.
        """
        shard = None if self._again or task.shard.index in self._cases else next(self._fresh, None)
        if shard is None:
            return None
        self.unfinished += 1
        return Task(shard)

    def done(self, task: Task) -> None:
        """Take note that a worker did a task."""
        self.unfinished -= 1
        if task.probe is None:
            self._cases.pop(task.shard.index, None)
        else:
            self._close(task)

    def lost(self, task: Task) -> None:
        """Take note that a worker went for a reason that is not the task's, such as a machine that was taken away."""
        self.unfinished -= 1
        self._again.appendleft(task)

    def died(self, task: Task, how: str) -> None:
        """Take note that a worker died with a task.

        Args:
            task: What it was at.
            how: How it ended, such as "killed by signal 11".

        Raises:
            ScoringError: Workers die with this shard, and no row is the cause.
        """
        self.unfinished -= 1
        case = self._cases.setdefault(task.shard.index, _Case())
        if task.probe is None:
            case.deaths += 1
            if case.deaths < MOST_DEATHS:
                self._again.appendleft(task)
            elif case.searched and not case.found:
                raise ScoringError(
                    f"shard {task.shard.index}: its workers die ({how}), but none of its rows alone kills one; look at "
                    "memory and at the workers' logs, then run again: shards that are done are kept"
                )
            else:
                case.found = False
                self._suspect(task.shard, range(task.shard.rows), case)
        elif len(task.probe) > 1:
            self._suspect(task.shard, task.probe, case)
            self._close(task)
        elif task.probe.start not in case.alone:  # by chance it may be there when a worker is killed for another reason
            case.alone.add(task.probe.start)
            self._again.append(task)
        else:
            case.blamed[task.probe.start] = RowError("crashed", _CRASHED)
            case.found = True
            if len(case.blamed) > MOST_CULPRITS:
                raise ScoringError(
                    f"shard {task.shard.index}: more than {MOST_CULPRITS} of its rows each kill a worker ({how}), so "
                    "it is hardly the rows; look at memory and at the workers' logs, then run again"
                )
            self._close(task)

    def _suspect(self, shard: Shard, rows: range, case: _Case) -> None:
        """Probe both halves of some rows."""
        middle = (rows.start + rows.stop + 1) // 2
        for half in (range(rows.start, middle), range(middle, rows.stop)):
            if half:
                case.probes += 1
                self._again.append(Task(shard, dict(case.blamed), half))

    def _close(self, task: Task) -> None:
        """End a probe; after the last one of a shard, redo it without its culprits."""
        case = self._cases[task.shard.index]
        case.probes -= 1
        if case.probes == 0:
            case.searched = True
            case.deaths = MOST_DEATHS - 1 if case.found else 0
            self._again.appendleft(Task(task.shard, dict(case.blamed)))


@dataclass(slots=True)
class _Case:
    """What is known of a shard whose workers died."""

    deaths: int = 0
    probes: int = 0
    searched: bool = False
    found: bool = False
    alone: set[int] = field(default_factory=set)
    blamed: dict[int, RowError] = field(default_factory=dict)
