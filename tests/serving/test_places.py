"""Places of requests: bounded in number and, once a pace is known, in what can be done before a deadline."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from qwen_vl_classifier.errors import QueueFullError
from qwen_vl_classifier.serving.places import Places
from tests.serving.clock import AGE, Clock
from tests.waiting import run


def test_no_more_than_there_are() -> None:
    async def main() -> None:
        places = Places(2)
        with (
            places.take(60),
            places.take(60),
            pytest.raises(QueueFullError, match="2 requests are here"),
            places.take(60),
        ):
            pass
        with places.take(60):
            pass

    run(main())


def test_what_would_hardly_be_done_in_time_is_sent_away_unless_it_is_alone() -> None:
    async def main() -> None:
        clock, places = Clock(), Places(100)
        with places.take(60 * AGE):
            clock.ahead += 10 * AGE
            places.scored()  # ten for one
        with contextlib.ExitStack() as stack:
            for _ in range(3):  # the fourth would be done after 40 of 60: too near, as guesses are
                stack.enter_context(places.take(60 * AGE))
            with pytest.raises(QueueFullError, match="would hardly be done in") as caught, places.take(60 * AGE):
                pass
            assert 30 * AGE <= caught.value.retry_after <= 33 * AGE  # time goes on while the test runs
            stack.enter_context(places.take(600 * AGE))
        with places.take(1):
            pass

    run(main())


def test_one_waits_until_all_places_are_empty() -> None:
    async def main() -> None:
        places = Places(2)
        await places.wait_until_empty()
        with places.take(60):
            waiting = asyncio.create_task(places.wait_until_empty())
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting

    run(main())
