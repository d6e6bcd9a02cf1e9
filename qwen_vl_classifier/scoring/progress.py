"""How far a run of scoring is: rows, rows a second, time to go, errors."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm

from qwen_vl_classifier.scoring.scorer import ShardReport

_DELAY = 2  # seconds


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
        if not self.shards and not self._bar.disable:
            # The time that the first shard took begins here, not when models began to load.
            self._bar.unpause()
            self._bar.start_t -= report.seconds_scoring
            self._bar.last_print_t -= report.seconds_scoring
        self.shards += 1
        self.rows += report.rows
        self.errors += report.errors
        self._tell()
        self._bar.update(report.rows)

    def _tell(self) -> None:
        self._bar.set_postfix({"errors": self.errors}, refresh=False)
