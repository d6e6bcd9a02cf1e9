"""Change what is served while requests are answered: load beside the passes, warm up, then switch in one step."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import logging
import math
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from PIL import Image

from qwen_vl_classifier.classifier.score_distribution import recorded_distribution
from qwen_vl_classifier.config.serve import ServeConfig
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.errors import ArtifactError, ClosedError, ConfigError, QwenVLClassifierError
from qwen_vl_classifier.serving.models.model_set import ModelSet, Version
from qwen_vl_classifier.serving.models.served_folders import check_roots, folder_below, is_name, served_folders
from qwen_vl_classifier.serving.models.watching import Seen, Watch
from qwen_vl_classifier.serving.worker import Steps, Worker

if TYPE_CHECKING:  # they bring torch
    from qwen_vl_classifier.classifier.classifier import Classifier
    from qwen_vl_classifier.serving.observability.prometheus import Metrics

Pending: TypeAlias = Literal["loading", "warming", "failed"]
"""How far a version is that is not served: on its way, or not to be served as it is."""

POLL_SECONDS = 1.0
"""Between two looks at the watched folder."""

_FIRST_PAUSE = 5.0  # seconds until a version that failed is tried again, then twice as long each time
_LONGEST_PAUSE = 60.0
_WARM_SIDE = 64  # pixels of the picture that warms up

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a version is not served: which one, what kind of error, how often it was tried, and when it is again."""

    digest: str
    kind: type[Exception]
    tries: int
    again_at: float


