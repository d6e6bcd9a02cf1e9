"""Decoding in processes apart: the same pixels, and whatever a picture does costs that picture alone."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from pathlib import Path

import pytest
from PIL import Image

from qwen_vl_classifier.errors import ClosedError, ImageError
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.serving import decoder, decoding_process
from qwen_vl_classifier.serving.decoder import DecoderPool
from qwen_vl_classifier.serving.decoding_process import TooSlowError
from tests.serving.decoder_pools import GOOD, LIMITS, MEMORY, check_good, encoded, refusal, using
from tests.waiting import LIMIT, run, soon


class TestPictures:
    def test_they_are_those_of_open_image(self) -> None:
        files = [
            *(encoded(format, size) for format in ("PNG", "JPEG", "WEBP") for size in ((1, 1), (3, 200), (401, 303))),
            *(encoded("PNG", mode=mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
            *(encoded("JPEG", mode=mode) for mode in ("L", "CMYK")),
            encoded("PNG", (5000, 5000)),
            encoded("PNG", (25_000, 125)),
        ]

        async def work(pool: DecoderPool) -> list[Image.Image]:
            return list(await asyncio.gather(*map(pool.decode, files)))

        for data, image in zip(files, using(work, 2), strict=True):
            expected = open_image(data, limits=LIMITS)
            assert (image.mode, image.size, image.info) == ("RGB", expected.size, {})
            assert image.tobytes() == expected.tobytes()

    def test_refusals_are_those_of_open_image(self) -> None:
        files = [
            b"",
            b"nonsense",
            GOOD[:-20],
            encoded("GIF"),
            encoded("PNG", (5001, 5000), "1"),
            encoded("PNG", (201, 1)),
            encoded("WEBP")[:40],
        ]

        async def work(pool: DecoderPool) -> list[ImageError]:
            return [await refusal(pool, data) for data in files]

        for data, error in zip(files, using(work), strict=True):
            with pytest.raises(ImageError) as caught:
                open_image(data, limits=LIMITS)
            assert (str(error), error.code) == (str(caught.value), caught.value.code)

    def test_further_formats_where_they_are_asked_for(self) -> None:
        files = [encoded(format) for format in ("GIF", "BMP", "TIFF", "AVIF")]
        limits = ImageLimits(formats=("PNG", "GIF", "BMP", "TIFF", "AVIF"))

        async def work() -> list[Image.Image]:
            pool = DecoderPool(workers=1, timeout=LIMIT, memory_bytes=MEMORY, limits=limits)
            await pool.start()
            try:
                return [await pool.decode(data) for data in files]
            finally:
                await pool.close()

        images = asyncio.run(work())
        assert [image.tobytes() for image in images] == [open_image(data).tobytes() for data in files]

    def test_a_file_that_is_too_large_is_not_sent(self) -> None:
        async def work(pool: DecoderPool) -> None:
            before = pool.processes
            error = await refusal(pool, b"\x89PNG" + bytes(LIMITS.max_bytes))
            assert error.code == "image_too_large"
            assert pool.processes == before

        using(work)

    def test_many_at_once_get_their_own(self) -> None:
        files = [encoded("PNG", (40 + number % 7, 30), colour=number) for number in range(200)]

        async def work(pool: DecoderPool) -> list[Image.Image]:
            return list(await asyncio.gather(*map(pool.decode, files)))

        images = using(work, 2)
        assert [image.tobytes() for image in images] == [open_image(data).tobytes() for data in files]
        assert len({image.tobytes() for image in images}) == 200


@pytest.mark.usefixtures("hostile")
class TestLosses:
    @pytest.mark.parametrize(
        "order",
        [
            *("!kill SIGSEGV", "!kill SIGKILL", "!kill SIGBUS", "!abort", "!exit 0", "!exit 1", "!raise"),
            "!say ANSWER.pack(999,PIXELS,1,1)+b'abc'",
            "!say ANSWER.pack(2,PIXELS,1,1)+b'abc'",
            "!say ANSWER.pack(1,PIXELS,0,5)",
            "!say ANSWER.pack(1,PIXELS,2**32-1,2**32-1)",
            "!say ANSWER.pack(1,PIXELS,5001,5000)",
            "!say ANSWER.pack(1,ERROR+5,3,0)+b'abc'",
            "!say ANSWER.pack(1,ERROR+4,2**32-1,0)",
            "!say ANSWER.pack(1,255,0,0)",
            "!say b'nonsense'*1000",
        ],
    )
    def test_a_process_that_ends_or_lies_costs_one_picture(self, order: str) -> None:
        async def work(pool: DecoderPool) -> None:
            before = pool.processes
            error = await refusal(pool, order.encode())
            assert error.code == "image_damaged"
            assert "crashed the process" in str(error)
            await check_good(pool)
            await check_good(pool)
            assert len(pool.processes) == 1
            assert pool.processes != before

        using(work)

    def test_others_are_not_touched(self) -> None:
        async def work(pool: DecoderPool) -> list[Image.Image | BaseException]:
            orders = [b"!abort" if number % 5 == 2 else GOOD for number in range(25)]
            return list(await asyncio.gather(*map(pool.decode, orders), return_exceptions=True))

        for number, outcome in enumerate(using(work, 2)):
            assert isinstance(outcome, ImageError if number % 5 == 2 else Image.Image)

    # The last one has begun to answer: the pixels that follow are too few.
    @pytest.mark.parametrize(
        "order", ["!kill SIGSTOP", "!spin", "!hold {folder}", "!say ANSWER.pack(1,PIXELS,5000,5000)+b'xyz'"]
    )
    def test_one_that_hangs_is_ended(self, order: str, tmp_path: Path) -> None:
        async def work(pool: DecoderPool) -> None:
            error = await refusal(pool, order.replace("{folder}", str(tmp_path)).encode())
            assert error.code == "image_damaged"
            assert "longer than 0.1 s" in str(error)
            await soon(lambda: len(pool.processes) == 1)
            pool._timeout = LIMIT  # of the process that takes the place of this one
            os.kill(pool.processes[0], signal.SIGKILL)
            await check_good(pool)

        using(work, timeout=0.1)

    @pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
    def test_a_process_that_is_lost_once_costs_no_picture(self, name: str, tmp_path: Path) -> None:
        async def work(pool: DecoderPool) -> None:
            pool._timeout = LIMIT  # of the process that takes the place of the first
            before = pool.processes
            assert (await pool.decode(f"!once {tmp_path} {name}".encode())).size == (1, 1)
            await check_good(pool)
            assert len(pool.processes) == 1
            assert pool.processes != before

        using(work, timeout=0.5 if name == "SIGSTOP" else LIMIT)

    def test_an_idle_process_that_was_stopped_goes_on(self) -> None:
        async def work(pool: DecoderPool) -> None:
            before = pool.processes
            for process in before:
                os.kill(process, signal.SIGSTOP)
                os.waitid(os.P_PID, process, os.WSTOPPED | os.WNOWAIT)
            await asyncio.gather(*(check_good(pool) for _ in range(4)))
            assert sorted(pool.processes) == sorted(before)

        using(work, 2)

    def test_processes_killed_at_any_moment_cost_no_picture_if_each_is_killed_once(self) -> None:
        async def work(pool: DecoderPool) -> None:
            for number in range(0, 20, 4):
                waiting = asyncio.create_task(check_good(pool))
                for _ in range(number):
                    await asyncio.sleep(0)
                for process in pool.processes:
                    os.kill(process, signal.SIGKILL)
                await waiting

        using(work)

    def test_a_place_is_kept_while_no_process_can_be_started(self, caplog: pytest.LogCaptureFixture) -> None:
        async def work(pool: DecoderPool) -> None:
            limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
                os.kill(pool.processes[0], signal.SIGKILL)
                waiting = asyncio.create_task(check_good(pool))
                await soon(lambda: "Too many open files" in caplog.text, "a start that fails")
                assert not waiting.done()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            await waiting
            await check_good(pool)

        using(work)

    def test_one_that_is_given_little_time_may_be_tried_again(self) -> None:
        async def work(pool: DecoderPool) -> None:
            with pytest.raises(TooSlowError):
                await pool.decode(b"!spin", 0.1)
            assert (await pool.decode(GOOD, LIMIT)).size == (48, 32)

        using(work)

    def test_memory_without_end(self) -> None:
        async def work(pool: DecoderPool) -> None:
            before = pool.processes
            error = await refusal(pool, b"!grow")
            assert error.code == "image_too_large"
            assert "memory" in str(error)
            await check_good(pool)
            assert pool.processes != before

        using(work, memory=200_000_000)

    def test_an_idle_process_that_ended_costs_no_picture(self) -> None:
        async def work(pool: DecoderPool) -> None:
            for process in pool.processes:
                os.kill(process, signal.SIGKILL)
                os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
            await asyncio.gather(*(check_good(pool) for _ in range(6)))

        using(work, 2)

    def test_what_stops_the_server_does_not_stop_the_processes(self) -> None:
        async def work(pool: DecoderPool) -> None:
            before = pool.processes
            for process in before:
                os.kill(process, signal.SIGTERM)
                os.kill(process, signal.SIGINT)
            await check_good(pool)
            assert pool.processes == before

        using(work)

    def test_what_a_library_prints_is_no_answer(self) -> None:
        async def work(pool: DecoderPool) -> None:
            for _ in range(3):
                assert (await pool.decode(b"!print")).size == (1, 1)
            await check_good(pool)

        using(work)

    def test_starting_is_tried_until_it_succeeds(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def work(pool: DecoderPool) -> None:
            monkeypatch.setattr(decoder, "_RETRY_SECONDS", 0.01)
            monkeypatch.setattr(decoding_process, "CHILD", "tests.serving.no_such_module")
            lost = asyncio.create_task(refusal(pool, b"!abort"))
            waiting = asyncio.create_task(check_good(pool))
            await soon(lambda: caplog.text.count("does not start") >= 2, "two attempts")
            assert not waiting.done()
            monkeypatch.setattr(decoding_process, "CHILD", "tests.serving.hostile_child")
            await waiting
            await lost

        using(work)


class TestQueue:
    @pytest.mark.usefixtures("hostile")
    def test_who_waits_first_is_served_first(self) -> None:
        order: list[int] = []

        async def work(pool: DecoderPool) -> None:
            async def decode(number: int) -> None:
                await pool.decode(b"!print")
                order.append(number)

            async with asyncio.TaskGroup() as group:
                for number in range(20):
                    group.create_task(decode(number))

        using(work)
        assert order == list(range(20))

    @pytest.mark.usefixtures("hostile")
    def test_cancelled_ones_free_their_places_and_nobody_gets_their_pictures(self, tmp_path: Path) -> None:
        async def work(pool: DecoderPool) -> None:
            before = pool.processes
            running = asyncio.create_task(pool.decode(f"!hold {tmp_path}".encode()))
            waiting = [asyncio.create_task(pool.decode(encoded("PNG", (9, 9)))) for _ in range(5)]
            last = asyncio.create_task(pool.decode(GOOD))
            await soon((tmp_path / "held").exists)
            for task in (running, *waiting):
                task.cancel()
            (tmp_path / "open").mkdir()
            assert (await last).size == (48, 32)
            assert pool.processes == before
            assert all(task.cancelled() for task in (running, *waiting))

        using(work)

    @pytest.mark.usefixtures("hostile")
    def test_cancelling_at_any_moment(self) -> None:
        async def work(pool: DecoderPool) -> None:
            for number in range(60):
                order = b"!abort" if number % 20 == 7 else encoded("PNG", (9, 9))
                tasks = [asyncio.create_task(pool.decode(order)), asyncio.create_task(pool.decode(GOOD))]
                for _ in range(20 * (number % 10)):
                    await asyncio.sleep(0)
                tasks[0].cancel()
                assert (await tasks[1]).size == (48, 32)
                await asyncio.gather(*tasks, return_exceptions=True)
            await soon(lambda: len(pool.processes) == 2)  # one may be starting

        using(work, 2)

    @pytest.mark.usefixtures("hostile")
    def test_closing_answers_all(self, tmp_path: Path) -> None:
        async def work() -> list[Image.Image | BaseException]:
            pool = DecoderPool(workers=1, timeout=LIMIT, memory_bytes=MEMORY, limits=LIMITS)
            await pool.start()
            processes = pool.processes
            tasks = [asyncio.create_task(pool.decode(f"!hold {tmp_path}".encode())) for _ in range(5)]
            await soon((tmp_path / "held").exists)
            await pool.close()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            with pytest.raises(ClosedError):
                await pool.decode(GOOD)
            for process in processes:
                with pytest.raises(ProcessLookupError):
                    os.kill(process, 0)
            await pool.close()
            return list(outcomes)

        assert [type(outcome) for outcome in run(work())] == [ClosedError] * 5

    @pytest.mark.usefixtures("hostile")
    def test_the_loop_goes_on_meanwhile(self, tmp_path: Path) -> None:
        async def work(pool: DecoderPool) -> None:
            task = asyncio.create_task(pool.decode(f"!hold {tmp_path}".encode()))
            await soon((tmp_path / "held").exists)
            assert not task.done()
            (tmp_path / "open").mkdir()
            assert (await task).size == (1, 1)

        using(work)
