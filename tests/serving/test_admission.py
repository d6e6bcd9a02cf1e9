"""Which requests are taken: bounded in number, in bytes, and by the time that queued work takes."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import pytest

from qwen_vl_classifier import ServeConfig
from qwen_vl_classifier.errors import ExplanationError, ImageError, QueueFullError
from qwen_vl_classifier.serving.admission import Admission
from qwen_vl_classifier.serving.fair_queue import FairQueue, Share
from qwen_vl_classifier.serving.observability.prometheus import Metrics
from tests.serving.batch_scorer import BatcherOf, Scorer, held, settle
from tests.serving.clock import AGE, FOREVER, Clock, after
from tests.waiting import run


@dataclass
class Bench:
    """An admission, and the queues that it looks at."""

    admission: Admission
    batcher: BatcherOf
    pictures: FairQueue[Any]

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
    batcher, pictures = BatcherOf(scorer or Scorer()), FairQueue[Any]()
    config = ServeConfig(classifiers=("a",), **options)
    admission = Admission(config, model=batcher.batcher.queue, pictures=pictures, observer=Metrics())
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
                        request.check_examples(Share(), 1, 1)
                        request.check_pictures(Share(), 1, 1)
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
            with admission.admit() as request:
                with contextlib.ExitStack() as some:
                    for _ in range(4):
                        some.enter_context(admission.explanation(request))
                    with pytest.raises(QueueFullError, match="4 explanations are in progress"):
                        admission.explanation(request).__enter__()
                with admission.explanation(request):
                    pass

        run(main())


class TestExplanations:
    def test_one_of_too_many_tokens_is_refused(self) -> None:
        async def main() -> None:
            admission = bench(max_explain_tokens=1000).admission
            with admission.admit() as request, admission.explanation(request) as explanation:
                explanation.begin([100] * 10)
                with pytest.raises(ExplanationError, match="11 passes of 1,100 tokens in all; expected at most 1,000"):
                    explanation.begin([100] * 11)

        run(main())

    def test_one_that_would_take_too_long_ends_after_two_passes_and_the_next_before_its_first(self) -> None:
        async def main() -> None:
            clock, admission = Clock(), bench(deadline=AGE).admission
            with admission.admit() as request:
                with admission.explanation(request) as explanation:
                    explanation.begin([10] * 10)
                    explanation.finish(10, 0.11 * AGE)
                    with pytest.raises(ExplanationError, match="this explanation would take"):
                        explanation.finish(10, 0.12 * AGE)
                with admission.explanation(request) as explanation, pytest.raises(ExplanationError):
                    explanation.begin([10] * 10)
            clock.ahead += AGE
            with admission.admit() as request, admission.explanation(request) as explanation:
                explanation.begin([10] * 10)  # a slow moment is forgotten

        run(main())

    def test_what_the_model_has_queued_counts(self, shut: Scorer) -> None:
        async def main() -> None:
            clock, few = Clock(), bench(shut, deadline=100 * AGE)
            running = await few.learn(shut, clock, AGE)
            waiting = asyncio.create_task(few.batcher.submit_all([1] * 60, after(FOREVER)))
            await settle()
            with few.admission.admit() as request, few.admission.explanation(request) as explanation:
                explanation.begin([10] * 10)
                clock.ahead += 50 * AGE
                with pytest.raises(QueueFullError, match="too little time"):
                    explanation.finish(10, 0.1 * AGE)
            shut.gate.set()
            await asyncio.gather(running, waiting)

        run(main())

    def test_a_first_pass_that_is_slow_says_little(self) -> None:
        async def main() -> None:
            admission = bench(deadline=AGE).admission
            with admission.admit() as request, admission.explanation(request) as explanation:
                explanation.begin([10] * 10)
                for seconds in (0.5, *[0.01] * 9):
                    explanation.finish(10, seconds * AGE)

        run(main())

    def test_one_that_would_not_be_done_beside_earlier_ones_is_refused_and_they_go_on(self) -> None:
        async def main() -> None:
            admission = bench(deadline=AGE).admission
            with admission.admit() as request, admission.explanation(request) as first:
                first.begin([10] * 10)
                first.finish(10, 0.06 * AGE)
                first.finish(10, 0.06 * AGE)
                with admission.explanation(request) as second:
                    with pytest.raises(QueueFullError, match="too little time") as refusal:
                        second.begin([10] * 10)
                    assert refusal.value.retry_after == pytest.approx(0.48 * AGE, abs=1)
                with admission.explanation(request) as short:
                    short.begin([10] * 5)  # they take turns, so it need not wait for all of the first
                    first.finish(10, 0.06 * AGE)
                    short.finish(10, 0.06 * AGE)

        run(main())


class TestQueue:
    def test_examples_that_find_no_room_are_refused_and_so_is_the_next_request(self, shut: Scorer) -> None:
        async def main() -> None:
            few = bench(shut, queue_size=2)
            first = await held(shut, few.batcher)
            with few.admission.admit() as request:
                with pytest.raises(QueueFullError, match="0 examples are waiting and 3 more arrived; expected"):
                    request.check_examples(Share(), 3, 3)
                request.check_examples(Share(), 2, 2)
                rest = [asyncio.create_task(few.batcher.submit(number, after(FOREVER))) for number in (1, 2)]
                await settle()
                with pytest.raises(QueueFullError, match="2 examples are waiting"):
                    request.check_examples(Share(), 1, 1)
            with pytest.raises(QueueFullError, match="2 examples are waiting"):
                few.admission.admit().__enter__()
            shut.gate.set()
            await asyncio.gather(first, *rest)
            with few.admission.admit() as request:
                request.check_examples(Share(), 2, 2)

        run(main())

    def test_one_large_request_makes_no_other_wait_for_all_of_it(self, shut: Scorer) -> None:
        async def main() -> None:
            clock, many = Clock(), bench(shut, deadline=100 * AGE, queue_size=64)
            running = await many.learn(shut, clock, AGE)
            large = asyncio.create_task(many.batcher.submit_all(list(range(64)), after(FOREVER), [1000] * 64))
            await settle()
            for _ in range(3):
                with many.admission.admit() as request:
                    request.check_examples(Share(), 3, 3)
            with many.admission.admit() as request, pytest.raises(QueueFullError):
                request.check_examples(Share(), 64, 64_000)
            shut.gate.set()
            await asyncio.gather(running, large)

        run(main())

    def test_examples_that_would_hardly_be_scored_in_time_are_refused_unless_they_are_alone(self, shut: Scorer) -> None:
        async def main() -> None:
            clock, many = Clock(), bench(shut, deadline=100 * AGE)
            with many.admission.admit() as request:
                request.check_examples(Share(), 1, 10**6)
            running = await many.learn(shut, clock, 20 * AGE)  # for each unit of cost
            with many.admission.admit() as request:
                request.check_examples(Share(), 1, 2)
                with pytest.raises(QueueFullError, match="1 more examples would take") as caught:
                    request.check_examples(Share(), 1, 4)
                assert 20 * AGE <= caught.value.retry_after <= 100 * AGE  # what the model has by now
            waiting = [asyncio.create_task(many.batcher.submit(number, after(FOREVER))) for number in range(4)]
            await settle()
            with pytest.raises(QueueFullError):  # before a byte of it is read
                many.admission.admit().__enter__()
            shut.gate.set()
            await asyncio.gather(running, *waiting)
            with many.admission.admit() as request:
                request.check_examples(Share(), 1, 10**6)

        run(main())

    def test_pictures_that_would_hardly_be_decoded_in_time_are_refused_and_texts_are_not(self) -> None:
        async def main() -> None:
            many, queue = bench(deadline=100 * AGE), Share()
            with many.admission.admit() as request:
                work = many.pictures.add(queue, None, 1)
                many.pictures.take(work)
                many.pictures.finish([work], 30 * AGE)
                request.check_pictures(Share(), 10, 10)  # it is alone
            many.pictures.add(queue, None, 1)
            with many.admission.admit() as request:
                request.check_pictures(Share(), 1, 1)
                with pytest.raises(QueueFullError, match="2 more pictures would take") as caught:
                    request.check_pictures(Share(), 2, 2)
                assert caught.value.retry_after >= 30 * AGE
                request.check_examples(Share(), 1, 1)

        run(main())

    def test_one_request_of_many_pictures_makes_no_other_wait_for_all_of_them(self) -> None:
        async def main() -> None:
            many, large = bench(deadline=100 * AGE), Share()
            for _ in range(64):
                many.pictures.add(large, None, 1)
            first = next(many.pictures.in_order())
            many.pictures.take(first)
            many.pictures.finish([first], AGE)
            with many.admission.admit() as request:
                request.check_pictures(Share(), 8, 8)
                with pytest.raises(QueueFullError):
                    request.check_pictures(Share(), 64, 64)

        run(main())


class TestUploads:
    def test_a_body_that_is_long_in_coming_gives_its_place_to_a_newcomer(self) -> None:
        async def main() -> None:
            clock, admission = Clock(), bench(deadline=FOREVER, queue_size=1, max_batch=2).admission
            gave_way: list[str] = []

            async def upload(name: str) -> None:
                with admission.admit() as request:
                    try:
                        async with request.upload(FOREVER):
                            await asyncio.Event().wait()
                    except QueueFullError:
                        gave_way.append(name)

            slow = [asyncio.create_task(upload(name)) for name in "abc"]
            await settle()
            with pytest.raises(QueueFullError, match="3 requests are in progress"):  # they have just begun
                admission.admit().__enter__()
            clock.ahead += AGE
            with admission.admit(), admission.admit():  # at the same moment
                await settle()
                assert gave_way == ["a", "b"]
                assert admission.requests == 3
            slow += [asyncio.create_task(upload(name)) for name in "de"]
            await settle()
            with admission.admit():
                await settle()
                assert gave_way == ["a", "b", "c"]
                with pytest.raises(QueueFullError):
                    admission.admit().__enter__()
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
            assert admission.requests == 0

        run(main())

    def test_a_body_that_is_too_slow_is_told_so(self) -> None:
        async def main() -> None:
            clock, admission = Clock(), bench(deadline=FOREVER).admission

            async def upload() -> None:
                with admission.admit() as request:
                    async with request.upload(AGE):
                        clock.ahead += 2 * AGE
                        await asyncio.Event().wait()

            with pytest.raises(TimeoutError):
                await upload()

        run(main())


class TestBytes:
    def test_no_request_holds_more_than_are_free_and_all_are_given_back(self) -> None:
        async def main() -> None:
            admission = bench(queue_bytes=160).admission  # of which an eighth is set aside
            with admission.admit() as one, admission.admit() as other, admission.admit() as last:
                one.hold(70)
                with pytest.raises(QueueFullError, match="hold 70 bytes and 1 more arrived; expected at most 160"):
                    one.hold(1)
                other.hold(35)
                with pytest.raises(QueueFullError):
                    other.hold(1)
                last.hold(17)
                assert admission.held == 122
            assert admission.held == 0

        run(main())

    def test_however_many_hold_all_that_they_may_a_small_request_finds_room(self) -> None:
        async def main() -> None:
            admission = bench(queue_bytes=1_000_000_000).admission
            with contextlib.ExitStack() as some:
                for number in range(288):
                    request = some.enter_context(admission.admit())
                    request.hold(256 * 1024)
                    if number < 270:
                        with contextlib.suppress(QueueFullError):
                            for _ in range(127):
                                request.hold(256 * 1024)
                assert 800_000_000 < admission.held <= 1_000_000_000
            assert admission.held == 0

        run(main())

    def test_pictures_of_one_request_have_half_of_them_at_most(self) -> None:
        async def main() -> None:
            admission = bench(queue_bytes=115).admission
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
                other.hold(40)
                with pytest.raises(QueueFullError):
                    request.hold_picture(30)

        run(main())
