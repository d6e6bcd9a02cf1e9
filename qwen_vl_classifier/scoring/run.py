"""Whole runs, `score` and `extract_shards`: find out what is left to do, and have workers do it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.config.device_lists import names_several
from qwen_vl_classifier.config.fields import MAX_TEXT_CHARS
from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.bad_rows import BadRows
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.data.table import Columns
from qwen_vl_classifier.errors import ConfigError, DataError, ErrorLimitError, StoppedError
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.files.paths import is_url
from qwen_vl_classifier.files.whole import clear_leftovers
from qwen_vl_classifier.images.limits import DEFAULT_LIMITS
from qwen_vl_classifier.scoring import local
from qwen_vl_classifier.scoring.jobs import Job, Shard, ShardReport, Task
from qwen_vl_classifier.scoring.manifest import ScoreManifest
from qwen_vl_classifier.scoring.plan import Plan, make_plan
from qwen_vl_classifier.scoring.progress import Progress, estimate
from qwen_vl_classifier.scoring.scorers.scorer_list import Scorer, ScorerList
from qwen_vl_classifier.scoring.shards import ShardFolder
from qwen_vl_classifier.scoring.workers import ExtractJob, ScoreJob, ScoreWorker

DEFAULT_CONFIG = ScoreConfig()

_DECIDING_OPTIONS = ("image_column", "text_column", "id_column", "text", "allow_outside", "limit")


def _never() -> bool:
    return False


def score(
    classifiers: Scorer | Sequence[Scorer],
    examples: str | os.PathLike[str] | Iterable[Mapping[str, Any] | Example],
    out: str | os.PathLike[str],
    *,
    config: ScoreConfig = DEFAULT_CONFIG,
    device: str = "auto",
    model: str | os.PathLike[str] | None = None,
    max_text_tokens: int | None = None,
    resume: bool = False,
    progress: bool = True,
    should_stop: Callable[[], bool] = _never,
    storage_options: Mapping[str, Any] | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Score a data set of any size with classifiers or panels of labels, and write it in shards.

    A row that cannot be used, for its picture or for anything else, becomes a row with an error. Each shard is
    written whole or not at all: after a kill, the same call computes only the shards that are missing, and a call
    that finds all of them loads no model. A damaged shard is set aside and scored again. Contents of pictures are not
    compared: if one changes or appears later, delete the shard of its row. `scoring.shards` describes the folder.

    Data in files with classifiers in folders is scored by worker processes, which may die without losing results. Rows
    given in Python and classifiers in memory are scored in this process.

    Args:
        classifiers: The folder of a saved classifier or panel, a classifier or panel, or several of these that have the
            same backbone; one pass then serves them all. Each label of a panel has columns of its own.
        examples: What to score: anything that `load_examples` takes, a folder or glob of data files, or a folder of
            pictures; on this machine, or by URL of a store. It is read as it is needed, so it may be larger than
            memory. Labels are not looked at.
        out: Folder of the scores, by path or URL of a store; made if missing.
        config: Options: shards, output and workers.
        device: As in `Backbone.load`, for classifiers given by folder. "auto", "cuda" and "all" take all GPUs, and so
            does a list such as "cuda:0,cuda:1" the devices it names: one worker process for each.
        model: Where the backbone of classifiers given by folder is now, as in `Classifier.load`.
        max_text_tokens: As in `Classifier.load`; a text of more tokens is a row with an error.
        resume: Refuse to begin a new run: there must be one to continue.
        progress: Show a progress bar if it takes more than two seconds.
        should_stop: Called now and then; once it returns true, shards that are being scored are finished, and the rest
            is left for another call.
        storage_options: Options of fsspec for data and scores in a store.
        **loading: Options of `load_examples`; those about labels change nothing.

    Returns:
        `rows` in the data, `errors` among them, `shards_written` by this call and `shards_there` before it. Of a dry
        run, what `estimate` returns.

    Raises:
        ConfigError: `out` holds the scores of other classifiers, data or options (the message says which), or another
            run writes there, or it cannot be written; or an option is out of its range.
        DataError: The data cannot be read, or has no rows, or a column is missing in all of them.
        ArtifactError: A folder holds no classifier, or its backbone is not the one it was saved with.
        CheckpointError: The backbone cannot be loaded.
        ErrorLimitError: More rows have errors than `config.max_errors`.
        StoppedError: `should_stop` returned true.
        ScoringError: Workers die or hang, and no row is the cause; or scores were removed or changed during the run.

    Example:
        >>> import tempfile
        >>> from qwen_vl_classifier.backbone.backbone import Backbone
        >>> classifier = Classifier.zero_shot(Backbone.load("builtin:tiny", device="cpu"))
        >>> rows = [{"image": None, "text": "A claim."}, {"image": "gone.png", "text": "A claim."}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     score(classifier, rows, folder)
        {'rows': 2, 'errors': 1, 'shards_written': 1, 'shards_there': 0}
    """
    scorers = ScorerList.of(classifiers)
    options = _options(loading)
    plan = make_plan(
        examples,
        Columns(options["image_column"], options["text_column"], options["label_column"], options["id_column"]),
        shard_size=config.shard_size,
        limit=options["limit"],
        group_by_image=config.group_by_image,
        text=options["text"],
        allow_outside=options["allow_outside"],
        max_text_chars=options["max_text_chars"],
        url_hosts=config.hosts,
        kept=config.kept_columns,
        storage_options=storage_options,
    )
    manifest = ScoreManifest(
        classifiers=tuple(zip(scorers.names, scorers.fingerprints(), strict=True)),
        data=plan.digest,
        options={
            "shard_size": config.shard_size,
            "group_by_image": config.group_by_image,
            "token_budget": config.token_budget,
            "url_hosts": list(config.hosts),
        }
        | {name: options[name] for name in _DECIDING_OPTIONS}
        | ({} if plan.spec.limits == DEFAULT_LIMITS else {"pictures": plan.spec.limits.to_json()})
        | ({"max_text_tokens": max_text_tokens} if max_text_tokens else {})
        | ({} if plan.spec.max_text_chars == MAX_TEXT_CHARS else {"max_text_chars": plan.spec.max_text_chars})
        | ({"columns": list(config.kept_columns)} if config.kept_columns else {})
        | ({} if config.escape_formulas or config.format != "csv" else {"escape_formulas": False}),
        format=config.format,
        words=scorers.words(),
        exclusive=scorers.exclusive,
    )
    _check_device(device, config, in_memory=_in_memory(plan, scorers))
    if _in_memory(plan, scorers) and (config.engine != "local" or config.workers > 1):
        raise ConfigError(
            f"engine {config.engine} with {config.workers} workers, but rows given in Python and classifiers in memory "
            "are scored in this process; write the rows to a file and save the classifiers, or leave these options out"
        )
    folder = ShardFolder(out, manifest, storage_options)
    job = ScoreJob(
        classifiers=tuple("" if isinstance(one, Classifier) else str(one) for one in scorers.classifiers),
        device=device,
        model="" if model is None else _path_or_name(model),
        max_text_tokens=max_text_tokens or 0,
        source=plan.spec,
        out=str(out) if is_url(str(out)) else str(Path(out).resolve()),
        manifest=manifest.to_json(),
        token_budget=config.token_budget,
        features=str(Path(config.features).resolve()) if config.features else "",
        decode_timeout=config.decode_timeout,
        storage_options=storage_options or {},
    )
    if config.dry_run:
        return _estimate(scorers, plan, folder, job, config)
    folder.open(resume=resume)
    try:
        job = dataclasses.replace(job, run=folder.run)
        return _run(scorers, plan, folder, job, config, progress=progress, should_stop=should_stop)
    finally:
        with contextlib.suppress(ConfigError):  # what ended the run says more
            folder.sweep()
        folder.close()


