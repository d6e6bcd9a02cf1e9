"""From what was asked to what models read: few pictures at a time, and no error that spreads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, ServeConfig
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.errors import TextError
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.serving.admission import Admission, AdmittedRequest
from qwen_vl_classifier.serving.batcher import Batcher
from qwen_vl_classifier.serving.decoder import DecoderPool
from qwen_vl_classifier.serving.decoding_process import TooSlowError
from qwen_vl_classifier.serving.items import Item, ItemError, error_of
from qwen_vl_classifier.serving.media import MediaReader
from qwen_vl_classifier.serving.observability.prometheus import Metrics
from qwen_vl_classifier.serving.preparing import Preparation
from qwen_vl_classifier.serving.worker import Worker
from tests.serving.batch_scorer import Notes, settle
from tests.serving.client import DecoderHere
from tests.serving.clock import AGE, PATIENT, Clock
from tests.serving.saved_classifiers import files
from tests.waiting import LIMIT, run


@contextlib.contextmanager
def admitted(preparation: Preparation) -> Iterator[tuple[Admission, AdmittedRequest]]:
    """Let a request in."""
    batcher: Batcher[Any, Any] = Batcher(Worker("model"), Notes(), max_batch=1, max_cost=1)
    config = ServeConfig(classifiers=("a",), **PATIENT)
    admission = Admission(config, model=batcher.queue, pictures=preparation.pictures.queue, observer=Metrics())
    with admission.admit() as request:
        yield admission, request
    assert admission.held == 0


class NoReader:
    def may_wait(self, text: str) -> bool:
        return True

    async def read(self, text: str) -> bytes:
        raise AssertionError("pictures are files here")


class Held(DecoderHere):
    """Decodes when it is told to, and takes down how many it was asked for."""

    def __init__(self) -> None:
        super().__init__(limits=ImageLimits())
        self.asked = 0
        self.open = asyncio.Event()

    async def decode(self, data: bytes, seconds: float = 0) -> Image.Image:
        self.asked += 1
        await self.open.wait()
        return open_image(data)


def preparation_of(decoder: Any, at_once: int = 1) -> Preparation:
    return Preparation(cast("MediaReader", NoReader()), decoder, Metrics(), at_once=at_once)


def test_few_pictures_are_open_at_a_time_and_texts_do_not_wait_for_them(tiny_backbone: Backbone) -> None:
    async def main() -> None:
        decoder = Held()
        preparation = preparation_of(decoder, at_once=2)
        processor = tiny_backbone.processor
        with admitted(preparation) as (admission, request):
            items = [Item("x", (file,)) for file in files(6)]
            task = asyncio.create_task(preparation.prepare(items, [processor], request))
            await settle()
            assert decoder.asked == 2
            (text,) = await preparation.prepare([Item("y")], [processor], request)
            assert not isinstance(text, ItemError)
            decoder.open.set()
            made = await task
            assert decoder.asked == 6
            resized = [item[processor].pictures.nbytes for item in made if not isinstance(item, ItemError)]
            assert admission.held == sum(resized), "pictures of full size are given back, resized ones are held"

    run(main())


def test_texts_do_not_wait_while_pictures_are_resized(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    resizing, go_on = threading.Event(), threading.Event()
    resize_pictures = Processor.resize_pictures

    def held(self: Processor, images: Any, **options: Any) -> Any:
        if images:
            resizing.set()
            go_on.wait(LIMIT)
        return resize_pictures(self, images, **options)

    monkeypatch.setattr(Processor, "resize_pictures", held)

    async def main() -> None:
        preparation = preparation_of(DecoderHere(limits=ImageLimits()))
        with admitted(preparation) as (_, request):
            items = [Item("x", (file,)) for file in files(6)]
            task = asyncio.create_task(preparation.prepare(items, [tiny_backbone.processor], request))
            await asyncio.to_thread(resizing.wait)
            (text,) = await preparation.prepare([Item("y")], [tiny_backbone.processor], request)
            assert not isinstance(text, ItemError)
            assert not task.done()
            go_on.set()
            await task

    run(main())


def test_pictures_that_take_long_do_not_keep_those_of_others_waiting(tiny_backbone: Backbone) -> None:
    """Four requests of three pictures that take an age each; one that comes then has its turn before their second."""

    async def main() -> None:
        clock, order, go_on = Clock(), [], asyncio.Event()

        class Slow(DecoderHere):
            async def decode(self, data: bytes, seconds: float = 0) -> Image.Image:
                order.append(names[data])
                await go_on.wait()
                if names[data] != "honest":
                    clock.ahead += AGE
                return open_image(data)

        preparation = preparation_of(Slow(limits=ImageLimits()))
        *others, honest = files(13)
        names = {file: f"attacker {number // 3}" for number, file in enumerate(others)} | {honest: "honest"}
        with admitted(preparation) as (_, request):

            async def ask(some: list[bytes]) -> None:
                items = [Item("x", (file,)) for file in some]
                made = await preparation.prepare(items, [tiny_backbone.processor], request)
                assert not any(isinstance(item, ItemError) for item in made)

            slow = [asyncio.create_task(ask(others[3 * number : 3 * number + 3])) for number in range(4)]
            await settle()
            last = asyncio.create_task(ask([honest]))
            await settle()
            assert order == ["attacker 0"]
            go_on.set()
            await asyncio.gather(last, *slow)
        assert order[:5] == ["attacker 0", "attacker 1", "attacker 2", "attacker 3", "honest"]
        assert len(order) == 13

    run(main())


def test_a_picture_that_is_not_decoded_soon_is_put_aside_and_never_takes_the_last_process(
    tiny_backbone: Backbone,
) -> None:
    async def main() -> None:
        slow, go_on = files(4), asyncio.Event()
        honest = slow.pop()
        tried: list[float] = []

        class Slow(DecoderHere):
            async def decode(self, data: bytes, seconds: float = 0) -> Image.Image:
                if data != honest:
                    tried.append(seconds)
                    if seconds:
                        raise TooSlowError("it takes long")
                    await go_on.wait()
                return open_image(data)

        preparation = preparation_of(Slow(limits=ImageLimits()), at_once=2)
        with admitted(preparation) as (_, request):
            items = [Item("x", (file,)) for file in slow]
            task = asyncio.create_task(preparation.prepare(items, [tiny_backbone.processor], request))
            await settle()
            assert [bool(seconds) for seconds in sorted(tried)] == [False] + [True] * 3
            for _ in range(3):
                (made,) = await preparation.prepare([Item("x", (honest,))], [tiny_backbone.processor], request)
                assert not isinstance(made, ItemError)
            go_on.set()
            assert not any(isinstance(item, ItemError) for item in await task)

    run(main())


def test_one_request_of_many_texts_does_not_keep_another_waiting(tiny_backbone: Backbone) -> None:
    async def main() -> None:
        preparation = preparation_of(DecoderHere(limits=ImageLimits()))
        with admitted(preparation) as (_, request):
            many = asyncio.create_task(
                preparation.prepare([Item("many words " * 700)] * 64, [tiny_backbone.processor], request)
            )
            await settle()
            await preparation.prepare([Item("few words")], [tiny_backbone.processor], request)
            assert not many.done()
            assert len(await many) == 64

    run(main())


def test_pictures_of_a_set_are_as_if_they_were_resized_together(tiny_backbone: Backbone) -> None:
    processor = tiny_backbone.processor
    some = files(3)

    async def main() -> Any:
        preparation = preparation_of(DecoderHere(limits=ImageLimits()))
        with admitted(preparation) as (_, request):
            return await preparation.prepare([Item("x", (*some, some[0]))], [processor], request)

    (made,) = run(main())
    expected = processor.resize_pictures([open_image(file) for file in (*some, some[0])])
    found = made[processor].pictures
    assert all(map(np.array_equal, found.pixels, expected.pixels))
    assert (found.grids, found.key) == (expected.grids, expected.key)


def test_a_host_that_answers_slowly_takes_no_room_from_pictures_that_are_here(tiny_backbone: Backbone) -> None:
    class SlowReader(NoReader):
        async def read(self, text: str) -> bytes:
            await asyncio.Event().wait()
            raise AssertionError("it never answers")

    async def main() -> None:
        decoder = DecoderHere(limits=ImageLimits())
        preparation = Preparation(cast("MediaReader", SlowReader()), cast("DecoderPool", decoder), Metrics(), at_once=1)
        with admitted(preparation) as (_, request):
            urls = [Item("x", (f"http://slow/{number}",)) for number in range(3)]
            slow = asyncio.create_task(preparation.prepare(urls, [tiny_backbone.processor], request))
            await settle()
            (item,) = await preparation.prepare([Item("x", (files(1)[0],))], [tiny_backbone.processor], request)
            assert not isinstance(item, ItemError)
            slow.cancel()
            await asyncio.gather(slow, return_exceptions=True)

    run(main())


def test_pictures_that_would_be_too_large_are_refused_before_they_are_resized(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would be kept until its request is over."""
    calls = 0

    def counted(*_: Any) -> Any:
        nonlocal calls
        calls += 1

    async def main() -> None:
        preparation = preparation_of(DecoderHere(limits=ImageLimits()))
        monkeypatch.setattr(Processor, "resize_pictures", counted)
        monkeypatch.setattr(Processor, "picture_bytes", lambda *_: 600_000_000)
        with admitted(preparation) as (_, request):
            items = [Item("x", (file,)) for file in files(3)]
            prepared = await preparation.prepare(items, [tiny_backbone.processor], request)
        assert [item.code for item in prepared if isinstance(item, ItemError)] == ["image_too_large"] * 3

    run(main())
    assert calls == 0


def test_a_text_that_cannot_be_read_spoils_no_other_of_its_picture(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode = Processor.encode

    def failing(self: Processor, example: Any, pictures: Any = None) -> Any:
        if example.text == "bug":
            raise RuntimeError("/home/secret")
        return encode(self, example, pictures)

    monkeypatch.setattr(Processor, "encode", failing)
    (file,) = files(1)

    async def main() -> list[Any]:
        preparation = preparation_of(DecoderHere(limits=ImageLimits()))
        with admitted(preparation) as (_, request):
            items = [Item(text, (file,)) for text in ("a", "bug", "b")]
            return await preparation.prepare(items, [tiny_backbone.processor], request)

    first, error, last = run(main())
    assert isinstance(error, ItemError)
    assert "secret" not in error.message
    assert "secret" in caplog.text
    assert first[tiny_backbone.processor].pictures is last[tiny_backbone.processor].pictures


def test_a_text_beyond_the_models_positions_is_an_error_of_its_item() -> None:
    error = error_of(TextError("the text has 40,000 tokens; expected at most 32,768; shorten it"))
    assert (error.code, error.status) == ("text_too_large", 413)
    assert "40,000 tokens" in error.message
