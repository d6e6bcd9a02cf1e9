"""What callers of a `Batcher` are promised. Time is never measured, except that nothing may hang."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import pytest

from qwen_vl_classifier.errors import (
    ClosedError,
    DeadlineError,
    OutOfMemoryError,
    QueueFullError,
    QwenVLClassifierError,
)
from qwen_vl_classifier.serving.batcher import Batcher, SplitReason
from qwen_vl_classifier.serving.worker import Worker

T = TypeVar("T")

FOREVER = 600.0  # seconds: beyond the limit that `run` sets to every test


def run(work: Coroutine[Any, Any, T], seconds: float = 60) -> T:
    async def limited() -> T:
        async with asyncio.timeout(seconds):
            return await work

    return asyncio.run(limited())


def after(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


def batcher_of(score: Callable[[list[Any]], Any], **options: Any) -> Batcher[Any, Any]:
    return Batcher(score, **{"max_batch": 8, "max_cost": 1e9, "queue_size": 8, **options})


async def submit(batcher: Batcher[Any, Any], item: Any, deadline: float, cost: float = 1.0) -> Any:
    (outcome,) = await batcher.submit_all([item], [cost], deadline)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def submit_all(batcher: Batcher[Any, Any], items: Sequence[Any], deadline: float) -> list[Any]:
    return await batcher.submit_all(items, [1.0] * len(items), deadline)


class Scorer:
    """Squares numbers; raises what it is given; can be held shut."""

    def __init__(self, *, shut: bool = False) -> None:
        self.calls: list[list[Any]] = []
        self.threads: set[int] = set()
        self.running = 0
        self.entered = threading.Event()
        self.gate = threading.Event()
        if not shut:
            self.gate.set()

    def __call__(self, items: Sequence[Any]) -> list[Any]:
        self.running += 1
        assert self.running == 1, "two calls at once"
        self.calls.append(list(items))
        self.threads.add(threading.get_ident())
        self.entered.set()
        self.gate.wait()
        self.running -= 1
        for item in items:
            if isinstance(item, BaseException):
                raise item
        return [item * item for item in items]

    @property
    def seen(self) -> list[Any]:
        return [item for call in self.calls for item in call]


async def settle() -> None:
    """Let all tasks come as far as they can without threads or time: a sleep would be a guess about the machine."""
    for _ in range(50):
        await asyncio.sleep(0)


class Clock:
    """The event loop's clock, which can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0
        loop = asyncio.get_running_loop()
        time = loop.time
        loop.time = lambda: time() + self.ahead  # type: ignore[method-assign]


