"""Which requests are taken: bounded in number, in bytes, and by the time that queued work takes."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import pytest

from qwen_vl_classifier import ServeConfig
from qwen_vl_classifier.errors import ImageError, QueueFullError
from qwen_vl_classifier.serving.admission import Admission
from qwen_vl_classifier.serving.backlog import Backlog
from qwen_vl_classifier.serving.observability import Metrics
from tests.serving.batch_scorer import BatcherOf, Scorer, held, settle
from tests.serving.clock import AGE, FOREVER, Clock, after
from tests.waiting import run


@dataclass
class Bench:
    """An admission, and the queues that it looks at."""

    admission: Admission
    batcher: BatcherOf
    pictures: Backlog

    async def learn(self, scorer: Scorer, clock: Clock, seconds: float) -> asyncio.Task[Any]:
        """Let one item take so long, then hold another in the model."""
        first = await held(scorer, self.batcher)
        clock.ahead += seconds
        scorer.gate.set()
        await first
        scorer.gate.clear()
        scorer.entered.clear()
        return await held(scorer, self.batcher)


def bench(scorer: Scorer | None = None, **options: Any) -> Bench:
    batcher, pictures = BatcherOf(scorer or Scorer()), Backlog()
    config = ServeConfig(classifiers=("a",), **options)
    admission = Admission(config, batcher=batcher.batcher, pictures=pictures, observer=Metrics())
    return Bench(admission, batcher, pictures)


class TestRequests:
    def test_no_more_are_in_progress_than_there_is_room_for(self) -> None:
        async def main() -> None:
            admission = bench(queue_size=1, max_batch=1).admission
            for _ in range(3):
                with admission.admit(), admission.admit():
                    with pytest.raises(QueueFullError, match="2 requests are in progress; expected at most 2"):
                        admission.admit().__enter__()
                    assert admission.requests == 2
            assert admission.requests == 0

        run(main())

    def test_slow_callers_do_not_shut_others_out(self) -> None:
        """Callers who send slowly take time and no work: requests beside them are let in however long it goes on."""

        async def main() -> None:
            clock, many = Clock(), bench(deadline=AGE)
            with many.admission.admit(), many.admission.admit(), many.admission.admit():
                for number in range(20):
                    clock.ahead += AGE
                    with many.admission.admit() as request:
                        request.check_examples(1, 1)
                        request.check_pictures(1)
                        assert await many.batcher.submit(number, after(FOREVER)) == number**2
            await many.batcher.close()

        run(main())

    def test_one_waits_until_none_is_in_progress(self) -> None:
        async def main() -> None:
            admission = bench().admission
            await admission.wait_until_idle()
            with admission.admit():
                waiting = asyncio.create_task(admission.wait_until_idle())
                await settle()
                assert not waiting.done()
            await waiting

        run(main())

    def test_few_explanations_are_in_progress(self) -> None:
        async def main() -> None:
            admission = bench().admission
            with contextlib.ExitStack() as some:
                for _ in range(4):
                    some.enter_context(admission.explanation())
                with pytest.raises(QueueFullError, match="4 explanations are in progress"):
                    admission.explanation().__enter__()
            with admission.explanation():
                pass

        run(main())


class TestQueue:
    def test_examples_that_find_no_room_are_refused_and_so_is_the_next_request(self, shut: Scorer) -> None:
        async def main() -> None:
            few = bench(shut, queue_size=2)
            first = await held(shut, few.batcher)
            with few.admission.admit() as request:
                with pytest.raises(QueueFullError, match="0 examples wait and 3 more came; expected at most 2 in all"):
                    request.check_examples(3, 3)
                request.check_examples(2, 2)
                rest = asyncio.create_task(few.batcher.submit_all([1, 2], after(FOREVER)))
                await settle()
                with pytest.raises(QueueFullError, match="2 examples wait"):
                    request.check_examples(1, 1)
            with pytest.raises(QueueFullError, match="2 examples wait"):
                few.admission.admit().__enter__()
            shut.gate.set()
            await asyncio.gather(first, rest)
            with few.admission.admit() as request:
                request.check_examples(2, 2)

        run(main())

    def test_examples_that_would_hardly_be_scored_in_time_are_refused_unless_they_are_alone(self, shut: Scorer) -> None:
        async def main() -> None:
            clock, many = Clock(), bench(shut, deadline=100 * AGE)
            with many.admission.admit() as request:
                request.check_examples(1, 10**6)
            running = await many.learn(shut, clock, 20 * AGE)  # for each unit of cost
            with many.admission.admit() as request:
                request.check_examples(1, 2)
                with pytest.raises(QueueFullError, match="1 more examples would take") as caught:
                    request.check_examples(1, 4)
                assert caught.value.retry_after >= 20 * AGE  # what the model has by now
            waiting = asyncio.create_task(many.batcher.submit_all([1, 2, 3, 4], after(FOREVER)))
            await settle()
            with pytest.raises(QueueFullError):  # before a byte of it is read
                many.admission.admit().__enter__()
            shut.gate.set()
            await asyncio.gather(running, waiting)
            with many.admission.admit() as request:
                request.check_examples(1, 10**6)

        run(main())

    def test_pictures_that_would_hardly_be_decoded_in_time_are_refused_and_texts_are_not(self) -> None:
        async def main() -> None:
            clock, many = Clock(), bench(deadline=100 * AGE)
            with many.admission.admit() as request:
                many.pictures.add(1)
                clock.ahead += 30 * AGE
                many.pictures.finish(1)
                request.check_pictures(10)  # it is alone
            many.pictures.add(1)
            with many.admission.admit() as request:
                request.check_pictures(1)
                with pytest.raises(QueueFullError, match="2 more sets of pictures would take") as caught:
                    request.check_pictures(2)
                assert caught.value.retry_after >= 30 * AGE
                request.check_pictures(0)
                request.check_examples(1, 1)

        run(main())


class TestBytes:
    def test_those_of_all_are_bounded_and_given_back(self) -> None:
        async def main() -> None:
            admission = bench(queue_bytes=100).admission
            with admission.admit() as one, admission.admit() as other:
                one.hold(60)
                with pytest.raises(QueueFullError, match="hold 60 bytes and 41 more came; expected at most 100"):
                    other.hold(41)
                other.hold(40)
                assert admission.held == 100
            assert admission.held == 0

        run(main())

    def test_pictures_of_one_request_have_half_of_them_at_most(self) -> None:
        async def main() -> None:
            admission = bench(queue_bytes=100).admission
            with admission.admit() as request:
                request.hold_picture(30)
                request.hold_picture(20)
                with pytest.raises(ImageError, match="more memory than one request may have") as caught:
                    request.hold_picture(1)
                assert caught.value.code == "image_too_large"
                request.release_picture(20)
                request.hold_picture(10)
                assert admission.held == 40
            assert admission.held == 0

        run(main())

    def test_what_would_fit_another_time_is_no_fault_of_the_pictures(self) -> None:
        async def main() -> None:
            admission = bench(queue_bytes=100).admission
            with admission.admit() as other, admission.admit() as request:
                other.hold(80)
                with pytest.raises(QueueFullError):
                    request.hold_picture(30)

        run(main())
