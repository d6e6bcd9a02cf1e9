"""What callers of a `Batcher` are promised. Time is never measured, except that nothing may hang."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from qwen_vl_classifier.errors import (
    ClosedError,
    DeadlineError,
    QueueFullError,
    QwenVLClassifierError,
)
from qwen_vl_classifier.serving.worker import Worker
from tests.serving.batch_scorer import Scorer, batcher_of, held, settle, submit, submit_all
from tests.serving.clock import AGE, FOREVER, Clock, after
from tests.waiting import LIMIT, run

_COSTS = ((1, 1), (2, 1), (3, 40), (4, 1))  # items and what they cost


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

    def test_a_batch_takes_no_longer_than_it_may_by_the_pace_of_those_before(self, shut: Scorer) -> None:
        async def main() -> None:
            clock, batcher = Clock(), batcher_of(shut, max_seconds=25 * AGE)
            first = asyncio.create_task(submit(batcher, 0, after(FOREVER)))
            await asyncio.to_thread(shut.entered.wait)
            clock.ahead += 10 * AGE  # for one
            waiting = [asyncio.create_task(submit(batcher, item, after(FOREVER), cost)) for item, cost in _COSTS]
            await settle()
            shut.gate.set()
            await asyncio.gather(first, *waiting)

        run(main())
        assert shut.calls[:3] == [[0], [1, 2], [3]], "what takes longer is alone"

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
            clock.ahead += 20 * AGE  # a fifth of one for each unit
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
            assert 10 * AGE <= caught.value.retry_after <= 11 * AGE  # time goes on while the test runs
            shut.gate.set()
            await asyncio.gather(first, waiting)

        run(main())

    def test_what_would_hardly_be_done_in_time_is_sent_away_unless_it_is_alone(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, queue_size=100)
            clock = Clock()
            first = await held(shut, batcher)
            clock.ahead += 10 * AGE  # for each unit
            shut.gate.set()
            await first
            shut.gate.clear()
            shut.entered.clear()
            alone = asyncio.create_task(submit(batcher, 1, after(35 * AGE), cost=100))
            await asyncio.to_thread(shut.entered.wait)
            with pytest.raises(QueueFullError, match="1 items came that would hardly be scored in") as caught:
                await submit(batcher, 2, after(35 * AGE))
            assert caught.value.retry_after >= 1000 * AGE
            patient = asyncio.create_task(submit(batcher, 3, after(2000 * AGE)))
            await settle()
            shut.gate.set()
            assert await asyncio.gather(alone, patient) == [1, 9]

        run(main())
        assert shut.seen == [0, 1, 3]


class TestDeadlines:
    def test_an_item_that_waits_too_long_is_never_scored(self, shut: Scorer) -> None:
        async def main() -> None:
            batcher = batcher_of(shut, max_batch=4, queue_size=4)
            clock = Clock()
            first = await held(shut, batcher)
            late = asyncio.create_task(submit(batcher, 1, after(AGE)))
            await settle()
            assert batcher.waiting == 1
            clock.ahead += AGE
            with pytest.raises(DeadlineError, match="no result before the deadline"):
                await late
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
            clock = Clock()
            tasks = [asyncio.create_task(submit(batcher, item, after(AGE))) for item in range(4)]
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
            closing = asyncio.create_task(batcher.close())
            await settle()
            assert not closing.done()
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
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
        threads[0].join(LIMIT)
        assert not threads[0].is_alive()

    def test_a_pass_that_never_returns_does_not_keep_the_process(self) -> None:
        program = """
import asyncio, sys, threading
from qwen_vl_classifier.serving.batcher import Batcher

hanging = threading.Event()

def hang(items):
    hanging.set()
    threading.Event().wait()

async def main():
    batcher = Batcher(hang, max_batch=1, max_cost=1, queue_size=1)
    caller = asyncio.create_task(batcher.submit_all([1], [1], asyncio.get_running_loop().time() + 1e6))
    await asyncio.to_thread(hanging.wait)
    caller.cancel()
    await batcher.close()
    print("closed")

asyncio.run(main())
print(sorted({"torch", "fastapi", "transformers", "pydantic"} & sys.modules.keys()))
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
        assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n[]\n", "")
