"""Explanations behind the service: what `explain` says, pass by pass, and none for those who have gone."""

from __future__ import annotations

import asyncio
import io
import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen_vl_classifier import Classifier, Example, ServeConfig, Tap, explain
from qwen_vl_classifier.errors import ClosedError, DeadlineError, QueueFullError
from qwen_vl_classifier.evaluation.explanation import Explanation, PlannedExplanation
from qwen_vl_classifier.serving.items import Item, ItemError, ItemResult
from qwen_vl_classifier.serving.models.panels import Probabilities, Scoring, ServedPanel
from qwen_vl_classifier.serving.service import Service
from tests.serving.batch_scorer import settle
from tests.serving.client import classify, explain_item, picture, waiting
from tests.serving.clock import AGE, Clock
from tests.serving.saved_classifiers import ready
from tests.waiting import run, soon


class Passes:
    """Takes down in which order the model runs passes, and can hold those of explanations.

    Attributes:
        log: For each pass what it was of: the number of an explanation, as they came, or the texts of a batch.
        entered: Set once a pass of an explanation has begun.
    """

    def __init__(self) -> None:
        self.log: list[int | tuple[str, ...]] = []
        self.entered = threading.Event()
        self.open = threading.Event()
        self.one = threading.Semaphore(0)
        self.numbers: dict[int, int] = {}

    def explains(self, planned: PlannedExplanation) -> None:
        """Record a pass of an explanation, and hold it until it, or all, are let go."""
        self.log.append(self.numbers.setdefault(id(planned), len(self.numbers)))
        self.entered.set()
        while not self.open.is_set() and not self.one.acquire(timeout=0.01):
            pass

    def scores(self, panel: ServedPanel, scorings: Sequence[Scoring]) -> None:
        """Record a batch, but for that which warms up."""
        decode = panel.processor.tokenizer.decode
        words = tuple(decode(example.ids[slice(*example.spans.text)]) for example, _ in scorings)
        if words != ("The picture is grey.",):
            self.log.append(words)

    @property
    def count(self) -> int:
        return sum(isinstance(entry, int) for entry in self.log)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    passes = Passes()
    run_pass, score = PlannedExplanation.run_pass, ServedPanel.score

    def run_and_record(planned: PlannedExplanation) -> Explanation | None:
        passes.explains(planned)
        return run_pass(planned)

    def score_and_record(panel: ServedPanel, scorings: Sequence[Scoring]) -> list[Probabilities]:
        passes.scores(panel, scorings)
        return score(panel, scorings)

    monkeypatch.setattr(PlannedExplanation, "run_pass", run_and_record)
    monkeypatch.setattr(ServedPanel, "score", score_and_record)
    yield passes
    passes.open.set()


def begin(service: Service, method: str = "gradients") -> asyncio.Task[Any]:
    return asyncio.create_task(explain_item(service, Item("a"), "claims", method))


def ask(service: Service, *words: str) -> asyncio.Task[Any]:
    return asyncio.create_task(classify(service, [Item(word) for word in words], ["claims"]))


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


def test_who_waits_for_a_classification_waits_for_one_pass_of_explanations(loaded: ServeConfig, passes: Passes) -> None:
    """However many explanations there are, and however many batches a request takes."""

    async def main() -> None:
        async with ready(replace(loaded, max_batch=1)) as service:
            explaining = [begin(service) for _ in range(3)]
            await soon(passes.entered.is_set)
            await soon(lambda: service.admission.requests == 3)
            passes.log.clear()
            asking = ask(service, "b", "c", "d")
            await waiting(service, 3)
            passes.open.set()
            assert all(isinstance(answer, ItemResult) for answer in await asking)
            answered = len(passes.log)
            assert passes.log[:3] == [("b",), ("c",), ("d",)], "none but the pass that ran already"
            assert not any(isinstance(found, ItemError) for found in await asyncio.gather(*explaining))
            assert len(passes.log) > answered

    run(main())


def test_those_who_come_during_a_batch_wait_for_one_pass_too(loaded: ServeConfig, passes: Passes) -> None:
    async def main() -> None:
        async with ready(replace(loaded, max_batch=1)) as service:
            explaining = [begin(service) for _ in range(2)]
            await soon(passes.entered.is_set)
            passes.log.clear()
            for _ in range(6):
                asking = ask(service, "b", "c")
                await waiting(service, 2)
                passes.entered.clear()
                passes.one.release()
                await soon(passes.entered.is_set)
                assert all(isinstance(answer, ItemResult) for answer in await asking)
            passes.open.set()
            await asyncio.gather(*explaining)

    run(main())
    batches = [entry for entry in passes.log if not isinstance(entry, int)]
    assert batches == [("b",), ("c",)] * 6
    between = [
        list(group) for kind, group in itertools.groupby(passes.log, lambda entry: isinstance(entry, int)) if kind
    ]
    assert all(len(group) == 1 for group in between[:5]), "an explanation is not starved: one pass for each turnover"


def test_explanations_take_turns(loaded: ServeConfig, passes: Passes) -> None:
    async def main() -> None:
        async with ready(loaded) as service:
            long = begin(service)
            await soon(passes.entered.is_set)
            short = begin(service, "tokens")
            other = begin(service)
            await soon(lambda: service.admission.requests == 3)
            await soon(lambda: len(passes.numbers) == 1)
            await settle()
            passes.open.set()
            await asyncio.gather(long, short, other)

    run(main())
    first = {number: passes.log.index(number) for number in passes.numbers.values()}
    assert passes.count == 19 + 1 + 19
    assert max(first.values()) < 30, "none waits for the end of a long one"


