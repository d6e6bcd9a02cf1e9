"""What callers of a `Batcher` are promised where `score`, or the batcher itself, fails."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qwen_vl_classifier.errors import (
    OutOfMemoryError,
)
from tests.serving.batch_scorer import BatcherOf, Notes, Scorer, held, settle
from tests.serving.clock import FOREVER, after
from tests.waiting import run


class TestFailures:
    @pytest.mark.parametrize("culprit", range(8))
    def test_only_the_culprit_fails(self, culprit: int) -> None:
        scorer = Scorer()
        items: list[Any] = list(range(8))
        items[culprit] = ValueError("the culprit")

        async def main() -> list[Any]:
            return await BatcherOf(scorer, max_batch=8).submit_all(items, after(FOREVER))

        outcomes = run(main())
        assert outcomes.pop(culprit) is items.pop(culprit)
        assert outcomes == [item * item for item in items]
        assert len(scorer.calls) == 1 + 2 * 3  # the batch, then two halves at each of three levels

    def test_one_who_has_gone_is_not_scored_again(self, shut: Scorer) -> None:
        culprit = ValueError("the culprit")

        async def main() -> None:
            batcher = BatcherOf(shut, max_batch=2)
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
            batcher = BatcherOf(Scorer(), max_batch=8)
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
            batcher = BatcherOf(broken, max_batch=5)
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
            batcher = BatcherOf(Scorer(), max_batch=2)
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
            return await BatcherOf(score, max_batch=2).submit_all([1, 2], after(FOREVER))

        assert [type(outcome).__bases__[0] for outcome in run(main())] == [Exception, Exception]

    def test_what_score_raises_reaches_a_single_caller(self) -> None:
        async def main() -> None:
            await BatcherOf(Scorer(), max_batch=1).submit(ZeroDivisionError("mine"), after(FOREVER))

        with pytest.raises(ZeroDivisionError, match="mine"):
            run(main())

    def test_the_observer_is_told_what_happened(self, shut: Scorer) -> None:
        notes = Notes()

        async def main() -> None:
            batcher = BatcherOf(shut, max_batch=4, observer=notes)
            first = await held(shut, batcher)
            quitter = asyncio.create_task(batcher.submit_all([1, 2, 3], after(FOREVER)))
            rest = asyncio.create_task(
                batcher.submit_all([4, ValueError("bad"), 5, OutOfMemoryError("large")], after(FOREVER), [1, 2, 3, 4])
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
            batcher = BatcherOf(score)
            for number in range(100):
                failing = True
                outcomes = await batcher.submit_all(range(8), after(FOREVER))
                assert [type(outcome) for outcome in outcomes] == [error] * 8
                failing = False
                assert await batcher.submit(number, after(FOREVER)) == -number
            await batcher.close()

        run(main())

    @pytest.mark.parametrize("batches", [100, pytest.param(500, marks=pytest.mark.soak)])
    def test_one_poison_in_each_of_many_batches_fails_alone(self, batches: int) -> None:
        scorer = Scorer()
        rng = random.Random(0)

        async def main() -> int:
            batcher = BatcherOf(scorer)
            items: list[Any] = []
            for number in range(batches):
                batch: list[Any] = [8 * number + place for place in range(8)]
                batch[rng.randrange(8)] = ValueError("poison")
                items += batch
            outcomes = await asyncio.gather(
                *(batcher.submit(item, after(FOREVER)) for item in items), return_exceptions=True
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
            batcher = BatcherOf(shut, observer=notes)
            first = await held(shut, batcher)
            tasks = [asyncio.create_task(batcher.submit(item, after(FOREVER))) for item in range(1, 2 * callers + 1)]
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


class TestDefects:
    """The batcher itself fails, or whom it tells: what should never happen."""

    def test_the_batch_is_told_and_what_waits_goes_on(self, shut: Scorer, caplog: pytest.LogCaptureFixture) -> None:
        observer = Notes()
        failure = RuntimeError("a defect")

        async def main() -> list[Any]:
            batcher = BatcherOf(shut, max_batch=2, observer=observer)
            first = await held(shut, batcher)
            rest = [asyncio.create_task(batcher.submit(item, after(FOREVER))) for item in (1, 2, 3, 4)]
            await settle()
            observer.failures.append(failure)
            shut.gate.set()
            outcomes = await asyncio.gather(first, *rest, return_exceptions=True)
            await batcher.close()
            return outcomes

        assert run(main()) == [0, failure, failure, 9, 16]
        assert "a defect" in caplog.text
        assert observer.depths[-1] == (0, 0)
