"""What callers of a `Batcher` are promised. Time is never measured, except that nothing may hang."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import pytest

from qwen_vl_classifier.errors import ClosedError, DeadlineError, QueueFullError, QwenVLClassifierError
from qwen_vl_classifier.serving.batcher import Batcher

T = TypeVar("T")

FOREVER = 600.0  # seconds: beyond the limit that `run` sets to every test


def run(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(limited())


def after(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


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


async def held(scorer: Scorer, batcher: Batcher[Any, Any]) -> asyncio.Task[Any]:
    """Submit an item that stays in the scorer until its gate opens, so that all later ones wait."""
    task = asyncio.create_task(batcher.submit(0, after(FOREVER)))
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
            batcher = Batcher(scorer, max_batch=7, queue_size=100)
            results = await asyncio.gather(*(batcher.submit(item, after(FOREVER)) for item in range(100)))
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
            batcher = Batcher(shut, max_batch=8, queue_size=8)
            first = await held(shut, batcher)
            later = [asyncio.create_task(batcher.submit(item, after(FOREVER))) for item in (1, 2, 3)]
            await asyncio.sleep(0)
            shut.gate.set()
            assert await asyncio.gather(first, *later) == [0, 1, 4, 9]
            await batcher.close()

        run(main())
        assert shut.calls == [[0], [1, 2, 3]]

    def test_several_items_of_one_caller_keep_their_order(self) -> None:
        async def main() -> list[Any]:
            batcher = Batcher(Scorer(), max_batch=2, queue_size=8)
            assert await batcher.submit_all([], after(FOREVER)) == []
            return await batcher.submit_all([3, 1, 2], after(FOREVER))

        assert run(main()) == [9, 1, 4]


class TestOverload:
    def test_a_full_queue_refuses_and_takes_again_when_there_is_room(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = Batcher(shut, max_batch=1, queue_size=2)
            first = await held(shut, batcher)
            waiting = [asyncio.create_task(batcher.submit(item, after(FOREVER))) for item in (1, 2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="2 items wait and 1 more came; wanted at most 2") as caught:
                await batcher.submit(3, after(FOREVER))
            assert caught.value.retry_after >= 1
            assert isinstance(caught.value, QwenVLClassifierError)
            shut.gate.set()
            assert await asyncio.gather(first, *waiting) == [0, 1, 4]
            assert await batcher.submit(3, after(FOREVER)) == 9

        run(main())

    def test_items_of_one_caller_are_taken_together_or_not_at_all(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = Batcher(shut, max_batch=1, queue_size=2)
            first = await held(shut, batcher)
            with pytest.raises(QueueFullError):
                await batcher.submit_all([1, 2, 3], after(FOREVER))
            shut.gate.set()
            assert await first == 0
            assert await batcher.submit_all([4, 5], after(FOREVER)) == [16, 25]

        run(main())
        assert shut.seen == [0, 4, 5]

    def test_one_who_gives_up_while_waiting_leaves_the_queue(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = Batcher(shut, max_batch=4, queue_size=2)
            first = await held(shut, batcher)
            quitter = asyncio.create_task(batcher.submit_all([1, 2], after(FOREVER)))
            await asyncio.sleep(0)
            quitter.cancel()
            await asyncio.gather(quitter, return_exceptions=True)
            assert quitter.cancelled()
            await asyncio.sleep(0)
            others = asyncio.create_task(batcher.submit_all([3, 4], after(FOREVER)))  # there is room at once
            await asyncio.sleep(0)
            shut.gate.set()
            assert await first == 0
            assert await others == [9, 16]

        run(main())
        assert shut.seen == [0, 3, 4]


class TestDeadlines:
    def test_an_item_that_waits_too_long_is_never_scored(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = Batcher(shut, max_batch=4, queue_size=4)
            first = await held(shut, batcher)
            with pytest.raises(DeadlineError, match="deadline"):
                await batcher.submit(1, after(0.02))
            with pytest.raises(TimeoutError):
                await batcher.submit(2, after(-1))
            shut.gate.set()
            assert await first == 0
            assert await batcher.submit(3, after(FOREVER)) == 9

        run(main())
        assert shut.seen == [0, 3]

    def test_an_item_that_comes_too_late_is_never_scored(self) -> None:
        scorer = Scorer()

        async def main() -> None:
            batcher = Batcher(scorer, max_batch=4, queue_size=4)
            with pytest.raises(DeadlineError):
                await batcher.submit(1, after(-1))
            assert await batcher.submit(2, after(FOREVER)) == 4

        run(main())
        assert scorer.seen == [2]

    def test_a_pass_that_hangs_holds_no_caller(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = Batcher(shut, max_batch=2, queue_size=4)
            outcomes = await asyncio.gather(
                *(batcher.submit(item, after(0.05)) for item in range(4)), return_exceptions=True
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
            return await Batcher(scorer, max_batch=8, queue_size=8).submit_all(items, after(FOREVER))

        outcomes = run(main())
        assert outcomes.pop(culprit) is items.pop(culprit)
        assert outcomes == [item * item for item in items]
        assert len(scorer.calls) == 1 + 2 * 3  # the batch, then two halves at each of three levels

    def test_one_who_has_gone_is_not_scored_again(self, shut: Scorer) -> None:
        culprit = ValueError("the culprit")

        async def main() -> None:
            batcher = Batcher(shut, max_batch=2, queue_size=2)
            quitter = asyncio.create_task(batcher.submit(1, after(FOREVER)))
            failing = asyncio.create_task(batcher.submit(culprit, after(FOREVER)))
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
            batcher = Batcher(Scorer(), max_batch=8, queue_size=8)
            return await asyncio.gather(
                *(batcher.submit(item, after(FOREVER)) for item in (2, KeyError("mine"), 3)), return_exceptions=True
            )

        first, second, third = run(main())
        assert (first, third) == (4, 9)
        assert isinstance(second, KeyError)

    def test_if_all_fail_all_are_told(self) -> None:
        def broken(items: Sequence[int]) -> list[int]:
            raise RuntimeError(f"broken for {list(items)}")

        async def main() -> tuple[list[int | BaseException], list[int | BaseException]]:
            batcher = Batcher(broken, max_batch=5, queue_size=5)
            return (
                await batcher.submit_all(range(5), after(FOREVER)),
                await batcher.submit_all([7], after(FOREVER)),
            )

        first, second = run(main())
        assert [str(outcome) for outcome in first] == [f"broken for [{item}]" for item in range(5)]
        assert [str(outcome) for outcome in second] == ["broken for [7]"]

    @pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
    def test_what_futures_and_threads_cannot_bear_becomes_an_error(self, error: type[BaseException]) -> None:
        async def main() -> list[Any]:
            batcher = Batcher(Scorer(), max_batch=2, queue_size=2)
            outcomes = await batcher.submit_all([error(), 5], after(FOREVER))
            return [*outcomes, await batcher.submit(6, after(FOREVER))]

        failure, five, six = run(main())
        assert isinstance(failure, RuntimeError)
        assert error.__name__ in str(failure)
        assert isinstance(failure.__cause__, error)
        assert (five, six) == (25, 36)

    @pytest.mark.parametrize("score", [lambda items: [], lambda items: None, lambda items: [*items, 1]])
    def test_a_wrong_number_of_results_is_an_error(self, score: Callable[[Sequence[int]], Any]) -> None:
        async def main() -> list[Any]:
            return await Batcher(score, max_batch=2, queue_size=2).submit_all([1, 2], after(FOREVER))

        assert [type(outcome).__bases__[0] for outcome in run(main())] == [Exception, Exception]

    def test_what_score_raises_reaches_a_single_caller(self) -> None:
        async def main() -> None:
            await Batcher(Scorer(), max_batch=1, queue_size=1).submit(ZeroDivisionError("mine"), after(FOREVER))

        with pytest.raises(ZeroDivisionError, match="mine"):
            run(main())


class TestClosing:
    def test_what_was_accepted_is_finished_and_nothing_more_is_taken(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = Batcher(shut, max_batch=1, queue_size=4)
            first = await held(shut, batcher)
            waiting = [asyncio.create_task(batcher.submit(item, after(FOREVER))) for item in (1, 2, 3)]
            await asyncio.sleep(0)
            closing = asyncio.create_task(batcher.close())
            await asyncio.sleep(0)
            with pytest.raises(ClosedError):
                await batcher.submit(4, after(FOREVER))
            assert not closing.done()
            shut.gate.set()
            await closing
            assert await asyncio.gather(first, *waiting) == [0, 1, 4, 9]
            await batcher.close()  # once more does no harm

        run(main())

    def test_closing_one_that_was_never_used(self) -> None:
        run(Batcher(Scorer(), max_batch=1, queue_size=1).close())

    def test_cutting_the_closing_short_tells_every_caller(self, shut: Scorer) -> None:
        async def main() -> list[Any]:
            batcher = Batcher(shut, max_batch=1, queue_size=4)
            first = await held(shut, batcher)
            second = asyncio.create_task(batcher.submit(1, after(FOREVER)))
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
            batcher = Batcher(score, max_batch=1, queue_size=1)
            await batcher.submit(1, after(FOREVER))
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
    batcher = Batcher(hang, max_batch=1, queue_size=1)
    try:
        await batcher.submit(1, asyncio.get_running_loop().time() + 0.05)
    except DeadlineError:
        print("told")
    await batcher.close()

asyncio.run(main())
print(sorted({"torch", "fastapi", "transformers", "pydantic"} & sys.modules.keys()))
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "told\n[]\n", "")
