"""What all requests share, without HTTP: the classifiers, the batchers between them, and how things stand."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from PIL import Image

from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import (
    ArtifactError,
    ClosedError,
    ConfigError,
    DeadlineError,
    QwenVLClassifierError,
)
from qwen_vl_classifier.extras import require
from qwen_vl_classifier.images.fetching import Fetcher
from qwen_vl_classifier.images.limits import ImageLimits
from qwen_vl_classifier.serving.batcher import Batcher
from qwen_vl_classifier.serving.decoder import DecoderPool
from qwen_vl_classifier.serving.depths import Depths
from qwen_vl_classifier.serving.explaining import Explainer
from qwen_vl_classifier.serving.items import Ask, ItemError, Scored, problem_of
from qwen_vl_classifier.serving.media import MediaReader
from qwen_vl_classifier.serving.memory import ByteBudget, PictureShare
from qwen_vl_classifier.serving.places import Places
from qwen_vl_classifier.serving.preparing import Preparation, all_of, error_of
from qwen_vl_classifier.serving.worker import Worker

if TYPE_CHECKING:  # they bring torch
    from qwen_vl_classifier.backbone.processor import EncodedExample, Processor
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.evaluation.explanation import Baseline, Explanation, Method
    from qwen_vl_classifier.serving.groups import Group, Probabilities, Question
    from qwen_vl_classifier.serving.observability import Metrics

State: TypeAlias = Literal["loading", "warming", "ready", "draining", "failed"]

_WARM_SIDE = 64  # pixels of the picture that warms up
_PASS = 0.1  # share of the deadline that one pass may be expected to take

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Served:
    """A group of classifiers and the way to it."""

    group: Group
    batcher: Batcher[Question, Probabilities]

    @property
    def processor(self) -> Processor:
        return self.group.processor

    async def submit(
        self, examples: Sequence[EncodedExample], names: tuple[str, ...], deadline: float
    ) -> list[Probabilities | BaseException]:
        questions = [(example, names) for example in examples]
        return await self.batcher.submit_all(questions, [len(example.ids) for example in examples], deadline)


class Service:
    """Classifiers that are loaded once and asked by many.

    Args:
        config: What to serve and how.
        metrics: Told what happens.
        on_failure: Called in the event loop when the classifiers cannot be loaded, or batches can no longer be made;
            the default logs it.

    Attributes:
        config: What to serve and how.
        names: The classifiers' names, in the order of `config.classifiers`.
        models: The classifiers by name, once they are loaded.
        created: When that was, in seconds since 1970.

    Raises:
        ConfigError: No classifiers, or two of the same name.
    """

    def __init__(
        self, config: ServeConfig, *, metrics: Metrics, on_failure: Callable[[Exception], None] | None = None
    ) -> None:
        self.config = config
        self.names = _names(config.classifiers)
        self.models: dict[str, Classifier] = {}
        self.created = 0
        self._metrics = metrics
        self._on_failure = on_failure or _log_failure
        self._state: State = "loading"
        self._places = Places(config.queue_size + config.max_batch)
        self._memory = ByteBudget(config.queue_bytes)
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
        # Twice as many as are decoded: while one is cut into patches, the next is decoded.
        self._preparation = Preparation(
            reader=self._reader, decoder=self._decoder, observer=metrics, at_once=2 * config.decode_workers
        )
        self._model_worker = Worker("model")  # one for all groups, so that no two passes compute at once
        self._served: list[_Served] = []
        self._explainer = Explainer(model_worker=self._model_worker, drawing_worker=self._preparation.worker)

    @property
    def state(self) -> State:
        """How things stand: "loading", "warming", "ready" and "draining", one after the other, or "failed"."""
        return self._state

    @property
    def heartbeat(self) -> float:
        """Seconds since batches were last made as they should; 0 where none is asked for."""
        return max((served.batcher.heartbeat for served in self._served), default=0.0)

    async def load(self) -> None:
        """Load the classifiers and run a first pass, or call `on_failure`."""
        try:
            await self._decoder.start()
            folders = dict(zip(self.names, self.config.classifiers, strict=True))
            self._install(await self._model_worker.run(_load, folders, self.config))
            self._move("loading", "warming")
            await self._warm_up()
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
        end = asyncio.get_running_loop().time() + self.config.grace
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    await self._places.wait_until_empty()
        finally:
            for served in self._served:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(end):
                        await served.batcher.close()
            await self._decoder.close()
            self._reader.close()
            self._preparation.worker.stop()
            self._model_worker.stop()

    @contextlib.contextmanager
    def accepted(self) -> Iterator[None]:
        """Hold a request's place from before its body is read, so that those in memory are few and none is forgotten.

        Raises:
            QueueFullError: As many requests are here as examples fit into the queue and a pass, or what waits already
                will hardly be done before a deadline.
            ClosedError: The service is not ready.
        """
        if self._state != "ready":
            raise ClosedError(f"the server is {self._state}; wanted one that is ready; try again later")
        refusals = [served.batcher.refusal(1, 0, self.config.deadline) for served in self._served]
        if refusals[0] is not None and all(refusals):  # else it depends on who is asked
            raise refusals[0]
        with self._places.take(self.config.deadline), self._metrics.in_flight():
            yield

    def hold(self, nbytes: int) -> contextlib.AbstractContextManager[None]:
        """Count bytes that a request holds, until the context ends.

        Raises:
            QueueFullError: All requests together hold too many already.
        """
        return self._memory.hold(nbytes)

    async def classify(
        self, asks: Sequence[Ask | ItemError], models: Sequence[str], deadline: float
    ) -> list[Scored | ItemError]:
        """Prepare and score the examples of one request, each by itself.

        Args:
            asks: The examples; an error stays where it is.
            models: The names of the classifiers that are asked, each once; those of one backbone share a pass.
            deadline: Until when, on the event loop's clock.

        Returns:
            For each example what the classifiers say, or its error.

        Raises:
            DeadlineError: It took too long.
            QueueFullError: Too many examples wait already.
            ClosedError: The service is closing.
        """
        asked = [(one, tuple(name for name in models if name in one.group.classifiers)) for one in self._served]
        asked = [(one, names) for one, names in asked if names]
        processors = list({id(one.processor): one.processor for one, _ in asked}.values())
        with PictureShare(self._memory) as share:
            try:
                async with asyncio.timeout_at(deadline):
                    seconds = deadline - asyncio.get_running_loop().time()
                    checked = [self._checked(ask) for ask in asks]
                    prepared = await self._preparation.prepare(checked, processors, share, seconds=seconds)
            except TimeoutError:
                raise DeadlineError("the examples were not ready before the deadline; send fewer or smaller") from None
            good = {row: item for row, item in enumerate(prepared) if not isinstance(item, ItemError)}
            encoded = [[item[processors.index(one.processor)] for item in good.values()] for one, _ in asked]
            answers = await all_of(
                [one.submit(items, names, deadline) for (one, names), items in zip(asked, encoded, strict=True)]
            )
        outcomes: list[Scored | ItemError] = [item for item in prepared if isinstance(item, ItemError)]
        for place, row in enumerate(good):
            tokens = sum(len(items[place].ids) for items in encoded)
            outcomes.insert(row, self._merged([answer[place] for answer in answers], models, tokens))
        if good:
            self._places.scored()
        return outcomes

    async def explain(
        self, ask: Ask, model: str, method: Method, deadline: float, *, baseline: Baseline | None = None
    ) -> tuple[Explanation, bytes] | ItemError:
        """Explain the answer of one classifier for one example, while no pass runs.

        Args:
            ask: The example.
            model: The classifier's name.
            method: As in `evaluation.explain`.
            deadline: Until when, on the event loop's clock.
            baseline: As in `evaluation.explain`.

        Returns:
            The explanation and a PNG file of its heat maps and words, or what is wrong with the example.

        Raises:
            DeadlineError: It took too long.
            QueueFullError: Others wait for explanations already.
            ClosedError: The service is closing.
        """
        checked = self._checked(ask)
        if isinstance(checked, ItemError):
            return checked
        (group,) = (one.group for one in self._served if model in one.group.classifiers)
        with PictureShare(self._memory) as share:
            try:
                async with asyncio.timeout_at(deadline):
                    images = await self._preparation.pictures(ask, share)
                    if isinstance(images, ItemError):
                        return images
                    return await self._explainer.explain(group, model, ask.text, images, method, baseline)
            except TimeoutError:
                raise DeadlineError("the explanation was not ready before the deadline; try again") from None
            except ConfigError as error:  # method or baseline does not fit the classifier
                return ItemError("invalid_item", str(error))
            except Exception as error:
                return error_of(error)

    def _checked(self, ask: Ask | ItemError) -> Ask | ItemError:
        if isinstance(ask, ItemError):
            return ask
        return problem_of(ask, max_text_chars=self.config.max_text_chars) or ask

    def _merged(
        self, answers: Sequence[Probabilities | BaseException], models: Sequence[str], tokens: int
    ) -> Scored | ItemError:
        """Put together what the groups say of one example."""
        said: Probabilities = {}
        for answer in answers:
            if isinstance(answer, BaseException):
                return error_of(answer)
            said |= answer
        if not all(math.isfinite(probability) for pair in said.values() for probability in pair):
            return error_of(ArithmeticError("a probability is not a number"))
        for name in models:
            self._metrics.score(name, said[name][1])
        return Scored({name: said[name] for name in models}, tokens)

    def _install(self, groups: Sequence[Group]) -> None:
        depths = Depths(self._metrics)
        self._served = [
            _Served(
                group,
                Batcher(
                    group.score,
                    max_batch=self.config.max_batch,
                    max_cost=self.config.max_batch_tokens,
                    queue_size=self.config.queue_size,
                    max_seconds=_PASS * self.config.deadline,
                    observer=depths.of_another(),
                    on_death=self._die,
                    worker=self._model_worker,
                ),
            )
            for group in groups
        ]
        loaded = {name: model for group in groups for name, model in group.classifiers.items()}
        self.models = {name: loaded[name] for name in self.names}
        self.created = int(time.time())
        self._metrics.models({name: _info(model) for name, model in self.models.items()})

    async def _warm_up(self) -> None:
        """Run one pass of each group with a picture, so that the first caller does not wait for what is done once.

        Raises:
            ArtifactError: A classifier gives something else than probabilities.
        """
        stream = io.BytesIO()
        Image.new("RGB", (_WARM_SIDE, _WARM_SIDE), "grey").save(stream, "PNG")
        picture = await self._decoder.decode(stream.getvalue())
        for one in self._served:
            said = await self._model_worker.run(one.group.score_example, Example(picture, "The picture is grey."))
            for name, pair in said.items():
                if not all(map(math.isfinite, pair)):
                    raise ArtifactError(f"{name}: its probabilities are not numbers; train the classifier again")

    def _move(self, before: State, after: State) -> None:
        if self._state == before:  # and not draining already
            self._set_state(after)

    def _set_state(self, state: State) -> None:
        self._state = state
        self._metrics.ready(state == "ready")

    def _fail(self, error: Exception) -> None:
        self._set_state("failed")
        self._on_failure(error)

    def _die(self, error: BaseException) -> None:
        failure = RuntimeError("batches can no longer be made")
        failure.__cause__ = error
        self._fail(failure)


def _load(folders: dict[str, str], config: ServeConfig) -> list[Group]:
    from qwen_vl_classifier.serving.groups import load_groups  # brings torch: not before it is needed

    return load_groups(folders, config.device, config.model or None, config.max_text_tokens or None)


def _info(classifier: Classifier) -> dict[str, str]:
    """Describe a classifier to those who watch the server; its backbone's name may be a path, its content is none."""
    backbone = classifier.backbone
    return {
        "backbone": f"{backbone.family.model_type}-{backbone.fingerprint[:12]}",
        "tap": str(classifier.tap),
        "head": classifier.spec.kind,
    }


def _log_failure(error: Exception) -> None:
    if isinstance(error, QwenVLClassifierError):
        _log.error("the classifiers could not be loaded: %s", error)
    else:
        _log.error("the classifiers cannot be served", exc_info=error)


def _names(folders: Sequence[str]) -> list[str]:
    if not folders:
        raise ConfigError("no classifiers to serve: give the folder of at least one")
    names = [Path(folder).resolve().name for folder in folders]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(
                f"{folders[names.index(name)]} and {folders[number]} would both be served as {name!r}; "
                "rename one of the folders"
            )
    return names
