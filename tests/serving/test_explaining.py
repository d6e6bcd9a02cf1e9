"""Explanations behind the service: what `explain` says, never beside a pass, and none for those who have gone."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Classifier, Example, ServeConfig, Tap, explain
from qwen_vl_classifier.errors import DeadlineError, QueueFullError
from qwen_vl_classifier.serving import groups
from qwen_vl_classifier.serving.groups import Group
from qwen_vl_classifier.serving.items import Ask, ItemError, Scored
from tests.serving.client import picture, waiting
from tests.serving.clock import AGE, FOREVER, Clock, after
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
    monkeypatch.setattr(groups, "explain", held)
    yield held
    held.open.set()


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_it_says_what_explain_says_and_draws_it(
    loaded: ServeConfig, tiny_classifier: Classifier, pictures: int
) -> None:
    images = (picture("red"), picture("blue", "JPEG", (140, 60)))[:pictures]

    async def main() -> Any:
        async with ready(loaded) as service:
            found = await service.explain(Ask("It is red.", images), "claims", "gradients", after(FOREVER))
            assert service._memory.held == 0
            return found

    explanation, png = run(main())
    expected = explain(tiny_classifier, Example(images, "It is red."))
    assert explanation.words == expected.words
    assert explanation.probability == expected.probability
    assert len(explanation.patches) == pictures
    for seen, wanted in zip(explanation.patches, expected.patches, strict=True):
        np.testing.assert_array_equal(seen, wanted)
    drawn = Image.open(io.BytesIO(png))
    assert drawn.format == "PNG"
    assert drawn.width >= 768


def test_no_pass_runs_beside_it_and_those_who_wait_are_answered(loaded: ServeConfig, held: Held) -> None:
    async def main() -> None:
        async with ready(loaded) as service:
            explaining = asyncio.create_task(service.explain(Ask("a"), "claims", "tokens", after(FOREVER)))
            await soon(held.entered.is_set)
            asking = asyncio.create_task(service.classify([Ask("b")], ["claims"], after(FOREVER)))
            await waiting(service, 1)
            assert not asking.done()
            held.open.set()
            (answer,) = await asking
            assert isinstance(answer, Scored)
            assert held.passes == 3
            assert not isinstance(await explaining, ItemError)

    run(main())


def test_it_ends_before_the_next_pass_once_its_caller_has_gone(loaded: ServeConfig, held: Held) -> None:
    async def main() -> None:
        async with ready(loaded) as service:
            clock = Clock()
            explaining = asyncio.create_task(service.explain(Ask("a"), "claims", "tokens", after(AGE)))
            await soon(held.entered.is_set)
            clock.ahead += AGE
            with pytest.raises(DeadlineError):
                await explaining
            asking = asyncio.create_task(service.classify([Ask("b")], ["claims"], after(FOREVER)))
            await waiting(service, 1)
            assert not asking.done(), "the thread is not free yet"
            held.open.set()
            (answer,) = await asking
            assert isinstance(answer, Scored), "and the hook is gone"

    run(main())
    assert held.passes == 0


def test_few_wait_at_a_time(loaded: ServeConfig, held: Held) -> None:
    async def main() -> None:
        async with ready(loaded) as service:
            tasks = [
                asyncio.create_task(service.explain(Ask("a"), "claims", "tokens", after(FOREVER))) for _ in range(4)
            ]
            await soon(held.entered.is_set)
            await soon(lambda: len(service._explainer._running) == 4)
            with pytest.raises(QueueFullError, match="4 others wait"):
                await service.explain(Ask("a"), "claims", "tokens", after(FOREVER))
            held.open.set()
            assert all(not isinstance(found, ItemError) for found in await asyncio.gather(*tasks))
            assert not isinstance(await service.explain(Ask("a"), "claims", "tokens", after(FOREVER)), ItemError)

    run(main())


def test_what_is_wrong_is_told(
    loaded: ServeConfig, monkeypatch: pytest.MonkeyPatch, tiny_classifier: Classifier, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> list[Any]:
        async with ready(loaded) as service:
            damaged = Ask("x", (picture("red")[:-20],))
            found = [await service.explain(ask, "claims", "tokens", after(FOREVER)) for ask in (Ask(" "), damaged)]
            monkeypatch.setattr(tiny_classifier, "tap", Tap(-1, "last"))
            found.append(await service.explain(Ask("x"), "claims", "tokens", after(FOREVER)))

            def broken(*_: object, **__: object) -> None:
                raise RuntimeError("/home/secret")

            monkeypatch.setattr(Group, "explain", broken)
            found.append(await service.explain(Ask("x"), "claims", "tokens", after(FOREVER)))
            return found

    errors = run(main())
    assert [error.code for error in errors] == ["invalid_item", "image_damaged", "invalid_item", "internal_error"]
    assert "secret" not in errors[-1].message
    assert "secret" in caplog.text
