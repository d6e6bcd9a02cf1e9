"""Show how far a run is, and estimate how long one would take: rows, rows a second, errors."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from qwen_vl_classifier.progress_bars import tqdm
from qwen_vl_classifier.scoring.jobs import ShardReport, Task
from qwen_vl_classifier.scoring.plan import Plan
from qwen_vl_classifier.scoring.shards import ShardFolder
from qwen_vl_classifier.scoring.workers import ScoreWorker

_DELAY = 2  # seconds
_SAMPLED_SHARDS = 4
_SAMPLED_ROWS = 64  # of each of them


class Progress:
    """Count what is done, and show it on standard error if it takes more than two seconds.

    Args:
        rows: In the data.
        rows_there: Those of them that an earlier run has scored.
        errors_there: Those of these that have an error.
        show: Whether to show anything.
        work: What is done, for the bar.

    Attributes:
        shards: Shards done by this run.
        rows: Rows done by this run or an earlier one.
        errors: Those of them that have an error.
    """

    def __init__(self, rows: int, *, rows_there: int, errors_there: int, show: bool, work: str = "score") -> None:
        self.shards = 0
        self.rows = rows_there
        self.errors = errors_there
        self._begun = False
        self._total = rows
        self._bar = tqdm(total=rows, initial=rows_there, desc=work, unit="row", delay=_DELAY, disable=not show)
        self._tell()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def add(self, report: ShardReport) -> None:
        """Count a shard."""
        if not self._begun and not self._bar.disable:
            # The time that the first shard took begins here, not when models began to load.
            self._bar.unpause()
            self._bar.start_t -= report.seconds
            self._bar.last_print_t -= report.seconds
        self._begun = True
        self.shards += 1
        self.rows += report.rows
        self.errors += report.errors
        self._tell()
        self._bar.update(self.rows - self._bar.n)

    def show_rows(self, rows: int) -> None:
        """Show how many rows are done in the shards in work; they count once their shard is added."""
        if self._bar.disable or not rows:
            return
        if not self._begun:  # as in `add`: the speed is that of the rows after these, when all models are loaded
            self._begun = True
            self._bar.unpause()
            self._bar.n = self._bar.initial = self._bar.last_print_n = min(self.rows + rows, self._total)
        self._bar.update(min(self.rows + rows, self._total) - self._bar.n)

    def _tell(self) -> None:
        self._bar.set_postfix({"errors": self.errors}, refresh=False)


def estimate(worker: ScoreWorker, folder: ShardFolder, plan: Plan, *, workers: int) -> dict[str, Any]:
    """Score the first rows of a few shards, spread over the data, and estimate from these.

    Args:
        worker: What scores.
        folder: Where the scores would go; it need not be there.
        plan: All shards.
        workers: How many there would be, each as fast as `worker`.

    Returns:
        `rows` and `shards` in the data, `shards_there` already, `workers`, `seconds` that the rest would take, `bytes`
        of all shards together, `errors` as a share of the rows sampled, and `rows_sampled`.
    """
    found = folder.survey(plan if folder.is_about_this() else [])
    empty = folder.size_of([])
    chosen = range(0, len(plan), max(1, len(plan) // _SAMPLED_SHARDS))[:_SAMPLED_SHARDS]
    worker.probe(Task(plan[0], probe=range(1)))  # loads the model, whose first pass is slow
    rows = size = errors = 0
    seconds = 0.0
    for shard in (plan[index] for index in chosen):
        started = time.perf_counter()
        scored = worker.probe(Task(shard, probe=range(min(shard.rows, _SAMPLED_ROWS))))
        seconds += time.perf_counter() - started
        rows += len(scored)
        size += folder.size_of(scored) - empty
        errors += sum(row.error is not None for row in scored)
    return {
        "rows": plan.rows,
        "shards": len(plan),
        "shards_there": sum(found.there),
        "workers": workers,
        "seconds": (plan.rows - found.rows) * seconds / rows / workers,
        "bytes": round(len(plan) * empty + plan.rows * size / rows),
        "errors": errors / rows,
        "rows_sampled": rows,
    }
