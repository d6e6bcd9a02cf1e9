"""From what was asked to what models read: few pictures at a time, and no error that spreads."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from PIL import Image

from qwen_vl_classifier import Backbone
from qwen_vl_classifier.backbone.processor import Processor
from qwen_vl_classifier.errors import QueueFullError, TextError
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.images.opening import open_image
from qwen_vl_classifier.serving.items import Ask, ItemError
from qwen_vl_classifier.serving.memory import ByteBudget, PictureShare
from qwen_vl_classifier.serving.observability import Metrics
from qwen_vl_classifier.serving.preparing import Preparation, error_of
from tests.serving.batch_scorer import settle
from tests.serving.client import DecoderHere
from tests.serving.clock import AGE, Clock
from tests.serving.saved_classifiers import files
from tests.waiting import run

SECONDS = 30 * AGE


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
    return Preparation(reader=NoReader(), decoder=decoder, observer=Metrics(), at_once=at_once)


def test_few_sets_of_pictures_are_open_at_a_time_and_texts_do_not_wait_for_them(tiny_backbone: Backbone) -> None:
    async def main() -> None:
        decoder = Held()
        preparation = preparation_of(decoder)
        budget = ByteBudget(10**9)
        processors = [tiny_backbone.processor]
        with PictureShare(budget) as share:
            asks = [Ask("x", (file,)) for file in files(6)]
            task = asyncio.create_task(preparation.prepare(asks, processors, share, seconds=SECONDS))
            await settle()
            assert decoder.asked == 2
            (text,) = await preparation.prepare([Ask("y")], processors, share, seconds=SECONDS)
            assert not isinstance(text, ItemError)
            decoder.open.set()
            made = await task
            assert decoder.asked == 6
            patches = [item[0].pictures.pixel_values.nbytes for item in made if not isinstance(item, ItemError)]
            assert budget.held == sum(patches), "pixels are given back, patches are held"
        assert budget.held == 0

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
        with PictureShare(ByteBudget(10**9)) as share:
            asks = [Ask(text, (file,)) for text in ("a", "bug", "b")]
            preparation = preparation_of(DecoderHere(limits=ImageLimits()))
            return await preparation.prepare(asks, [tiny_backbone.processor], share, seconds=SECONDS)

    first, error, last = run(main())
    assert isinstance(error, ItemError)
    assert "secret" not in error.message
    assert "secret" in caplog.text
    assert first[0].pictures is last[0].pictures


def test_what_would_hardly_be_decoded_in_time_is_sent_away_unless_it_is_alone(tiny_backbone: Backbone) -> None:
    async def main() -> None:
        clock = Clock()
        decoder = Held()
        preparation = preparation_of(decoder)
        processors = [tiny_backbone.processor]
        one, other = ([Ask("x", (file,))] for file in files(2))
        with PictureShare(ByteBudget(10**9)) as share:
            task = asyncio.create_task(preparation.prepare(one, processors, share, seconds=SECONDS))
            await settle()
            clock.ahead += 20 * AGE
            decoder.open.set()
            await task
            assert preparation.refusal(1, SECONDS) is None, "it would be alone"
            decoder.open.clear()
            task = asyncio.create_task(preparation.prepare(one, processors, share, seconds=SECONDS))
            await settle()
            with pytest.raises(QueueFullError, match="1 sets of pictures came that would hardly") as caught:
                await preparation.prepare(other, processors, share, seconds=SECONDS)
            assert caught.value.retry_after >= 20 * AGE
            await preparation.prepare([Ask("text alone")], processors, share, seconds=SECONDS)
            decoder.open.set()
            await task

    run(main())


def test_a_text_beyond_the_models_positions_is_an_error_of_its_item() -> None:
    error = error_of(TextError("the text has 40,000 tokens; expected at most 32,768; shorten it"))
    assert (error.code, error.status) == ("text_too_large", 413)
    assert "40,000 tokens" in error.message
