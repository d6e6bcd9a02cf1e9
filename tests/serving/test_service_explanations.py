"""Explanations behind the service: what `explain` says, never beside a pass, and none for those who have gone."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Classifier, Example, ServeConfig, Tap, explain
from qwen_vl_classifier.errors import DeadlineError, QueueFullError
from qwen_vl_classifier.serving import panels
from qwen_vl_classifier.serving.items import Item, ItemError, ItemResult
from qwen_vl_classifier.serving.panels import ServedPanel
from tests.serving.batch_scorer import settle
from tests.serving.client import classify, explain_item, picture, waiting
from tests.serving.clock import AGE, Clock
from tests.serving.saved_classifiers import ready
from tests.waiting import run, soon


class Held:
    """Stands for `explain`: waits until it is let go, then runs passes as an explanation does."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.passes = 0

    def __call__(self, classifier: Classifier, example: Example, *, method: str, baseline: str | None) -> Any:
        self.entered.set()
        self.open.wait()
        for _ in range(3):
            classifier.predict_proba([example])
            self.passes += 1
        return explain(classifier, example, method="tokens")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held()
    monkeypatch.setattr(panels, "explain", held)
    yield held
    held.open.set()


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_it_says_what_explain_says_and_draws_it(
    loaded: ServeConfig, tiny_classifier: Classifier, pictures: int
) -> None:
    images = (picture("red"), picture("blue", "JPEG", (140, 60)))[:pictures]

    async def main() -> Any:
        async with ready(loaded) as service:
            found = await explain_item(service, Item("It is red.", images), "claims", "gradients")
            assert service.admission.held == 0
            return found

    explanation, png = run(main())
    expected = explain(tiny_classifier, Example(images, "It is red."))
    assert explanation.words == expected.words
    assert explanation.probability == expected.probability
    assert len(explanation.patches) == pictures
    for seen, right in zip(explanation.patches, expected.patches, strict=True):
        np.testing.assert_array_equal(seen, right)
    drawn = Image.open(io.BytesIO(png))
    assert drawn.format == "PNG"
    assert drawn.width >= 768


def test_no_pass_runs_beside_it_and_those_who_wait_are_answered(loaded: ServeConfig, held: Held) -> None:
    async def main() -> None:
        async with ready(loaded) as service:
            explaining = asyncio.create_task(explain_item(service, Item("a"), "claims", "tokens"))
            await soon(held.entered.is_set)
            asking = asyncio.create_task(classify(service, [Item("b")], ["claims"]))
            await waiting(service, 1)
            assert not asking.done()
            held.open.set()
            (answer,) = await asking
            assert isinstance(answer, ItemResult)
            assert held.passes == 3
            assert not isinstance(await explaining, ItemError)

    run(main())


def test_it_ends_before_the_next_pass_once_its_caller_has_gone(loaded: ServeConfig, held: Held) -> None:
    async def main() -> None:
        async with ready(replace(loaded, deadline=AGE)) as service:
            clock = Clock()
            explaining = asyncio.create_task(explain_item(service, Item("a"), "claims", "tokens"))
            await soon(held.entered.is_set)
            clock.ahead += AGE
            with pytest.raises(DeadlineError):
                await explaining
            asking = asyncio.create_task(classify(service, [Item("b")], ["claims"]))
            await waiting(service, 1)
            assert not asking.done(), "the thread is not free yet"
            held.open.set()
            (answer,) = await asking
            assert isinstance(answer, ItemResult), "and the hook is gone"

    run(main())
    assert held.passes == 0


def test_few_wait_at_a_time(loaded: ServeConfig, held: Held) -> None:
    async def main() -> None:
        async with ready(loaded) as service:
            tasks = [asyncio.create_task(explain_item(service, Item("a"), "claims", "tokens")) for _ in range(4)]
            await soon(held.entered.is_set)
            await soon(lambda: service.admission.requests == 4)
            await settle()
            with pytest.raises(QueueFullError, match="4 explanations are in progress"):
                await explain_item(service, Item("a"), "claims", "tokens")
            held.open.set()
            assert all(not isinstance(found, ItemError) for found in await asyncio.gather(*tasks))
            assert not isinstance(await explain_item(service, Item("a"), "claims", "tokens"), ItemError)

    run(main())


def test_what_is_wrong_is_told(
    loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch, tiny_classifier: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> list[Any]:
        async with ready(loaded) as service:
            damaged = Item("x", (picture("red")[:-20],))
            found = [await explain_item(service, ask, "claims", "tokens") for ask in (Item(" "), damaged)]
            monkeypatch.setattr(tiny_classifier, "tap", Tap(-1, "last"))
            found.append(await explain_item(service, Item("x"), "claims", "tokens"))

            def broken(*_: object, **__: object) -> None:
                raise RuntimeError("/home/secret")

            monkeypatch.setattr(ServedPanel, "explain", broken)
            found.append(await explain_item(service, Item("x"), "claims", "tokens"))
            return found

    errors = run(main())
    assert [error.code for error in errors] == ["invalid_item", "image_damaged", "invalid_item", "internal_error"]
    assert "secret" not in errors[-1].message
    assert "secret" in caplog.text
