"""From what was asked to what models read: few pictures at a time, and no error that spreads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any, cast

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
from qwen_vl_classifier.serving.items import Item, ItemError, error_of
from qwen_vl_classifier.serving.media import MediaReader
from qwen_vl_classifier.serving.observability import Metrics
from qwen_vl_classifier.serving.preparing import Preparation
from qwen_vl_classifier.serving.worker import Worker
from tests.serving.batch_scorer import Notes, settle
from tests.serving.client import DecoderHere
from tests.serving.clock import PATIENT
from tests.serving.saved_classifiers import files
from tests.waiting import run


@contextlib.contextmanager
def admitted(preparation: Preparation) -> Iterator[tuple[Admission, AdmittedRequest]]:
    """Let a request in."""
    batcher: Batcher[Any, Any] = Batcher(Worker("model"), Notes(), max_batch=1, max_cost=1)
    config = ServeConfig(classifiers=("a",), **PATIENT)
    admission = Admission(config, batcher=batcher, pictures=preparation.backlog, observer=Metrics())
    with admission.admit() as request:
        yield admission, request
    assert admission.held == 0


class NoReader:
    async def read(self, text: str) -> bytes:
        raise AssertionError("pictures are files here")


class Held(DecoderHere):
    """Decodes when it is told to, and takes down how many it was asked for."""

    def __init__(self) -> None:
        super().__init__(limits=ImageLimits())
        self.asked = 0
        self.open = asyncio.Event()

    async def decode(self, data: bytes) -> Image.Image:
        self.asked += 1
        await self.open.wait()
        return open_image(data)


def preparation_of(decoder: Any, at_once: int = 2) -> Preparation:
    return Preparation(cast("MediaReader", NoReader()), decoder, Metrics(), at_once=at_once)


def test_few_sets_of_pictures_are_open_at_a_time_and_texts_do_not_wait_for_them(tiny_backbone: Backbone) -> None:
    async def main() -> None:
        decoder = Held()
        preparation = preparation_of(decoder)
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
            patches = [item[processor].pictures.pixel_values.nbytes for item in made if not isinstance(item, ItemError)]
            assert admission.held == sum(patches), "pixels are given back, patches are held"

    run(main())


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