def _run(
    scorers: ScorerList,
    plan: Plan,
    folder: ShardFolder,
    job: ScoreJob,
    config: ScoreConfig,
    *,
    progress: bool,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Score the shards that are missing."""
    found = folder.survey(plan, verify=config.verify)
    folder.set_aside(found.damaged)
    there = bytearray(found.there)
    most_errors = config.most_errors(plan.rows)
    with Progress(plan.rows, rows_there=found.rows, errors_there=found.errors, show=progress) as done:

        def add(report: ShardReport) -> None:
            there[report.index] = 1
            done.add(report)

        def stop() -> bool:
            return done.errors > most_errors or should_stop()

        if found.rows < plan.rows and not stop():
            todo = (plan[index] for index in range(len(plan)) if not found.there[index])
            if not _in_memory(plan, scorers):
                _run_in_workers(job, todo, config, add, stop, done.show_rows)
            else:  # a crash ends it
                worker = _worker_here(scorers, plan, job)
                worker.pulse.on_done = done.show_rows
                for report in worker.run_all(map(Task, todo)):
                    add(report)
                    if stop():
                        break
    folder.confirm(plan[index] for index in range(len(plan)) if there[index])
    kept = f"{sum(there)} of {len(plan)} shards are kept"
    if done.errors > most_errors:
        raise ErrorLimitError(
            f"{folder.folder}: {done.errors} of the {done.rows} rows scored so far have errors, more than "
            f"{spelled('max_errors', config.max_errors)} allows; {kept}; correct the data or raise the limit, then run "
            "again"
        )
    if done.rows < plan.rows:
        raise StoppedError(f"{folder.folder}: stopped; {kept}; run again to continue")
    return {"rows": done.rows, "errors": done.errors, "shards_written": done.shards, "shards_there": sum(found.there)}


def _check_device(device: str, config: ScoreConfig, *, in_memory: bool = False) -> None:
    """Refuse several devices where no process of this machine could have each."""
    if not names_several(device):
        return
    if config.engine == "ray":
        raise ConfigError(
            f"{spelled('device', device)} with {spelled('engine', 'ray')}: Ray gives each worker its GPUs; give "
            f"{spelled('device', 'cuda')} with {spelled('gpus_per_worker', 1)} and a number of workers, or use "
            f"{spelled('engine', 'local')}"
        )
    if in_memory:
        raise ConfigError(
            f"device {device!r}: rows given in Python and classifiers in memory are scored in this process, on one "
            "device; write the rows to a file and save the classifiers, or give one device"
        )


def _estimate(
    scorers: ScorerList, plan: Plan, folder: ShardFolder, job: ScoreJob, config: ScoreConfig
) -> dict[str, Any]:
    """Score a sample as one of the workers would."""
    if _in_memory(plan, scorers):
        return estimate(_worker_here(scorers, plan, job), folder, plan, workers=1)
    jobs = local.worker_jobs(job, config)
    threads = torch.get_num_threads()
    try:
        return estimate(jobs[0].worker(), folder, plan, workers=len(jobs))
    finally:
        torch.set_num_threads(threads)


def _in_memory(plan: Plan, scorers: ScorerList) -> bool:
    """Tell whether rows or classifiers are in this process, and nowhere else."""
    return plan.given is not None or scorers.in_memory


def _worker_here(scorers: ScorerList, plan: Plan, job: ScoreJob) -> ScoreWorker:
    """Return a worker for this process, with the rows and classifiers that are in its memory."""
    panel = scorers.panel(device=job.device, model=job.model or None, max_text_tokens=job.max_text_tokens or None)
    return ScoreWorker(job, panel=panel, given=plan.given)


def _run_in_workers(
    job: Job,
    todo: Iterable[Shard],
    config: ScoreConfig,
    on_report: Callable[[ShardReport], None],
    should_stop: Callable[[], bool],
    on_rows: Callable[[int], object],
) -> None:
    """Do shards with the engine that the options name."""
    if config.engine == "ray":
        from qwen_vl_classifier.scoring import ray

        ray.run(job, todo, config, on_report, should_stop, on_rows)
    else:
        local.run(job, todo, config, on_report, should_stop, on_rows)


def extract_shards(
    source: str | os.PathLike[str],
    store: FeatureStore,
    *,
    taps: str,
    backbone: Mapping[str, Any],
    config: ScoreConfig,
    device: str,
    columns: Columns,
    text: str | None = None,
    allow_outside: bool = False,
    limit: int | None = None,
    max_text_chars: int = MAX_TEXT_CHARS,
    bad: BadRows,
    progress: bool = True,
) -> dict[str, int]:
    """Store the features of a data set in files, with the workers of an engine.

    Args:
        source: Data that `score` takes, in files.
        store: Where features are kept.
        taps: Where to read: a list, "auto" or "all".
        backbone: Arguments of `Backbone.load`, but for the device.
        config: Which engine and how many workers; what concerns scores alone is not looked at.
        device: As in `Backbone.load`, or several as in `score`.
        columns: Names of the columns.
        text: One text for all rows.
        allow_outside: Allow image paths to leave the folder of their data file.
        limit: Take the first so many rows.
        max_text_chars: A longer text, in characters, is a bad row.
        bad: Given the rows that cannot be used, which are left out.
        progress: Show a progress bar.

    Returns:
        `rows` in the data, and `features` that were added to the store.

    Raises:
        ConfigError: An option is out of its range.
        DataError: The data cannot be read, or has no rows.
        QwenVLClassifierError: What a worker could not do.
    """
    _check_device(device, config)
    plan = make_plan(
        source,
        columns,
        shard_size=config.shard_size,
        limit=limit,
        group_by_image=config.group_by_image,
        text=text,
        allow_outside=allow_outside,
        max_text_chars=max_text_chars,
        url_hosts=config.hosts,
    )
    job = ExtractJob(
        backbone=dict(backbone),
        taps=taps,
        device=device,
        source=plan.spec,
        features=str(Path(store.folder).resolve()),
        feature_dtype=store.dtype,
        decode_timeout=config.decode_timeout,
    )
    before = len(store)

    def add(report: ShardReport) -> None:
        done.add(report)
        for position, problem in report.problems:
            bad.add(position, None, DataError(problem))

    try:
        with Progress(plan.rows, rows_there=0, errors_there=0, show=progress, work="extract") as done:
            _run_in_workers(job, plan, config, add, _never, done.show_rows)
    finally:
        clear_leftovers(store.folder)  # of workers that were ended with the run, or of a run that was killed before
    store.refresh()
    return {"rows": plan.rows, "features": len(store) - before}


def _options(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of `load_examples`, with their defaults where they are not given."""
    bound = inspect.signature(load_examples).bind("", **loading)
    bound.apply_defaults()
    options = bound.arguments
    if options["limit"] is not None and options["limit"] < 1:
        raise ConfigError(f"{spelled('limit', options['limit'])}; expected at least 1; leave it out to take all rows")
    return options


def _path_or_name(model: str | os.PathLike[str]) -> str:
    """Return an absolute path of a folder, since workers may run elsewhere, and a name on the hub as it is."""
    place = Path(model).expanduser()
    return str(place.absolute()) if place.is_dir() else os.fspath(model)
