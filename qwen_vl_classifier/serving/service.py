"""What all requests share, without HTTP: the classifiers, the queue for them, and the state of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.data.example import PanelPrediction
from qwen_vl_classifier.errors import (
    DeadlineError,
    QwenVLClassifierError,
)
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.images.fetching import Fetcher
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.serving.admission import Admission, AdmittedRequest
from qwen_vl_classifier.serving.batcher import Batcher
from qwen_vl_classifier.serving.decoder import DecoderPool
from qwen_vl_classifier.serving.explaining import Explainer
from qwen_vl_classifier.serving.fair_queue import Share
from qwen_vl_classifier.serving.items import Item, ItemError, ItemResult, LabelResult, check_item, error_of
from qwen_vl_classifier.serving.media import MediaReader
from qwen_vl_classifier.serving.models.label_names import label_model
from qwen_vl_classifier.serving.models.model_set import ModelSet
from qwen_vl_classifier.serving.models.registry import Registry
from qwen_vl_classifier.serving.preparing import Preparation, Prepared, all_of
from qwen_vl_classifier.serving.worker import Steps, Worker

if TYPE_CHECKING:  # they bring torch
    from qwen_vl_classifier.backbone.processor import Processor
    from qwen_vl_classifier.evaluation.explanation import Baseline, Explanation, Method
    from qwen_vl_classifier.serving.models.panels import Probabilities, Scoring, ServedPanel
    from qwen_vl_classifier.serving.observability.prometheus import Metrics

State: TypeAlias = Literal["loading", "warming", "ready", "draining", "failed"]

_LARGE_BODY = 2_000_000  # bytes
_PASS = 0.1  # share of the deadline that one pass may be expected to take

_log = logging.getLogger(__name__)


class Service:
    """Classifiers that are loaded once and serve many requests.

    Args:
        config: What to serve and how.
        metrics: Told what happens.
        on_ready: Called in the event loop once requests are answered.
        on_failure: Called in the event loop when the classifiers cannot be loaded, or when the batcher fails by a
            defect; the default logs it.
        others_loaded: Waited for before requests are answered, where other processes serve the same: none is ready
            before all are.

    Attributes:
        config: What to serve and how.
        registry: The classifiers that are served, and what changes them.
        admission: Decides which requests are taken.
        batcher: Scores what they hold.

    Raises:
        ConfigError: No classifiers, or two of the same name.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        metrics: Metrics,
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[Exception], None] | None = None,
        others_loaded: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self.config = config
        self._metrics = metrics
        self._on_ready = on_ready
        self._on_failure = on_failure or _log_failure
        self._others_loaded = others_loaded
        self._state: State = "loading"
        limits = ImageLimits(
            max_pixels=config.max_pixels,
            max_bytes=config.max_image_bytes,
            formats=config.formats,
            grey_bits=config.grey_bits,
        )
        if "HEIC" in limits.formats:
            require("pillow_heif", extra="heic")
        hosts = config.names_of("url_hosts")
        self._reader = MediaReader(
            limits=limits,
            fetcher=Fetcher(hosts, max_bytes=config.max_image_bytes) if hosts else None,
            root=Path(config.image_root) if config.image_root else None,
        )
        self._decoder = DecoderPool(
            workers=config.decode_workers,
            timeout=config.decode_timeout,
            memory_bytes=config.decode_memory,
            limits=limits,
        )
        self._preparation = Preparation(self._reader, self._decoder, metrics, at_once=config.decode_workers)
        self._parsers = (Worker("parse"), Worker("parse-large"))  # a large body is parsed while small ones pass it
        self._model_worker = Worker("model")  # passes of all backbones, and explanations, run here and never at once
        self.batcher: Batcher[Scoring, Any] = Batcher(
            self._model_worker,
            metrics,
            max_batch=config.max_batch,
            max_cost=config.max_batch_tokens,
            max_seconds=_PASS * config.deadline,
            on_failure=self._fail_batching,
        )
        pictures = self._preparation.pictures.queue
        self.admission = Admission(config, model=self.batcher.queue, pictures=pictures, observer=metrics)
        steps = Steps(self._model_worker, lambda: self.batcher.oldest)
        self.registry = Registry(config, steps=steps, decode=self._decoder.decode, metrics=metrics)
        self._explainer = Explainer(
            config,
            admission=self.admission,
            preparation=self._preparation,
            steps=steps,
            most_cost=lambda: self.batcher.most_cost,
        )

    @property
    def state(self) -> State:
        """The state of the service: "loading", "warming", "ready" and "draining", one after the other, or "failed"."""
        return self._state

    @property
    def served(self) -> ModelSet:
        """The classifiers that are served now. A request takes this once, and is answered by nothing else."""
        return self.registry.served

    @property
    def stuck_seconds(self) -> float:
        """How much longer the pass that runs has taken than any caller could wait for it; 0 if none has."""
        if self._state not in ("ready", "draining"):
            return 0.0
        return max(0.0, self._model_worker.running_seconds - self.config.deadline)

    def parser_of(self, nbytes: int) -> Worker:
        """Return the thread that parses bodies of a size."""
        return self._parsers[nbytes > _LARGE_BODY]

    async def load(self) -> None:
        """Load the classifiers and run a first pass, or call `on_failure`."""
        try:
            await self._decoder.start()
            loaded = await self.registry.load()
            self._move("loading", "warming")
            if self._state == "warming":  # and not draining already
                await self.registry.begin(loaded)
            if self._others_loaded is not None:
                await self._others_loaded()
        except Exception as error:
            if self._state != "draining":
                self._fail(error)
        else:
            self._move("warming", "ready")

    def drain(self) -> None:
        """Accept no more requests."""
        if self._state != "failed":
            self._set_state("draining")

    async def close(self) -> None:
        """Finish all requests that were accepted, in the seconds that `config.grace` gives them, and end what runs."""
        self.drain()
        await self.registry.close()
        end = asyncio.get_running_loop().time() + self.config.grace
        try:
            for finished in (self.admission.wait_until_idle, self.batcher.close):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(end):
                        await finished()
        finally:
            await self._decoder.close()
            self._reader.close()
            self._preparation.stop()
            for parser in self._parsers:
                parser.stop()
            self._model_worker.stop()
            self._explainer.stop()

    async def classify(
        self, items: Sequence[Item | ItemError], models: Sequence[str], request: AdmittedRequest, served: ModelSet
    ) -> list[ItemResult | ItemError]:
        """Prepare and score the items of one request, each by itself.

        Args:
            items: The items; an error stays where it is.
            models: The names of the classifiers and saved panels to use, each once; those of one backbone share a pass.
            request: The request whose items they are.
            served: The classifiers that were served when it came, which alone answer it.

        Returns:
            For each item what the classifiers say, or its error.

        Raises:
            DeadlineError: It took too long.
            QueueFullError: Too many others wait already.
            ClosedError: The service is closing.
        """
        passes = [
            _Pass(panel.processor, panel.score, [names] * len(items)) for panel, names in served.panels_of(models)
        ]
        return [
            outcome if isinstance(outcome, ItemError) else self._merged(*outcome, models, served)
            for outcome in await self._score(items, passes, request)
        ]

    async def read_labels(
        self, prompts: Sequence[Item], labels: Sequence[tuple[str, ...]], panel: ServedPanel, request: AdmittedRequest
    ) -> list[LabelResult | ItemError]:
        """Prepare the prompts of one request, and read how likely each of some words is as the next token.

        Args:
            prompts: The prompts; what several begin with is read once.
            labels: For each prompt the words, which the panel's `label_reader` must have.
            panel: Whose backbone answers.
            request: The request whose prompts they are.

        Returns:
            For each prompt the probabilities, or its error.

        Raises:
            DeadlineError: It took too long.
            QueueFullError: Too many others wait already.
            ClosedError: The service is closing.
        """
        passes = [_Pass(panel.processor, panel.label_reader.score, labels, alike=True)]
        return [
            outcome if isinstance(outcome, ItemError) else _label_result(*outcome)
            for outcome in await self._score(prompts, passes, request)
        ]

    async def _score(
        self, items: Sequence[Item | ItemError], passes: Sequence[_Pass], request: AdmittedRequest
    ) -> list[tuple[list[Any], int] | ItemError]:
        """Prepare items and score them in passes of one or several backbones.

        Returns:
            For each item its results or exceptions, one of each pass, and its tokens in all of them; or its error.
        """
        checked = [self._checked(item) for item in items]
        try:
            async with asyncio.timeout_at(request.deadline):
                processors: list[Processor] = list(dict.fromkeys(one.processor for one in passes))
                prepared = await self._preparation.prepare(checked, processors, request)
        except TimeoutError:
            raise DeadlineError("the examples were not ready before the deadline; send fewer or smaller ones") from None
        prepared = [self._within_limit(item) for item in prepared]
        good = {row: item for row, item in enumerate(prepared) if not isinstance(item, ItemError)}
        inputs = [one.inputs(good) for one in passes]
        tokens = [sum(len(example.ids) for example, _ in of_passes) for of_passes in zip(*inputs, strict=True)]
        costs = [one.costs(scorings) for one, scorings in zip(passes, inputs, strict=True)]
        share = Share()
        if good:
            request.check_examples(share, len(good) * len(passes), sum(map(sum, costs)))
        found = await all_of(
            [
                self.batcher.submit(one.score, scorings, cost, request.deadline, share)
                for one, scorings, cost in zip(passes, inputs, costs, strict=True)
            ]
        )
        outcomes: list[tuple[list[Any], int] | ItemError] = [item for item in prepared if isinstance(item, ItemError)]
        for place, row in enumerate(good):
            outcomes.insert(row, ([results[place] for results in found], tokens[place]))
        return outcomes

    async def explain(
        self,
        item: Item,
        model: str,
        method: Method,
        request: AdmittedRequest,
        served: ModelSet,
        *,
        baseline: Baseline | None = None,
    ) -> tuple[Explanation, bytes] | ItemError:
        """Explain the answer of one classifier for one item, pass by pass.

        An example that waits to be classified waits for one of these passes at most.

        Args:
            item: The item.
            model: The classifier's name.
            method: As in `evaluation.explain`.
            request: The request whose item it is. Once its caller is gone, the explanation ends before its next pass.
            served: The classifiers that were served when the request came.
            baseline: As in `evaluation.explain`.

        Returns:
            The explanation and a PNG file of its heat maps and words, or what is wrong with the item.

        Raises:
            DeadlineError: It took too long.
            QueueFullError: Too many explanations are in progress already, or this one would not be done in time.
            ClosedError: The service is closing.
        """
        checked = self._checked(item)
        if isinstance(checked, ItemError):
            return checked
        return await self._explainer.explain(item, served.panel_of(model), model, method, request, baseline)

    def _within_limit(self, item: Prepared | ItemError) -> Prepared | ItemError:
        """Return an example if one pass may hold it: nobody can interrupt a pass."""
        most = self.config.max_example_tokens
        tokens = 0 if isinstance(item, ItemError) else max(len(example.ids) for example in item.values())
        if tokens <= most:
            return item
        return ItemError(
            "example_too_large",
            f"text and pictures make {tokens:,} tokens; expected at most {most:,}; send a shorter text or smaller "
            "pictures",
        )

    def _checked(self, item: Item | ItemError) -> Item | ItemError:
        if isinstance(item, ItemError):
            return item
        return check_item(item, max_text_chars=self.config.max_text_chars) or item

    def _merged(
        self, results: Sequence[Probabilities | BaseException], tokens: int, models: Sequence[str], served: ModelSet
    ) -> ItemResult | ItemError:
        """Put together what classifiers of several backbones say of one item."""
        merged: Probabilities = {}
        for result in results:
            if isinstance(result, BaseException):
                return error_of(result)
            merged |= result
        if not all(math.isfinite(probability) for pair in merged.values() for probability in pair):
            return error_of(ArithmeticError("a probability is not a number"))
        from qwen_vl_classifier.serving.models.panels import answer_of  # brings torch

        panels: dict[str, PanelPrediction] = {}
        for name in models:
            if name in served.saved_panels:
                answer = panels[name] = answer_of(name, served.saved_panels[name], merged)
                decisions = {label_model(name, label): one.decision for label, one in answer.labels.items()}
            else:
                decisions = {name: served.models[name].decision_of(merged[name][1]).decision}
            for model, decision in decisions.items():
                self._metrics.answered(served.counted_as(model), merged[model][1], decision)
        used = dict.fromkeys(model for name in models for model in served.classifiers_of(name))
        return ItemResult({model: merged[model] for model in used}, tokens, panels)

    def _move(self, before: State, after: State) -> None:
        if self._state == before:  # and not draining already
            self._set_state(after)
            if after == "ready":
                self._on_ready()

    def _set_state(self, state: State) -> None:
        self._state = state
        self._metrics.ready(state == "ready")

    def _fail(self, error: Exception) -> None:
        self._set_state("failed")
        self._on_failure(error)

    def _fail_batching(self, error: BaseException) -> None:
        failure = RuntimeError("batches can no longer be made")
        failure.__cause__ = error
        self._fail(failure)