class Notes:
    """An observer that writes down what it is told, and can be made to fail."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.failures: list[BaseException] = []
        self.depths: list[tuple[int, int]] = []

    def waited(self, seconds: float) -> None:
        if self.failures:
            raise self.failures.pop()

    def scored(self, items: int, cost: float, seconds: float) -> None:
        self.told.append(("scored", items, cost))

    def split(self, reason: SplitReason) -> None:
        self.told.append(("split", reason))

    def cancelled(self, count: int) -> None:
        self.told.append(("cancelled", count))

    def depth(self, waiting: int, running: int) -> None:
        self.depths.append((waiting, running))


async def held(scorer: Scorer, batcher: Batcher[Any, Any]) -> asyncio.Task[Any]:
    """Submit an item that stays in the scorer until its gate opens, so that all later ones wait."""
    task = asyncio.create_task(submit(batcher, 0, after(FOREVER)))
    await asyncio.to_thread(scorer.entered.wait)
    return task


@pytest.fixture
def shut() -> Iterator[Scorer]:
    scorer = Scorer(shut=True)
    yield scorer
    scorer.gate.set()


class TestBatches:
    def test_each_caller_gets_the_result_of_its_own_item(self) -> None:
        scorer = Scorer()

        async def main() -> list[int]:
            batcher = batcher_of(scorer, max_batch=7, queue_size=100)
            results = await asyncio.gather(*(submit(batcher, item, after(FOREVER)) for item in range(100)))
            await batcher.close()
            return list(results)

        assert run(main()) == [item * item for item in range(100)]
        assert scorer.seen == list(range(100))
        assert max(map(len, scorer.calls)) == 7
        assert len(scorer.calls) == 15
        assert len(scorer.threads) == 1
        assert threading.get_ident() not in scorer.threads

    def test_what_gathers_during_a_pass_shares_the_next(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, max_batch=8, queue_size=8)
            first = await held(shut, batcher)
            later = [asyncio.create_task(submit(batcher, item, after(FOREVER))) for item in (1, 2, 3)]
            await asyncio.sleep(0)
            shut.gate.set()
            assert await asyncio.gather(first, *later) == [0, 1, 4, 9]
            await batcher.close()

        run(main())
        assert shut.calls == [[0], [1, 2, 3]]

    def test_a_batch_costs_no_more_than_it_may_and_what_costs_more_is_alone(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, max_cost=10)
            first = await held(shut, batcher)
            later = asyncio.create_task(batcher.submit_all([1, 2, 3, 4, 5, 6], [4, 6, 1, 20, 9, 1], after(FOREVER)))
            await asyncio.sleep(0)
            shut.gate.set()
            await asyncio.gather(first, later)

        run(main())
        assert shut.calls == [[0], [1, 2], [3], [4], [5, 6]]

    def test_batchers_of_one_worker_never_score_at_once_and_choose_when_it_is_their_turn(self, shut: Scorer) -> None:
        async def main() -> None:
            worker = Worker("device")
            one, other = (batcher_of(shut, max_batch=2, worker=worker) for _ in range(2))
            first = await held(shut, one)
            quitter = asyncio.create_task(submit(other, 1, after(FOREVER)))
            await settle()  # the other batcher waits for its turn now
            quitter.cancel()
            rest = [asyncio.create_task(submit(other, item, after(FOREVER))) for item in (2, 3)]
            await settle()
            shut.gate.set()
            await asyncio.gather(first, *rest)
            worker.stop()

        run(main())
        assert shut.calls == [[0], [2, 3]]
        assert len(shut.threads) == 1

    def test_several_items_of_one_caller_keep_their_order(self) -> None:
        async def main() -> list[Any]:
            batcher = batcher_of(Scorer(), max_batch=2, queue_size=8)
            assert await submit_all(batcher, [], after(FOREVER)) == []
            return await submit_all(batcher, [3, 1, 2], after(FOREVER))

        assert run(main()) == [9, 1, 4]


class TestOverload:
    def test_a_full_queue_refuses_and_takes_again_when_there_is_room(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, max_batch=1, queue_size=2)
            first = await held(shut, batcher)
            waiting = [asyncio.create_task(submit(batcher, item, after(FOREVER))) for item in (1, 2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="2 items wait and 1 more came; wanted at most 2") as caught:
                await submit(batcher, 3, after(FOREVER))
            assert caught.value.retry_after >= 1
            assert isinstance(caught.value, QwenVLClassifierError)
            shut.gate.set()
            assert await asyncio.gather(first, *waiting) == [0, 1, 4]
            assert await submit(batcher, 3, after(FOREVER)) == 9

        run(main())

    def test_items_of_one_caller_are_taken_together_or_not_at_all(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, max_batch=1, queue_size=2)
            first = await held(shut, batcher)
            with pytest.raises(QueueFullError):
                await submit_all(batcher, [1, 2, 3], after(FOREVER))
            shut.gate.set()
            assert await first == 0
            assert await submit_all(batcher, [4, 5], after(FOREVER)) == [16, 25]

        run(main())
        assert shut.seen == [0, 4, 5]

    def test_one_who_gives_up_while_waiting_leaves_the_queue(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, max_batch=4, queue_size=2)
            first = await held(shut, batcher)
            quitter = asyncio.create_task(submit_all(batcher, [1, 2], after(FOREVER)))
            await asyncio.sleep(0)
            quitter.cancel()
            await asyncio.gather(quitter, return_exceptions=True)
            assert quitter.cancelled()
            await asyncio.sleep(0)
            others = asyncio.create_task(submit_all(batcher, [3, 4], after(FOREVER)))  # there is room at once
            await asyncio.sleep(0)
            shut.gate.set()
            assert await first == 0
            assert await others == [9, 16]

        run(main())
        assert shut.seen == [0, 3, 4]

    def test_those_sent_away_are_told_how_long_what_waits_will_take(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, max_batch=4, queue_size=4)
            clock = Clock()
            first = asyncio.create_task(submit(batcher, 0, after(FOREVER), cost=100))
            await asyncio.to_thread(shut.entered.wait)
            clock.ahead += 20  # a fifth of a second for each unit
            shut.gate.set()
            await first
            shut.gate.clear()
            shut.entered.clear()
            first = asyncio.create_task(submit(batcher, 0, after(FOREVER), cost=10))
            await asyncio.to_thread(shut.entered.wait)
            waiting = asyncio.create_task(batcher.submit_all([1, 2, 3, 4], [10, 10, 10, 10], after(FOREVER)))
            await settle()
            with pytest.raises(QueueFullError) as caught:
                await submit(batcher, 5, after(FOREVER))
            assert caught.value.retry_after in (10, 11)  # time goes on while the test runs
            shut.gate.set()
            await asyncio.gather(first, waiting)

        run(main())

    def test_what_would_hardly_be_done_in_time_is_sent_away_unless_it_is_alone(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, queue_size=100)
            clock = Clock()
            first = await held(shut, batcher)
            clock.ahead += 10  # ten seconds for each unit
            shut.gate.set()
            await first
            shut.gate.clear()
            shut.entered.clear()
            alone = asyncio.create_task(submit(batcher, 1, after(35), cost=100))
            await asyncio.to_thread(shut.entered.wait)
            with pytest.raises(QueueFullError, match="1 items came that would hardly be scored in 35 s") as caught:
                await submit(batcher, 2, after(35))
            assert caught.value.retry_after >= 100
            patient = asyncio.create_task(submit(batcher, 3, after(2000)))
            await settle()
            shut.gate.set()
            assert await asyncio.gather(alone, patient) == [1, 9]

        run(main())
        assert shut.seen == [0, 1, 3]


class TestDeadlines:
    def test_an_item_that_waits_too_long_is_never_scored(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, max_batch=4, queue_size=4)
            first = await held(shut, batcher)
            with pytest.raises(DeadlineError, match="deadline"):
                await submit(batcher, 1, after(0.02))
            with pytest.raises(TimeoutError):
                await submit(batcher, 2, after(-1))
            shut.gate.set()
            assert await first == 0
            assert await submit(batcher, 3, after(FOREVER)) == 9

        run(main())
        assert shut.seen == [0, 3]

    def test_an_item_that_comes_too_late_is_never_scored(self) -> None:
        scorer = Scorer()

        async def main() -> None:
            batcher = batcher_of(scorer, max_batch=4, queue_size=4)
            with pytest.raises(DeadlineError):
                await submit(batcher, 1, after(-1))
            assert await submit(batcher, 2, after(FOREVER)) == 4

        run(main())
        assert scorer.seen == [2]

    def test_a_pass_that_hangs_holds_no_caller(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, max_batch=2, queue_size=4)
            outcomes = await asyncio.gather(
                *(submit(batcher, item, after(0.05)) for item in range(4)), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [DeadlineError] * 4
            await batcher.close()  # nobody waits any more, so it does not wait for the pass either

        run(main())
        assert len(shut.calls) <= 1


class TestFailures:
    @pytest.mark.parametrize("culprit", range(8))
    def test_only_the_culprit_fails(self, culprit: int) -> None:
        scorer = Scorer()
        items: list[Any] = list(range(8))
        items[culprit] = ValueError("the culprit")

        async def main() -> list[Any]:
            return await submit_all(batcher_of(scorer, max_batch=8, queue_size=8), items, after(FOREVER))

        outcomes = run(main())
        assert outcomes.pop(culprit) is items.pop(culprit)
        assert outcomes == [item * item for item in items]
        assert len(scorer.calls) == 1 + 2 * 3  # the batch, then two halves at each of three levels

    def test_one_who_has_gone_is_not_scored_again(self, shut: Scorer) -> None:
        culprit = ValueError("the culprit")

        async def main() -> None:
            batcher = batcher_of(shut, max_batch=2, queue_size=2)
            quitter = asyncio.create_task(submit(batcher, 1, after(FOREVER)))
            failing = asyncio.create_task(submit(batcher, culprit, after(FOREVER)))
            await asyncio.to_thread(shut.entered.wait)
            quitter.cancel()
            await asyncio.gather(quitter, return_exceptions=True)
            shut.gate.set()
            with pytest.raises(ValueError, match="the culprit"):
                await failing

        run(main())
        assert shut.calls == [[1, culprit], [culprit]]

    def test_a_neighbour_in_another_call_is_not_told(self) -> None:
        async def main() -> list[Any]:
            batcher = batcher_of(Scorer(), max_batch=8, queue_size=8)
            return await asyncio.gather(
                *(submit(batcher, item, after(FOREVER)) for item in (2, KeyError("mine"), 3)), return_exceptions=True
            )

        first, second, third = run(main())
        assert (first, third) == (4, 9)
        assert isinstance(second, KeyError)

    def test_if_all_fail_all_are_told(self) -> None:
        def broken(items: Sequence[int]) -> list[int]:
            raise RuntimeError(f"broken for {list(items)}")

        async def main() -> tuple[list[int | BaseException], list[int | BaseException]]:
            batcher = batcher_of(broken, max_batch=5, queue_size=5)
            return (
                await submit_all(batcher, range(5), after(FOREVER)),
                await submit_all(batcher, [7], after(FOREVER)),
            )

        first, second = run(main())
        assert [str(outcome) for outcome in first] == [f"broken for [{item}]" for item in range(5)]
        assert [str(outcome) for outcome in second] == ["broken for [7]"]

    @pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
    def test_what_futures_and_threads_cannot_bear_becomes_an_error(self, error: type[BaseException]) -> None:
        async def main() -> list[Any]:
            batcher = batcher_of(Scorer(), max_batch=2, queue_size=2)
            outcomes = await submit_all(batcher, [error(), 5], after(FOREVER))
            return [*outcomes, await submit(batcher, 6, after(FOREVER))]

        failure, five, six = run(main())
        assert isinstance(failure, RuntimeError)
        assert error.__name__ in str(failure)
        assert isinstance(failure.__cause__, error)
        assert (five, six) == (25, 36)

    @pytest.mark.parametrize("score", [lambda items: [], lambda items: None, lambda items: [*items, 1]])
    def test_a_wrong_number_of_results_is_an_error(self, score: Callable[[Sequence[int]], Any]) -> None:
        async def main() -> list[Any]:
            return await submit_all(batcher_of(score, max_batch=2, queue_size=2), [1, 2], after(FOREVER))

        assert [type(outcome).__bases__[0] for outcome in run(main())] == [Exception, Exception]

    def test_what_score_raises_reaches_a_single_caller(self) -> None:
        async def main() -> None:
            await submit(batcher_of(Scorer(), max_batch=1, queue_size=1), ZeroDivisionError("mine"), after(FOREVER))

        with pytest.raises(ZeroDivisionError, match="mine"):
            run(main())

    def test_the_observer_is_told_what_happened(self, shut: Scorer) -> None:
        notes = Notes()

        async def main() -> None:
            batcher = batcher_of(shut, max_batch=4, observer=notes)
            first = await held(shut, batcher)
            quitter = asyncio.create_task(submit_all(batcher, [1, 2, 3], after(FOREVER)))
            rest = asyncio.create_task(
                batcher.submit_all([4, ValueError("bad"), 5, OutOfMemoryError("large")], [1, 2, 3, 4], after(FOREVER))
            )
            await settle()
            quitter.cancel()
            await settle()
            shut.gate.set()
            await asyncio.gather(first, rest)
            await batcher.close()

        run(main())
        assert notes.told == [
            ("cancelled", 3),
            ("scored", 1, 1.0),
            ("split", "exception"),
            ("split", "exception"),
            ("scored", 1, 1.0),
            ("split", "out_of_memory"),
            ("scored", 1, 3.0),
        ]
        assert (7, 1) in notes.depths
        assert notes.depths[-1] == (0, 0)


class TestRecovery:
    @pytest.mark.parametrize("error", [RuntimeError, OutOfMemoryError])
    def test_the_pass_after_a_failed_one_is_as_good_as_any(self, error: type[Exception]) -> None:
        """A hundred times a whole pass fails, whatever is in it, and the next comes at once."""
        failing = False

        def score(items: list[int]) -> list[int]:
            if failing:
                raise error("injected")
            return [-item for item in items]

        async def main() -> None:
            nonlocal failing
            batcher = batcher_of(score)
            for number in range(100):
                failing = True
                outcomes = await submit_all(batcher, range(8), after(FOREVER))
                assert [type(outcome) for outcome in outcomes] == [error] * 8
                failing = False
                assert await submit(batcher, number, after(FOREVER)) == -number
                assert batcher.heartbeat == 0
            await batcher.close()

        run(main())

    def test_one_poison_in_each_of_five_hundred_batches_fails_alone(self) -> None:
        batches = 500
        scorer = Scorer()
        rng = random.Random(0)

        async def main() -> int:
            batcher = batcher_of(scorer, queue_size=8 * batches)
            items: list[Any] = []
            for number in range(batches):
                batch: list[Any] = [8 * number + place for place in range(8)]
                batch[rng.randrange(8)] = ValueError("poison")
                items += batch
            outcomes = await asyncio.gather(
                *(submit(batcher, item, after(FOREVER)) for item in items), return_exceptions=True
            )
            for item, outcome in zip(items, outcomes, strict=True):
                assert outcome is item if isinstance(item, ValueError) else outcome == item * item
            return sum(isinstance(outcome, ValueError) for outcome in outcomes)

        assert run(main()) == batches
        assert len(scorer.calls) == batches * (1 + 2 * 3)  # the batch, then two halves at each of three levels

    def test_none_of_a_thousand_who_left_while_waiting_is_scored(self, shut: Scorer) -> None:
        callers = 1000
        notes = Notes()

        async def main() -> None:
            batcher = batcher_of(shut, queue_size=2 * callers, observer=notes)
            first = await held(shut, batcher)
            tasks = [asyncio.create_task(submit(batcher, item, after(FOREVER))) for item in range(1, 2 * callers + 1)]
            await settle()
            for task in tasks[::2]:
                task.cancel()
            shut.gate.set()
            await first
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
            assert outcomes[1::2] == [item * item for item in range(2, 2 * callers + 1, 2)]
            assert batcher.waiting == 0

        run(main())
        assert shut.seen == [0, *range(2, 2 * callers + 1, 2)]
        assert notes.told.count(("cancelled", 1)) == callers


class TestHeartbeat:
    def test_it_stops_while_a_pass_hangs_and_goes_on_with_it(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut)
            assert batcher.heartbeat == 0
            clock = Clock()
            first = asyncio.create_task(submit(batcher, 1, after(20)))
            await asyncio.to_thread(shut.entered.wait)
            assert batcher.heartbeat == 0, "its caller still waits"
            clock.ahead += 30
            with pytest.raises(DeadlineError):
                await first
            assert 10 <= batcher.heartbeat < 20
            clock.ahead += 20
            assert batcher.heartbeat >= 30
            shut.gate.set()
            assert await submit(batcher, 3, after(FOREVER)) == 9
            assert batcher.heartbeat == 0

        run(main())


class TestDeath:
    """The loop itself fails: what should never happen."""

    def test_it_goes_on_with_what_waits(self, shut: Scorer, caplog: pytest.LogCaptureFixture) -> None:
        notes = Notes()
        failure = RuntimeError("a defect")

        async def main() -> list[Any]:
            batcher = batcher_of(shut, max_batch=2, observer=notes)
            first = await held(shut, batcher)
            rest = [asyncio.create_task(submit(batcher, item, after(FOREVER))) for item in (1, 2, 3, 4)]
            await settle()
            notes.failures.append(failure)
            shut.gate.set()
            outcomes = await asyncio.gather(first, *rest, return_exceptions=True)
            assert batcher.heartbeat == 0
            await batcher.close()
            return outcomes

        assert run(main()) == [0, failure, 4, 9, 16]
        assert "a defect" in caplog.text
        assert notes.depths[-1] == (0, 0)

    def test_the_third_time_within_a_minute_is_the_end(self, caplog: pytest.LogCaptureFixture) -> None:
        notes = Notes()
        deaths: list[BaseException] = []

        async def main() -> None:
            clock = Clock()
            batcher = batcher_of(Scorer(), observer=notes, on_death=deaths.append)
            for _ in range(6):
                clock.ahead += 40  # two within a minute can be borne
                notes.failures.append(RuntimeError("a defect"))
                with pytest.raises(RuntimeError, match="a defect"):
                    await submit(batcher, 1, after(FOREVER))
                assert await submit(batcher, 2, after(FOREVER)) == 4
            assert deaths == []
            clock.ahead += 40
            for _ in range(2):
                notes.failures.append(RuntimeError("a defect"))
                with pytest.raises(RuntimeError, match="a defect"):
                    await submit(batcher, 1, after(FOREVER))
            assert list(map(str, deaths)) == ["a defect"]
            with pytest.raises(ClosedError):
                await submit(batcher, 3, after(FOREVER))
            await batcher.close()

        run(main(), seconds=600)


class TestClosing:
    def test_what_was_accepted_is_finished_and_nothing_more_is_taken(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, max_batch=1, queue_size=4)
            first = await held(shut, batcher)
            waiting = [asyncio.create_task(submit(batcher, item, after(FOREVER))) for item in (1, 2, 3)]
            await asyncio.sleep(0)
            closing = asyncio.create_task(batcher.close())
            await asyncio.sleep(0)
            with pytest.raises(ClosedError):
                await submit(batcher, 4, after(FOREVER))
            assert not closing.done()
            shut.gate.set()
            await closing
            assert await asyncio.gather(first, *waiting) == [0, 1, 4, 9]
            await batcher.close()  # once more does no harm

        run(main())

    def test_closing_one_that_was_never_used(self) -> None:
        run(batcher_of(Scorer(), max_batch=1, queue_size=1).close())

    def test_cutting_the_closing_short_tells_every_caller(self, shut: Scorer) -> None:
        async def main() -> list[Any]:
            batcher = batcher_of(shut, max_batch=1, queue_size=4)
            first = await held(shut, batcher)
            second = asyncio.create_task(submit(batcher, 1, after(FOREVER)))
            await asyncio.sleep(0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(batcher.close(), timeout=0.02)
            return list(await asyncio.gather(first, second, return_exceptions=True))

        assert [type(outcome) for outcome in run(main())] == [ClosedError, ClosedError]

    @pytest.mark.parametrize("closes", [True, False])
    def test_the_thread_ends_with_the_batcher_or_with_the_event_loop(self, closes: bool) -> None:
        threads: list[threading.Thread] = []

        def score(items: Sequence[int]) -> Sequence[int]:
            threads.append(threading.current_thread())
            return items

        async def main() -> None:
            batcher = batcher_of(score, max_batch=1, queue_size=1)
            await submit(batcher, 1, after(FOREVER))
            if closes:
                await batcher.close()

        run(main())
        threads[0].join(timeout=10)
        assert not threads[0].is_alive()

    def test_a_pass_that_never_returns_does_not_keep_the_process(self) -> None:
        program = """
import asyncio, sys, threading
from qwen_vl_classifier.errors import DeadlineError
from qwen_vl_classifier.serving.batcher import Batcher

def hang(items):
    threading.Event().wait()

async def main():
    batcher = Batcher(hang, max_batch=1, max_cost=1, queue_size=1)
    try:
        await batcher.submit_all([1], [1], asyncio.get_running_loop().time() + 0.05)
    except DeadlineError:
        print("told")
    await batcher.close()

asyncio.run(main())
print(sorted({"torch", "fastapi", "transformers", "pydantic"} & sys.modules.keys()))
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "told\n[]\n", "")
