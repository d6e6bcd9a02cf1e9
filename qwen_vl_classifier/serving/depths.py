"""One observer of several batchers, told how deep their queues are together."""

from __future__ import annotations

from qwen_vl_classifier.serving.batcher import BatchObserver, SplitReason


class Depths:
    """How many items wait and run in each of several batchers.

    Args:
        observer: Told of all that happens in any of them, and how many items wait and run in all.
    """

    def __init__(self, observer: BatchObserver) -> None:
        self._observer = observer
        self._depths: dict[int, tuple[int, int]] = {}

    def of_another(self) -> BatchObserver:
        """Return an observer for one more batcher."""
        number = len(self._depths)
        self._depths[number] = (0, 0)
        return _OneOfSeveral(self, number)

    def tell(self, number: int, waiting: int, running: int) -> None:
        """Take in the depth of one batcher, and tell that of all."""
        self._depths[number] = (waiting, running)
        self._observer.depth(
            sum(waiting for waiting, _ in self._depths.values()), sum(running for _, running in self._depths.values())
        )

    @property
    def observer(self) -> BatchObserver:
        """Whom to tell everything else."""
        return self._observer


class _OneOfSeveral:
    def __init__(self, depths: Depths, number: int) -> None:
        self._depths = depths
        self._number = number

    def waited(self, seconds: float) -> None:
        self._depths.observer.waited(seconds)

    def scored(self, items: int, cost: int, seconds: float) -> None:
        self._depths.observer.scored(items, cost, seconds)

    def split(self, reason: SplitReason) -> None:
        self._depths.observer.split(reason)

    def cancelled(self, count: int) -> None:
        self._depths.observer.cancelled(count)

    def depth(self, waiting: int, running: int) -> None:
        self._depths.tell(self._number, waiting, running)
