"""Choose the shard that a worker takes next, and retry shards whose worker died. Pure: no processes, no clock.

A shard whose worker died is done again, on another worker where there is one, and its pictures are opened one after the
other: several at a time may have taken too much memory. Once that has happened three times, its rows are probed by
halves (computed, nothing written): each half that ends a worker is halved again, and a row that does so alone, twice,
is excluded. Then the shard is done again without its excluded rows, which become rows with an error.
A worker that hung counts as one that died; the row that it was preparing is probed alone, before any halves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from qwen_vl_classifier.errors import ScoringError
from qwen_vl_classifier.scoring.jobs import RowError, Shard, Task

MOST_DEATHS = 3
"""So many workers may die with a shard before its rows are probed."""

MOST_CRASHING_ROWS = 16
"""In one shard; where more rows end their workers, it is not the rows."""

# Not how: it is to be the same in every run.
_CRASHED = RowError("crashed", "this row crashes the process that scores it")
_HUNG = RowError("timed_out", "the process that scores this row hangs")


class Schedule:
    """Hand out shards to workers until all are done.

    Args:
        shards: Those that are to be done; read lazily.

    Attributes:
        unfinished: Number of tasks that were handed out and are neither done nor lost.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self.unfinished = 0
        self._fresh = iter(shards)
        self._again: deque[Task] = deque()
        self._histories: dict[int, _History] = {}

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
        shard = None if self._again or task.shard.index in self._histories else next(self._fresh, None)
        if shard is None:
            return None
        self.unfinished += 1
        return Task(shard)

    def done(self, task: Task) -> None:
        """Record that a worker did a task."""
        self.unfinished -= 1
        if task.probe is None:
            self._histories.pop(task.shard.index, None)
        else:
            self._end_probe(task)

    def lost(self, task: Task) -> None:
        """Record that a worker ended for a reason that is not the task's, such as a machine that was taken away."""
        self.unfinished -= 1
        self._again.appendleft(task)

    def died(self, task: Task, how: str, *, hung: bool = False, suspect: int | None = None) -> None:
        """Record that a worker died with a task.

        Args:
            task: What it was at.
            how: How it ended, such as "killed by signal 11".
            hung: Whether it was ended because it hung.
            suspect: Position in the shard of the row at which it hung, if one is known.

        Raises:
            ScoringError: Workers die with this shard, and no row is the cause.
        """
        self.unfinished -= 1
        history = self._histories.setdefault(task.shard.index, _History())
        if task.probe is None:
            history.deaths += 1
            if suspect is not None and suspect not in history.died_alone:
                history.died_alone.add(suspect)  # the first time; alone, it is the second
                history.found = False
                history.probes += 1
                self._again.append(history.task(task.shard, range(suspect, suspect + 1)))
            elif history.deaths < MOST_DEATHS:
                self._again.appendleft(history.task(task.shard))
            elif history.probed and not history.found:
                raise ScoringError(
                    f"shard {task.shard.index}: its workers die ({how}), but no single row crashes one; check "
                    f"memory and the workers' logs, then run again: finished shards are kept"
                )
            else:
                history.found, history.probed = False, True
                self._probe_halves(task.shard, range(task.shard.rows), history)
        elif len(task.probe) > 1:
            self._probe_halves(task.shard, task.probe, history)
            self._end_probe(task)
        elif task.probe.start not in history.died_alone:  # once may be chance: the worker was killed for another reason
            history.died_alone.add(task.probe.start)
            self._again.append(task)
        else:
            history.excluded[task.probe.start] = _HUNG if hung else _CRASHED
            history.found = True
            if len(history.excluded) > MOST_CRASHING_ROWS:
                raise ScoringError(
                    f"shard {task.shard.index}: more than {MOST_CRASHING_ROWS} of its rows each crash a worker "
                    f"({how}), so the rows are probably not the cause; check memory and the workers' logs, then run "
                    f"again"
                )
            self._end_probe(task)

    def _probe_halves(self, shard: Shard, rows: range, history: _History) -> None:
        middle = (rows.start + rows.stop + 1) // 2
        for half in (range(rows.start, middle), range(middle, rows.stop)):
            if half:
                history.probes += 1
                self._again.append(history.task(shard, half))

    def _end_probe(self, task: Task) -> None:
        """Count a probe as over; after the last one of a shard, do the shard again without its excluded rows."""
        history = self._histories[task.shard.index]
        history.probes -= 1
        if history.probes == 0:
            if history.probed or history.found:
                history.deaths = MOST_DEATHS - 1 if history.found else 0
            self._again.appendleft(history.task(task.shard))


@dataclass(slots=True)
class _History:
    """What is known of a shard whose workers died.

    Attributes:
        deaths: Workers that died with the whole shard since its rows were last probed.
        probes: Probes that are not over.
        probed: Whether its rows were probed by halves.
        found: Whether the last series of probes found a row to exclude.
        died_alone: Rows with which a worker died once as the only row of a probe, or at which it hung.
        excluded: Rows that are left out, and why.
    """

    deaths: int = 0
    probes: int = 0
    probed: bool = False
    found: bool = False
    died_alone: set[int] = field(default_factory=set)
    excluded: dict[int, RowError] = field(default_factory=dict)

    def task(self, shard: Shard, probe: range | None = None) -> Task:
        """Return a task for the shard without its excluded rows; its pictures are opened one after the other."""
        return Task(shard, dict(self.excluded), probe, careful=True)
