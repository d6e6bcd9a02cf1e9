"""Requests have equal shares by cost, an estimate follows the same rule, and rates are learnt from work alone."""

from __future__ import annotations

import asyncio
import random

import pytest

from qwen_vl_classifier.serving.fair_queue import FairQueue, Share, Turns, Typical, Work
from tests.serving.batch_scorer import settle
from tests.serving.clock import AGE, Clock
from tests.waiting import run


def take_all(queue: FairQueue[str]) -> list[str]:
    """Take one piece of work after the other, as a stage does that can do one at a time."""
    taken = []
    while (work := next(queue.in_order(), None)) is not None:
        queue.take(work)
        queue.finish([work], work.cost)
        taken.append(work.item)
    return taken


def add(queue: FairQueue[str], name: str, *costs: float) -> Share:
    share = Share()
    for number, cost in enumerate(costs):
        queue.add(share, f"{name}{number}", cost)
    return share


class TestOrder:
    def test_requests_take_turns_whatever_each_has_queued(self) -> None:
        queue: FairQueue[str] = FairQueue()
        add(queue, "a", *[1] * 4)
        add(queue, "b", *[1] * 2)
        assert take_all(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]

    def test_shares_are_of_cost_and_not_of_number(self) -> None:
        queue: FairQueue[str] = FairQueue()
        add(queue, "large", 10, 10)
        add(queue, "small", *[1] * 12)
        order = take_all(queue)
        assert order.index("large0") == 9
        assert order.index("large1") > order.index("small11")

    def test_a_newcomer_begins_where_the_others_are(self) -> None:
        queue: FairQueue[str] = FairQueue()
        add(queue, "a", *[1] * 100)
        for _ in range(50):
            (work, *_others) = queue.in_order()
            queue.take(work)
            queue.finish([work], 1)
        add(queue, "b", *[1] * 3)
        assert take_all(queue)[:6] == ["a50", "b0", "a51", "b1", "a52", "b2"]

    def test_no_stream_of_newcomers_pushes_work_back_for_ever(self) -> None:
        queue: FairQueue[str] = FairQueue()
        add(queue, "large", 20)
        for number in range(100):
            add(queue, f"small{number}-", 1)
            work = next(queue.in_order())
            queue.take(work)
            queue.finish([work], 1)
            if work.item == "large0":
                break
        assert number < 25

    def test_what_cost_more_than_expected_counts(self) -> None:
        queue: FairQueue[str] = FairQueue()
        add(queue, "slow", *[1] * 2)
        first = next(queue.in_order())
        queue.take(first)
        queue.finish([first], 30, spent=30)
        add(queue, "quick", *[1] * 20)
        assert take_all(queue)[-1] == "slow1"

    def test_what_is_dropped_is_not_taken_and_leaves_nothing(self) -> None:
        queue: FairQueue[str] = FairQueue()
        works: list[Work[str]] = [queue.add(Share(), str(number), 0.1 * number) for number in range(4)]
        queue.take(works[0])
        for work in works[:3]:
            queue.drop(work)
        assert take_all(queue) == ["3"]
        assert (len(queue), queue.cost) == (0, 0)

    def test_no_request_waits_for_more_than_its_own_of_each_other(self) -> None:
        """The promise that the estimate rests on, with the one piece that each other request may have begun."""
        chance = random.Random(3)
        for _ in range(300):
            queue: FairQueue[str] = FairQueue()
            for number in range(chance.randrange(1, 8)):
                add(queue, f"other{number}-", *(chance.randint(1, 9) for _ in range(chance.randrange(1, 20))))
            for _ in range(chance.randrange(10)):
                if (work := next(queue.in_order(), None)) is not None:
                    queue.take(work)
                    queue.finish([work], work.cost)
            own = Share()
            costs = [chance.randint(1, 9) for _ in range(chance.randrange(1, 6))]
            expected = queue.seconds_until_done(own, sum(costs))
            others = len(queue._shares)
            for cost in costs:
                queue.add(own, "own", cost)
            passed = 0.0
            while own.waiting:
                work = next(queue.in_order())
                queue.take(work)
                queue.finish([work], work.cost)
                passed += work.cost
            if expected:
                assert passed <= expected + 9 * others