@dataclass(frozen=True, slots=True)
class _Pass:
    """What a backbone is to read of several items, and how that is scored.

    Attributes:
        processor: Of the backbone.
        score: Scores what was read.
        words: For each item, what its scoring takes beside the example.
        alike: Whether the items may begin with the same tokens.
    """

    processor: Processor
    score: Callable[[Sequence[Scoring]], Sequence[Any]]
    words: Sequence[tuple[str, ...]]
    alike: bool = False

    def inputs(self, good: Mapping[int, Prepared]) -> list[Scoring]:
        """Return what is to be scored of the items that are ready, by their number."""
        examples = [item[self.processor] for item in good.values()]
        if self.alike:
            from qwen_vl_classifier.backbone.planning import with_common_prefixes  # brings torch

            examples = with_common_prefixes(examples)
        return [(example, self.words[row]) for row, example in zip(good, examples, strict=True)]

    def costs(self, scorings: Sequence[Scoring]) -> list[int]:
        """Return how many tokens each adds to those before it: what items begin with alike counts once."""
        costs = []
        begun: set[tuple[bytes, bytes]] = set()
        for example, _ in scorings:
            key = example.pictures.key, example.prefix_key
            known = self.alike and example.shares_prefix and key in begun
            begun.add(key)
            costs.append(len(example.ids) - (example.prefix_length if known else 0))
        return costs


def _label_result(results: Sequence[dict[str, float] | BaseException], tokens: int) -> LabelResult | ItemError:
    (found,) = results
    if isinstance(found, BaseException):
        return error_of(found)
    if not all(map(math.isfinite, found.values())):
        return error_of(ArithmeticError("a probability is not a number"))
    return LabelResult(found, tokens)


def _log_failure(error: Exception) -> None:
    if isinstance(error, QwenVLClassifierError):
        _log.error("the classifiers could not be loaded: %s", error)
    else:
        _log.error("the classifiers cannot be served", exc_info=error)
