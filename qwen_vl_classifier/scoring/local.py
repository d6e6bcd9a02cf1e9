"""Score a data set of any size on this machine: one pass for all classifiers, resumed where it was killed."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from tqdm import tqdm

from qwen_vl_classifier.backbone.fingerprint import tensor_digest
from qwen_vl_classifier.backbone.planning import windows_of
from qwen_vl_classifier.classifier.artifact import Manifest, read_head_weights, read_manifest
from qwen_vl_classifier.classifier.classifier import Classifier
from qwen_vl_classifier.classifier.panel import Panel
from qwen_vl_classifier.config import ScoreConfig
from qwen_vl_classifier.data.example import Example, Prediction
from qwen_vl_classifier.data.images import open_image
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.data.readers import Columns, Row, Table, read_table
from qwen_vl_classifier.data.rows import RowParser
from qwen_vl_classifier.errors import ConfigError, ImageError
from qwen_vl_classifier.scoring.shards import ScoredRow, ScoreManifest, ShardFolder

DEFAULT_CONFIG = ScoreConfig()

Scorer: TypeAlias = "str | os.PathLike[str] | Classifier"
"""A saved classifier by its folder, or one in memory."""

_DECIDING_OPTIONS = ("image_column", "text_column", "id_column", "text", "allow_outside", "limit")


def score(
    classifiers: Scorer | Sequence[Scorer],
    examples: str | os.PathLike[str] | Iterable[Mapping[str, Any] | Example],
    out: str | os.PathLike[str],
    *,
    config: ScoreConfig = DEFAULT_CONFIG,
    device: str = "auto",
    progress: bool = True,
    **loading: Any,
) -> dict[str, int]:
    """Score a data set with one or several classifiers, and write shards of Parquet.

    A row that cannot be used, for its picture or for anything else, becomes a row with an error. Each shard is
    written whole or not at all: after a kill, the same call computes only the shards that are missing, and a call
    that finds all of them loads no model. What a row's picture holds is not compared: where one changes or turns up
    later, delete the shard of its row. `scoring.shards` says what the folder holds.

    Args:
        classifiers: The folder of a saved classifier, a classifier, or several of these that have the same backbone;
            one pass then serves them all.
        examples: What to score: anything that `load_examples` takes. A data file is read as it is needed, so it may
            be larger than memory. Labels are not looked at.
        out: Folder of the scores; made if missing.
        config: How to cut the data.
        device: As in `Backbone.load`, for classifiers given by folder.
        progress: Show a progress bar if it takes more than two seconds.
        **loading: Options of `load_examples`; those about labels change nothing.

    Returns:
        `rows` in the data, `errors` among them, `shards_written` by this call and `shards_there` before it.

    Raises:
        ConfigError: `out` holds the scores of other classifiers, data or options (the message says which), or
            cannot be written; or an option is out of its range.
        DataError: The data cannot be read on, or has no rows, or a column is missing in all of them.
        ArtifactError: A folder holds no classifier, or its backbone is not the one it was saved with.
        CheckpointError: The backbone cannot be loaded.

    Example:
        >>> import tempfile
        >>> from qwen_vl_classifier.backbone.loading import Backbone
        >>> classifier = Classifier.zero_shot(Backbone.load("builtin:tiny", device="cpu"))
        >>> rows = [{"image": None, "text": "A claim."}, {"image": "gone.png", "text": "A claim."}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     score(classifier, rows, folder)
        {'rows': 2, 'errors': 1, 'shards_written': 1, 'shards_there': 0}
    """
    given = _as_list(classifiers)
    options = _options(loading)
    if isinstance(examples, Iterator):
        examples = list(examples)  # they are read twice: for their digest, then as examples
    columns = Columns(options["image_column"], options["text_column"], options["label_column"], options["id_column"])
    table = read_table(examples, columns)
    batches = _batches(itertools.islice(table.rows, options["limit"]), config.shard_size)
    first = next(batches, [])
    _row_parser(table, columns, options).check_columns(first)

    manifest = ScoreManifest(
        classifiers=tuple(zip(_names(given), map(_fingerprint, given), strict=True)),
        data=_data_digest(examples, columns),
        options={"shard_size": config.shard_size} | {name: options[name] for name in _DECIDING_OPTIONS},
    )
    shards = ShardFolder(out, manifest)
    shards.open()
    panel: Panel | None = None
    summary = dict.fromkeys(("rows", "errors", "shards_written", "shards_there"), 0)
    with tqdm(desc="score", unit="row", delay=2, disable=not progress) as bar:
        for index, batch in enumerate(itertools.chain([first], batches)):
            errors = shards.errors_in(index, len(batch))
            if errors is None:
                panel = panel or _load_panel(given, device)
                # A new parser for each shard: it remembers every path that it has seen.
                parser = _row_parser(table, columns, options)
                scored = _score_rows(panel, batch, parser, table.unit, first_row=summary["rows"])
                shards.write(index, scored)
                errors = sum(row.error is not None for row in scored)
                summary["shards_written"] += 1
            else:
                summary["shards_there"] += 1
            summary["rows"] += len(batch)
            summary["errors"] += errors
            bar.update(len(batch))
    return summary


def _as_list(classifiers: Scorer | Sequence[Scorer]) -> list[Scorer]:
    single = isinstance(classifiers, (str, os.PathLike, Classifier))
    listed: list[Scorer] = [classifiers] if single else list(classifiers)  # type: ignore[list-item, arg-type]
    if not listed:
        raise ConfigError("no classifiers to score with: give at least one")
    return listed


def _options(loading: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of `load_examples`, with their defaults where they are not given."""
    bound = inspect.signature(load_examples).bind("", **loading)
    bound.apply_defaults()
    options = bound.arguments
    if options["limit"] is not None and options["limit"] < 1:
        raise ConfigError(f"limit is {options['limit']}; wanted at least 1; leave it out to take all rows")
    return options


def _row_parser(table: Table, columns: Columns, options: Mapping[str, Any]) -> RowParser:
    """Read rows as `load_examples` does, but for their labels."""
    return RowParser(table, columns, text=options["text"], allow_outside=options["allow_outside"], read_labels=False)


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _score_rows(panel: Panel, rows: Sequence[Row], parser: RowParser, unit: str, *, first_row: int) -> list[ScoredRow]:
    """Score the rows of one shard; a row that cannot be used becomes one with an error."""
    parsed = [parser.parse(row) for row in rows]
    examples = [row.example for row in parsed if row.example is not None]
    # A window is what `predict_proba` opens before it encodes: where a picture fails, no encoding is lost.
    outcomes = itertools.chain.from_iterable(_outcomes(panel, window) for window in windows_of(examples))
    scored = []
    for number, (row, read) in enumerate(zip(rows, parsed, strict=True), start=first_row):
        name = read.id or str(number)
        outcome = f"{unit} {row.number}: {'; '.join(read.problems)}" if read.problems else next(outcomes)
        if isinstance(outcome, str):
            scored.append(ScoredRow(name, number, error=outcome))
        else:
            scored.append(ScoredRow(name, number, predictions=outcome))
    return scored


def _outcomes(panel: Panel, examples: Sequence[Example]) -> list[tuple[Prediction, ...] | str]:
    """Return for each example the predictions by each classifier, or why its picture cannot be opened."""
    outcomes: list[tuple[Prediction, ...] | str] = [""] * len(examples)
    good = list(range(len(examples)))
    while True:
        try:
            probabilities = panel.predict_proba([examples[index] for index in good])
            break
        except ImageError:
            bad = {index: problem for index in good if (problem := _problem(panel, examples[index]))}
            if not bad:  # it failed once and is well now: the run can be resumed
                raise
        for index, problem in bad.items():
            outcomes[index] = problem
        good = [index for index in good if index not in bad]
    for index, row in zip(good, probabilities, strict=True):
        outcomes[index] = tuple(
            classifier.decision_of(float(probability))
            for classifier, probability in zip(panel.classifiers, row, strict=True)
        )
    return outcomes


def _problem(panel: Panel, example: Example) -> str:
    """Return why an example's pictures cannot be opened, or "" where they can."""
    try:
        panel.backbone.prepare([example])
    except ImageError as error:
        return str(error)
    return ""


def _load_panel(classifiers: Sequence[Scorer], device: str) -> Panel:
    folders = [classifier for classifier in classifiers if not isinstance(classifier, Classifier)]
    loaded = iter(Panel.load(folders, device=device).classifiers if folders else ())
    return Panel([classifier if isinstance(classifier, Classifier) else next(loaded) for classifier in classifiers])


def _names(classifiers: Sequence[Scorer]) -> list[str]:
    """Name each classifier by its folder, or by its position; names that are taken get a number."""
    wanted = [
        f"classifier{position}"
        if isinstance(classifier, Classifier)
        else os.fsencode(Path(classifier).resolve().name).decode("utf-8", "replace")
        for position, classifier in enumerate(classifiers, start=1)
    ]
    names: list[str] = []
    for name in wanted:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        names.append(next(free for free in numbered if free not in (*names, *wanted)) if name in names else name)
    return names


def _fingerprint(classifier: Scorer) -> str:
    """Return the SHA-256 of all that decides what a classifier says; it is the same before saving and after."""
    source: Classifier | Manifest
    if isinstance(classifier, Classifier):
        source = classifier
        backbone, head, weights = source.backbone.fingerprint, source.spec, source.head.state_dict()
    else:
        source = read_manifest(classifier)
        backbone, head, weights = source.backbone["fingerprint"], source.head, read_head_weights(classifier)
    record = {
        "backbone": backbone,
        "tap": str(source.tap),
        "head": head.kind,
        "weights": {name: tensor_digest(tensor.float()) for name, tensor in weights.items()},
        "temperature": float(source.temperature),
        "isotonic": source.isotonic,
        "threshold": float(source.threshold),
        "abstention": None if source.abstention is None else [float(end) for end in source.abstention],
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _data_digest(source: Any, columns: Columns) -> str:
    """Return the SHA-256 of a data file, or of the pictures, texts and ids of rows from elsewhere."""
    if isinstance(source, (str, os.PathLike)) and Path(source).is_file():
        with Path(source).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for row in read_table(source, columns).rows:
        cells = [_stable(row.values.get(name)) for name in (columns.image, columns.text, columns.id)]
        digest.update(repr([row.problem, *cells]).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _stable(cell: Any) -> object:
    """Return something whose `repr` is the same for the same content, in every process."""
    if isinstance(cell, Image.Image):
        try:
            picture = open_image(cell)
        except ImageError as error:
            return str(error)
        return (picture.size, hashlib.sha256(picture.tobytes()).hexdigest())
    if isinstance(cell, bytes):
        return ("bytes", hashlib.sha256(cell).hexdigest())
    if isinstance(cell, Mapping):
        return {name: _stable(value) for name, value in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [_stable(one) for one in cell]
    return os.fspath(cell) if isinstance(cell, os.PathLike) else cell