class Registry:
    """The classifiers that are served, and the one place where that changes.

    Args:
        config: What to serve.
        steps: Runs the passes that warm up, between those of requests.
        decode: Decodes the picture for them.
        metrics: Told what is served, and what cannot be.

    Attributes:
        served: The classifiers that are served now. A request takes this once, and is answered by nothing else.

    Raises:
        ConfigError: No classifiers, a folder that is none, or two classifiers of the same name.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        steps: Steps,
        decode: Callable[[bytes], Awaitable[Image.Image]],
        metrics: Metrics,
    ) -> None:
        self.served = ModelSet()
        self._config = config
        self._steps = steps
        self._decode = decode
        self._metrics = metrics
        self._listed = served_folders(config)
        check_roots(config)
        self._watch = Watch(Path(config.watch)) if config.watch else None
        self._roots = [Path(root) for root in (config.models_root, config.watch) if root]
        self._folders: dict[str, Path] = {}  # of those that are served
        self._loader = Worker("load")
        self._changing = asyncio.Lock()
        self._busy: dict[str, Pending] = {}
        self._failures: dict[str, _Failure] = {}
        self._following: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pending(self) -> dict[str, Pending]:
        """Versions that are not served, by the name of their classifier."""
        failed: dict[str, Pending] = dict.fromkeys(filter(is_name, self._failures), "failed")
        return failed | self._busy

    async def load(self) -> ModelSet:
        """Load the classifiers that were listed and those of the watched folder, which need not be sound.

        Raises:
            Exception: One that was listed cannot be loaded.
        """
        folders = dict(self._listed)
        seen: dict[str, Seen] = {}
        if self._watch is not None:
            seen = await self._loader.run(self._watch.look)
            folders = {name: found.folder for name, found in seen.items() if self._may_watch(name, found)} | folders
        loaded, failures = await self._loader.run(_load, ModelSet(), folders, self._config)
        for name, error in failures.items():
            if name in self._listed:
                raise error
            self._note_failure(name, seen[name].digest, error, tried=True)
        self._folders = {name: folders[name] for name in loaded.names}
        return loaded.in_order(list(self._listed))

    async def begin(self, loaded: ModelSet) -> None:
        """Warm up what was loaded first, serve it, and follow the watched folder from now on.

        Raises:
            Exception: A classifier that was listed does not work.
        """
        for name, error in (await self._warm_up(loaded, loaded.names)).items():
            if name in self._listed:
                raise error
            self._note_failure(name, loaded.versions[name].digest, error, tried=True)
            loaded = loaded.without(name)
        self._switch(loaded)
        if self._watch is not None:
            self._following = asyncio.create_task(self._follow(self._watch))

    async def close(self) -> None:
        """Stop changing what is served."""
        for task in (self._following, *self._tasks):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._loader.stop()

    async def put(self, given: str, name: str | None) -> tuple[str, bool]:
        """Load a classifier and serve it, in the place of one of the same name if there is one.

        Args:
            given: Its folder, below one of those from which classifiers may be loaded.
            name: Under which to serve it; by default the folder's name.

        Returns:
            The name, and whether it is new.

        Raises:
            LookupError: There is no such folder.
            ConfigError: The name is impossible, or is that of another folder's classifier in the watched folder.
            QwenVLClassifierError: The classifier cannot be served; the old one goes on.
        """
        folder = await self._loader.run(folder_below, self._roots, given)
        if folder is None:
            raise LookupError(given)
        name = folder.name if name is None else name
        if not is_name(name):
            raise ConfigError("name cannot be served; expected up to 128 printable characters without a slash")
        async with self._changing:
            if self._is_watched(name) and self._folders[name].resolve() != folder:
                raise ConfigError("the name is that of a classifier in the watched folder; give another name")
            is_new = name not in self.served.versions
            try:
                await self._change(name, self._folders[name] if self._is_watched(name) else folder)
            except ClosedError:
                raise
            except Exception as error:
                self._say(name, error)
                raise
        return name, is_new

    async def remove(self, name: str) -> None:
        """Stop serving a classifier.

        Raises:
            LookupError: It is not served.
            ConfigError: It lies in the watched folder, and would come back.
        """
        async with self._changing:
            if name not in self.served.versions:
                raise LookupError(name)
            if self._is_watched(name):
                raise ConfigError("the classifier is in the watched folder; remove its folder there")
            self._drop(name)

    async def _follow(self, watch: Watch) -> None:
        """Look at the watched folder again and again, and serve what it holds."""
        reachable = True
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                seen = await self._loader.run(watch.look)
            except OSError as error:
                if reachable:
                    _log.warning(
                        "the watched folder cannot be read (%s); what is served stays as it is", error.strerror
                    )
                reachable = False
                continue
            reachable = True
            try:
                await self._follow_up(watch, seen)
            except Exception:
                _log.exception("a change in the watched folder could not be applied")

    async def _follow_up(self, watch: Watch, seen: Mapping[str, Seen]) -> None:
        async with self._changing:
            for name in [name for name in self._folders if self._is_watched(name) and watch.is_gone(name)]:
                self._drop(name)
            for name in [name for name in self._failures if watch.is_gone(name)]:
                self._forget_failure(name)
        for name, found in watch.settled.items():
            if self._may_watch(name, found) and self._is_due(name, found):
                async with self._changing:
                    try:
                        await self._change(name, found.folder)
                    except Exception as error:
                        self._note_failure(name, found.digest, error, tried=True)

    def _may_watch(self, name: str, found: Seen) -> bool:
        """Tell whether what the watched folder holds can be served under its name; say so in the log if not."""
        other = self._folders.get(name) or self._listed.get(name)
        if not is_name(name):
            why = "its name cannot be served; expected up to 128 printable characters"
        elif other is not None and other.resolve() != found.folder.resolve():
            why = "another folder's classifier is served under its name; rename the folder"
        elif not found.digest:
            why = "classifier.json or head.safetensors is missing or cannot be read; save the classifier again"
        else:
            return True
        self._note_failure(name, found.digest, ConfigError(why))
        return False

    def _is_due(self, name: str, found: Seen) -> bool:
        """Tell whether a version is to be loaded now: it is not served, and was not tried a moment ago."""
        version, failure = self.served.versions.get(name), self._failures.get(name)
        if version is not None and version.digest == found.digest:
            self._forget_failure(name)
            return False
        return failure is None or failure.digest != found.digest or time.monotonic() >= failure.again_at

    def _is_watched(self, name: str) -> bool:
        """Tell whether a classifier that is served comes from the watched folder."""
        folder = self._folders.get(name)
        return folder is not None and self._watch is not None and folder == self._watch.folder / name

    async def _change(self, name: str, folder: Path) -> None:
        """Load, warm up and serve one version.

        Raises:
            Exception: It cannot be served; what was served is unchanged.
        """
        self._busy[name] = "loading"
        try:
            served, failures = await self._loader.run(_load, self.served, {name: folder}, self._config)
            if not failures:
                self._busy[name] = "warming"
                failures = await self._warm_up(served, [name])
            if failures:
                raise failures[name]
        except Exception:
            self._collect_soon()
            raise
        finally:
            del self._busy[name]
        self._folders[name] = folder
        self._switch(served.in_order(list(self._listed)))
        self._forget_failure(name)

    def _drop(self, name: str) -> None:
        del self._folders[name]
        self._switch(self.served.without(name))

    def _switch(self, served: ModelSet) -> None:
        """Serve another set from now on; the old one goes when the last request that it answers is over."""
        before, self.served = self.served, served
        for name in before.versions.keys() | served.versions.keys():
            old, new = before.versions.get(name), served.versions.get(name)
            if old != new:
                fields = {"model": name, "version": _digest(new), "before": _digest(old)}
                _log.info("model changed", extra={"fields": fields})
        counted = {name: model for name, model in served.models.items() if served.counted_as(name) == name}
        self._metrics.models(
            {name: _info(model, served.version_of(name)) for name, model in counted.items()},
            {name: recorded_distribution(model.training, name=name) for name, model in counted.items()},
        )
        backbones = {id(panel.backbone) for panel in served.panels}
        if any(id(panel.backbone) not in backbones for panel in before.panels):
            loop = asyncio.get_running_loop()
            weakref.finalize(before, _call_soon, loop, self._collect_soon).atexit = False

    def _collect_soon(self) -> None:
        """Free a backbone that nobody uses any more: its layers refer to themselves in circles."""
        task = asyncio.create_task(self._collect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _collect(self) -> None:
        await self._loader.run(gc.collect)

    async def _warm_up(self, served: ModelSet, names: Sequence[str]) -> dict[str, Exception]:
        """Run one pass with a picture for each backbone, so that the first caller does not wait for what is done once.

        Returns:
            For each classifier or saved panel that does not work why not.
        """
        stream = io.BytesIO()
        Image.new("RGB", (_WARM_SIDE, _WARM_SIDE), "grey").save(stream, "PNG")
        example = Example(await self._decode(stream.getvalue()), "The picture is grey.")
        failures: dict[str, Exception] = {}
        for panel, some in served.panels_of(names):
            try:
                found = await self._steps.run(partial(panel.score_example, example, some))
            except Exception as error:
                failures |= dict.fromkeys(some, error)
                continue
            for name in some:
                if not all(math.isfinite(value) for model in served.classifiers_of(name) for value in found[model]):
                    failures[name] = ArtifactError(f"{name}: its probabilities are not numbers; train it again")
        return failures

    def _note_failure(self, name: str, digest: str, error: Exception, *, tried: bool = False) -> None:
        """Remember that a version cannot be served, and say so in the log unless that was said.

        Args:
            name: The classifier's name.
            digest: Of the version.
            error: Why not.
            tried: Whether it was loaded, which is not tried again at once.
        """
        known = self._failures.get(name)
        tries, pause = 0, 0.0
        if tried:
            tries = known.tries + 1 if known is not None and known.digest == digest else 1
            pause = min(_FIRST_PAUSE * 2 ** (tries - 1), _LONGEST_PAUSE)
        self._failures[name] = _Failure(digest, type(error), tries, time.monotonic() + pause)
        if known is None or (known.digest, known.kind) != (digest, type(error)):
            self._say(name, error)
            self._metrics.load_failing(_shown(name), failing=True)

    def _forget_failure(self, name: str) -> None:
        if self._failures.pop(name, None) is not None:
            self._metrics.load_failing(_shown(name), failing=False)

    def _say(self, name: str, error: Exception) -> None:
        """Write into the log why a version cannot be served."""
        state = "the previous version stays" if name in self.served.versions else "it is not served"
        expected = isinstance(error, QwenVLClassifierError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        # Not as arguments: of warnings with the same words, the log leaves out those that follow.
        line = f"{_shown(name)}: a new version cannot be served, and {state}: {reason}"
        _log.warning(line, exc_info=None if expected else error)


def _load(served: ModelSet, folders: Mapping[str, Path], config: ServeConfig) -> tuple[ModelSet, dict[str, Exception]]:
    from qwen_vl_classifier.serving.models.loading_models import load_models  # brings torch: not before it is needed

    return load_models(served, folders, config)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and all ends
        loop.call_soon_threadsafe(function)


def _shown(name: str) -> str:
    """Return a name as logs and metrics can hold it."""
    return name if is_name(name) else ascii(name)


def _digest(version: Version | None) -> str:
    return "" if version is None else version.digest


def _info(classifier: Classifier, version: Version) -> dict[str, str]:
    """Describe a classifier to those who watch the server; its backbone's name may be a path, its content is none."""
    backbone = classifier.backbone
    return {
        "version": version.digest,
        "backbone": f"{backbone.family.model_type}-{backbone.fingerprint[:12]}",
        "tap": str(classifier.tap),
        "head": classifier.spec.kind,
    }
