"""One thread for one thing after the other."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from qwen_vl_classifier.errors import ClosedError
from qwen_vl_classifier.serving.worker import Steps, Worker
from tests.serving.batch_scorer import settle
from tests.waiting import LIMIT, run


def test_calls_run_in_order_in_one_thread_and_give_back_what_they_return_or_raise() -> None:
    seen: list[tuple[int, int]] = []

    def call(number: int) -> int:
        seen.append((number, threading.get_ident()))
        if number == 2:
            raise KeyError(number)
        return -number

    async def main() -> list[int | BaseException]:
        worker = Worker("one")
        outcomes = await asyncio.gather(*(worker.run(call, number) for number in range(5)), return_exceptions=True)
        worker.stop()
        return outcomes

    outcomes = run(main())
    assert isinstance(outcomes.pop(2), KeyError)
    assert outcomes == [0, -1, -3, -4]
    assert [number for number, _ in seen] == list(range(5))
    assert len({thread for _, thread in seen} - {threading.get_ident()}) == 1


def test_a_call_that_is_cancelled_before_it_begins_is_left_out() -> None:
    gate, seen = threading.Event(), []

    async def main() -> None:
        worker = Worker("one")
        first = asyncio.create_task(worker.run(gate.wait))
        second = asyncio.create_task(worker.run(seen.append, "second"))
        third = asyncio.create_task(worker.run(seen.append, "third"))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        gate.set()
        await asyncio.gather(first, third)
        worker.stop()

    run(main())
    assert seen == ["third"]


@pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_what_would_end_a_thread_or_a_loop_becomes_an_error(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    async def main() -> None:
        worker = Worker("one")
        with pytest.raises(RuntimeError, match=error.__name__) as caught:
            await worker.run(fail)
        assert isinstance(caught.value.__cause__, error)
        assert await worker.run(lambda: 5) == 5
        worker.stop()

    run(main())


def test_the_thread_ends_when_it_is_told_to() -> None:
    threads: list[threading.Thread] = []

    async def main() -> None:
        worker = Worker("one")
        await worker.run(lambda: threads.append(threading.current_thread()))
        worker.stop()

    run(main())
    threads[0].join(LIMIT)
    assert not threads[0].is_alive()


def test_it_takes_no_more_calls_once_it_is_stopped() -> None:
    gate = threading.Event()

    async def main() -> None:
        worker = Worker("one")
        before = [asyncio.create_task(worker.run(gate.wait)), asyncio.create_task(worker.run(lambda: 5))]
        await settle()
        worker.stop()
        with pytest.raises(ClosedError):
            await worker.run(lambda: 6)
        gate.set()
        assert await asyncio.gather(*before) == [True, 5]

    run(main())


def test_steps_of_several_works_take_turns() -> None:
    seen: list[str] = []

    async def work(steps: Steps, name: str) -> None:
        for _ in range(3):
            await steps.run(lambda: seen.append(name))

    async def main() -> None:
        worker = Worker("one")
        steps = Steps(worker, lambda: math.inf)
        async with worker.turn:
            works = [asyncio.create_task(work(steps, name)) for name in "abc"]
            await settle()
            assert seen == []
        await asyncio.gather(*works)
        worker.stop()

    run(main())
    assert seen == list("abcabcabc")


def test_no_step_comes_while_somebody_waits_who_waited_for_a_step_already() -> None:
    seen: list[str] = []

    async def main() -> None:
        worker, loop = Worker("one"), asyncio.get_running_loop()
        waiting: list[float] = []
        steps = Steps(worker, lambda: min(waiting, default=math.inf))

        async def others() -> None:
            while waiting:
                async with worker.turn:
                    waiting.pop(0)
                    await worker.run(lambda: seen.append("other"))

        async def work() -> None:
            for _ in range(3):
                await steps.run(lambda: seen.append("step"))

        async with worker.turn:
            working = asyncio.create_task(work())
            await settle()
            waiting += [loop.time()] * 3
            serving = asyncio.create_task(others())
            await settle()
        await asyncio.gather(working, serving)
        worker.stop()

    run(main())
    assert seen == ["step", "other", "other", "other", "step", "step"]