def test_answers_beside_explanations_are_the_same_bit_by_bit(loaded: ServeConfig, tiny_classifier: Classifier) -> None:
    """And between two passes neither hooks nor modes of an explanation are left."""
    item = Item("It is red.", (picture("red"),))
    model: Any = tiny_classifier.backbone.model
    modes: list[tuple[bool, bool]] = []

    def look() -> None:
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    async def main() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            async with ready(loaded) as service:
                (alone,) = await classify(service, [item], ["claims"])
                worker = service._model_worker
                await worker.run(look)
                for method in ("gradients", "tokens", "occlusion"):
                    explaining = asyncio.create_task(explain_item(service, item, "claims", method))
                    beside = []
                    while not explaining.done():
                        beside += await classify(service, [item], ["claims"])
                        async with worker.turn:
                            await worker.run(look)
                    assert not isinstance(await explaining, ItemError)
                    assert beside
                    assert all(answer.probabilities == alone.probabilities for answer in beside)
        finally:
            torch.set_num_threads(threads)

    run(main())
    assert len(set(modes)) == 1


@pytest.mark.parametrize("leaving", ["deadline", "caller"])
def test_it_ends_before_the_next_pass_once_its_caller_has_gone(
    loaded: ServeConfig, passes: Passes, leaving: str
) -> None:
    async def main() -> None:
        async with ready(replace(loaded, deadline=AGE)) as service:
            clock = Clock()
            explaining = begin(service)
            await soon(passes.entered.is_set)
            if leaving == "deadline":
                clock.ahead += AGE
                with pytest.raises(DeadlineError):
                    await explaining
            else:
                explaining.cancel()
                await asyncio.gather(explaining, return_exceptions=True)
            asking = ask(service, "b")
            await waiting(service, 1)
            assert passes.log == [0], "the thread is not free yet"
            passes.open.set()
            (answer,) = await asking
            assert isinstance(answer, ItemResult)
            assert not isinstance(await begin(service, "tokens"), ItemError)

    run(main())
    assert passes.log == [0, ("b",), 1]


def test_at_shutdown_it_is_finished_and_after_the_grace_it_ends(loaded: ServeConfig, passes: Passes) -> None:
    async def main(grace: float) -> Any:
        async with ready(replace(loaded, grace=grace)) as service:
            clock = Clock()
            explaining = begin(service)
            await soon(passes.entered.is_set)
            closing = asyncio.create_task(service.close())
            await settle()
            if grace == AGE:
                clock.ahead += AGE
                await closing
            passes.open.set()
            (found,) = await asyncio.gather(explaining, return_exceptions=True)
            await closing
            return found

    assert isinstance(run(main(AGE * 10))[0], Explanation)
    passes.entered.clear()
    passes.open.clear()
    passes.log.clear()
    assert isinstance(run(main(AGE)), ClosedError)
    assert passes.count == 1


def test_few_are_in_progress_at_a_time(loaded: ServeConfig, passes: Passes) -> None:
    async def main() -> None:
        async with ready(loaded) as service:
            tasks = [begin(service, "tokens") for _ in range(4)]
            await soon(passes.entered.is_set)
            await soon(lambda: service.admission.requests == 4)
            await settle()
            with pytest.raises(QueueFullError, match="4 explanations are in progress"):
                await begin(service, "tokens")
            passes.open.set()
            assert all(not isinstance(found, ItemError) for found in await asyncio.gather(*tasks))
            assert not isinstance(await begin(service, "tokens"), ItemError)

    run(main())


@pytest.mark.parametrize(
    ("method", "limits", "message"),
    [
        ("gradients", {}, "by gradients each counts 3 times; expected at most 16,384 in one pass; send a shorter text"),
        ("gradients", {"max_batch_tokens": 20_000}, "19 passes of .* tokens in all; expected at most 200,000; send a"),
        ("occlusion", {}, "passes of .* tokens in all; expected at most 200,000; send a shorter text"),
        ("tokens", {"max_batch_tokens": 2000}, "tokens; expected at most 2,000 in one pass; send a shorter text"),
    ],
    ids=["pass", "sum", "words", "tokens"],
)
def test_one_of_a_long_text_is_refused_before_its_first_pass(
    loaded: ServeConfig, passes: Passes, method: str, limits: dict[str, int], message: str
) -> None:
    text = " ".join(f"w{number}" for number in range(1500))

    passes.open.set()

    async def main() -> Any:
        async with ready(replace(loaded, **limits)) as service:
            return await explain_item(service, Item(text), "claims", method)

    error = run(main())
    assert (error.code, error.status) == ("explanation_too_large", 413)
    assert re.search(message, error.message), error.message
    assert passes.log == []


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

            monkeypatch.setattr(PlannedExplanation, "run_pass", broken)
            found.append(await explain_item(service, Item("x"), "claims", "gradients"))
            return found

    errors = run(main())
    assert [error.code for error in errors] == ["invalid_item", "image_damaged", "invalid_item", "internal_error"]
    assert "secret" not in errors[-1].message
    assert "secret" in caplog.text
