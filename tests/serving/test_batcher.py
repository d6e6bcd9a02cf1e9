"""What callers of a `Batcher` are promised. Time is never measured, except that nothing may hang."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import pytest

from qwen_vl_classifier.errors import (
    ClosedError,
    DeadlineError,
)
from qwen_vl_classifier.serving.worker import Worker
from tests.serving.batch_scorer import BatcherOf, Scorer, held, settle
from tests.serving.clock import AGE, FOREVER, Clock, after
from tests.waiting import LIMIT, run


class TestBatches:
    def test_each_caller_gets_the_result_of_its_own_item(self) -> None:
        scorer = Scorer()

        async def main() -> list[int]:
            batcher = BatcherOf(scorer, max_batch=7)
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
            batcher = BatcherOf(shut, max_batch=8)
            first = await held(shut, batcher)
            later = [asyncio.create_task(batcher.submit(item, after(FOREVER))) for item in (1, 2, 3)]
            await asyncio.sleep(0)
            shut.gate.set()
            assert await asyncio.gather(first, *later) == [0, 1, 4, 9]
            await batcher.close()

        run(main())
        assert shut.calls == [[0], [1, 2, 3]]

    def test_a_batch_costs_no_more_than_it_may_and_what_costs_more_is_alone(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = BatcherOf(shut, max_cost=10)
            first = await held(shut, batcher)
            later = asyncio.create_task(batcher.submit_all([1, 2, 3, 4, 5, 6], after(FOREVER), [4, 6, 1, 20, 9, 1]))
            await asyncio.sleep(0)
            shut.gate.set()
            await asyncio.gather(first, later)

        run(main())
        assert shut.calls == [[0], [1, 2], [3], [4], [5, 6]]

    def test_a_batch_takes_no_longer_than_it_may_by_the_rate_of_those_before(self, shut: Scorer) -> None:
        async def main() -> None:
            clock, batcher = Clock(), BatcherOf(shut, max_seconds=5 * AGE)
            first = await held(shut, batcher)
            clock.ahead += 2 * AGE  # that is what one costs, so two fit into five
            waiting = asyncio.create_task(batcher.submit_all([1, 2, 3], after(FOREVER), [1, 1, 40]))
            await settle()
            shut.gate.set()
            await asyncio.gather(first, waiting)

        run(main())
        assert shut.calls == [[0], [1, 2], [3]], "what takes longer is alone"

    def test_items_of_different_functions_share_the_queue_and_no_call(self, shut: Scorer) -> None:
        def negate(items: list[int]) -> list[int]:
            shut.calls.append(items)
            return [-item for item in items]

        async def main() -> list[int]:
            one = BatcherOf(shut)
            other = one.sharing(negate)
            first = await held(shut, one)
            callers = [(one, 1), (other, 2), (one, 3), (other, 4)]
            rest = [asyncio.create_task(batcher.submit(item, after(FOREVER))) for batcher, item in callers]
            await settle()
            shut.gate.set()
            return [await first, *await asyncio.gather(*rest)]

        assert run(main()) == [0, 1, -2, 9, -4]
        assert shut.calls == [[0], [1, 3], [2, 4]]

    def test_a_batch_is_chosen_when_the_worker_is_free(self) -> None:
        scorer = Scorer()

        async def main() -> None:
            worker = Worker("device")
            batcher = BatcherOf(scorer, worker=worker)
            async with worker.turn:  # as an explanation has it
                quitter = asyncio.create_task(batcher.submit(1, after(FOREVER)))
                await settle()
                quitter.cancel()
                rest = [asyncio.create_task(batcher.submit(item, after(FOREVER))) for item in (2, 3)]
                await settle()
                assert scorer.calls == []
            await asyncio.gather(*rest)

        run(main())
        assert scorer.calls == [[2, 3]]

    def test_several_items_of_one_caller_keep_their_order(self) -> None:
        async def main() -> list[Any]:
            batcher = BatcherOf(Scorer(), max_batch=2)
            assert await batcher.submit_all([], after(FOREVER)) == []
            return await batcher.submit_all([3, 1, 2], after(FOREVER))

        assert run(main()) == [9, 1, 4]


class TestLeaving:
    def test_one_who_gives_up_while_waiting_leaves_the_queue(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = BatcherOf(shut, max_batch=4)
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
            batcher = BatcherOf(shut, max_batch=4)
            clock = Clock()
            first = await held(shut, batcher)
            late = asyncio.create_task(batcher.submit(1, after(AGE)))
            await settle()
            assert batcher.waiting == 1
            clock.ahead += AGE
            with pytest.raises(DeadlineError, match="no result before the deadline"):
                await late
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
            batcher = BatcherOf(scorer, max_batch=4)
            with pytest.raises(DeadlineError):
                await batcher.submit(1, after(-1))
            assert await batcher.submit(2, after(FOREVER)) == 4

        run(main())
        assert scorer.seen == [2]

    def test_a_pass_that_hangs_holds_no_caller(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = BatcherOf(shut, max_batch=2)
            clock = Clock()
            tasks = [asyncio.create_task(batcher.submit(item, after(AGE))) for item in range(4)]
            await asyncio.to_thread(shut.entered.wait)
            clock.ahead += AGE
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [DeadlineError] * 4
            await batcher.close()  # nobody waits any more, so it does not wait for the pass either

        run(main())
        assert len(shut.calls) == 1


class TestClosing:
    def test_what_was_accepted_is_finished_and_nothing_more_is_taken(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = BatcherOf(shut, max_batch=1)
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
        run(BatcherOf(Scorer(), max_batch=1).close())

    def test_cutting_the_closing_short_tells_every_caller(self, shut: Scorer) -> None:
        async def main() -> list[Any]:
            batcher = BatcherOf(shut, max_batch=1)
            first = await held(shut, batcher)
            second = asyncio.create_task(batcher.submit(1, after(FOREVER)))
            closing = asyncio.create_task(batcher.close())
            await settle()
            assert not closing.done()
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            return list(await asyncio.gather(first, second, return_exceptions=True))

        assert [type(outcome) for outcome in run(main())] == [ClosedError, ClosedError]

    def test_a_pass_that_never_returns_does_not_keep_the_process(self) -> None:
        program = """
import asyncio, sys, threading
from qwen_vl_classifier.serving.batcher import Batcher
from qwen_vl_classifier.serving.worker import Worker

class Observer:
    def __getattr__(self, name):
        return lambda *_: None

hanging = threading.Event()

def hang(items):
    hanging.set()
    threading.Event().wait()

async def main():
    batcher = Batcher(Worker("model"), Observer(), max_batch=1, max_cost=1)
    caller = asyncio.create_task(batcher.submit(hang, [1], [1], asyncio.get_running_loop().time() + 1e6))
    await asyncio.to_thread(hanging.wait)
    caller.cancel()
    await batcher.close()
    print("closed")

asyncio.run(main())
print(sorted({"torch", "fastapi", "transformers", "pydantic"} & sys.modules.keys()))
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
        assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n[]\n", "")