class TestEstimate:
    def test_nothing_is_expected_before_anything_is_known(self) -> None:
        assert FairQueue[str]().seconds_for(1000) == 0

    def test_a_newcomer_waits_for_as_much_of_each_other_as_it_has_itself(self) -> None:
        queue: FairQueue[str] = FairQueue()
        add(queue, "known", 1)
        take_all(queue)
        add(queue, "a", *[1] * 1000)
        add(queue, "b", 2)
        assert queue.seconds_until_done(Share(), 5) == 5 + 2 + 5
        assert queue.waiting_before(Share(), 5) == 5 + 1
        assert queue.has_others(Share())

    def test_what_a_request_has_already_counts_as_its_own(self) -> None:
        queue: FairQueue[str] = FairQueue()
        add(queue, "known", 1)
        take_all(queue)
        own = add(queue, "own", 3, 3)
        add(queue, "a", *[1] * 1000)
        assert queue.seconds_until_done(own, 4) == 10 + 10
        assert queue.waiting_before(own, 1) == 2 + 3

    def test_the_latest_work_counts_most(self) -> None:
        queue: FairQueue[str] = FairQueue()
        for seconds in [1] * 60 + [3] * 60:
            work = queue.add(Share(), "x", 1)
            queue.take(work)
            queue.finish([work], seconds)
        assert queue.seconds_for(1) == pytest.approx(3, rel=0.1)

    def test_what_is_given_up_teaches_nothing(self) -> None:
        queue: FairQueue[str] = FairQueue()
        work = queue.add(Share(), "x", 5)
        queue.take(work)
        queue.drop(work)
        assert queue.seconds_for(1) == 0

    def test_a_few_that_are_extreme_do_not_change_what_is_typical(self) -> None:
        typical = Typical()
        for number in range(200):
            typical.learn(1e9 if number % 5 == 4 else 10.0)
        assert 7 < typical.value < 14


class TestTurns:
    def test_few_have_one_at_a_time_and_seconds_count(self) -> None:
        async def main() -> None:
            clock, turns, order = Clock(), Turns(1), []

            async def work(name: str, share: Share, seconds: float) -> None:
                async with turns.turn(share, AGE):
                    order.append(name)
                    clock.ahead += seconds
                    await asyncio.sleep(0)

            slow, quick = Share(), Share()
            await asyncio.gather(
                *(work(f"slow{number}", slow, 30 * AGE) for number in range(3)),
                *(work(f"quick{number}", quick, AGE) for number in range(10)),
            )
            assert order[:2] == ["slow0", "quick0"]
            assert order[-2:] == ["slow1", "slow2"]

        run(main())

    def test_those_who_leave_free_their_turn_or_their_place(self) -> None:
        async def main() -> None:
            turns, entered = Turns(1), []

            async def work(name: str) -> None:
                async with turns.turn(Share(), 1):
                    entered.append(name)
                    await asyncio.Event().wait()

            tasks = [asyncio.create_task(work(name)) for name in "abc"]
            await settle()
            tasks[1].cancel()  # waits
            await settle()
            assert entered == ["a"]
            tasks[0].cancel()  # has its turn
            await settle()
            assert entered == ["a", "c"]
            tasks[2].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert turns.queue.cost == 0
            async with turns.turn(Share(), 1):
                pass

        run(main())

    def test_one_who_leaves_at_the_moment_of_the_turn(self) -> None:
        async def main() -> None:
            turns = Turns(1)

            async def work() -> None:
                async with turns.turn(Share(), 1):
                    await asyncio.sleep(0)

            for steps in range(12):
                tasks = [asyncio.create_task(work()) for _ in range(4)]
                for _ in range(steps):
                    await asyncio.sleep(0)
                tasks[1].cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                async with turns.turn(Share(), 1):
                    pass
            assert turns.queue.cost == 0

        run(main())

    def test_an_error_in_a_turn_ends_it(self) -> None:
        async def main() -> None:
            turns = Turns(1)
            for _ in range(3):
                with pytest.raises(ValueError, match="mine"):
                    async with turns.turn(Share(), 1):
                        raise ValueError("mine")

        run(main())
