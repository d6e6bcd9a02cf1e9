"""A user's own table or folder of pictures to classify, and the columns that are added to it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.bad_rows import BadRows, Examples
from qwen_vl_classifier.data.example import Example, Prediction
from qwen_vl_classifier.data.folders import METADATA, metadata_name
from qwen_vl_classifier.data.labels import folded
from qwen_vl_classifier.data.loading import Source, load_rows
from qwen_vl_classifier.data.parquet import ParquetRows
from qwen_vl_classifier.data.picture_checks import read_sizes
from qwen_vl_classifier.data.readers import read_table
from qwen_vl_classifier.data.table import LoadOptions
from qwen_vl_classifier.data.text_files import format_of
from qwen_vl_classifier.errors import ConfigError, one_line
from qwen_vl_classifier.files.bounded import open_regular_file
from qwen_vl_classifier.scoring.tables.raw_tables import Cells

P_co = TypeVar("P_co", covariant=True)

PREFIX = "predicted_"
"""Begins the names of added columns where the table has columns of their plain names."""

ADDED = ("probability", "label", "decision", "label_name")
"""The columns that a classifier adds."""

_ERROR = "error"


@dataclass(frozen=True, slots=True)
class OwnTable:
    """A data file or a folder of pictures whose rows are classified.

    Attributes:
        source: Its path.
        options: How its rows are read; labels and ids are not.
        limit: Take the first so many rows.
        file: The data file, which may lie in the folder; `None` for a folder of pictures.
        columns: The names of its columns.
    """

    source: str
    options: LoadOptions
    limit: int | None = None
    file: Path | None = field(init=False)
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        path: Path | None = Path(self.source)
        if Path(self.source).is_dir():
            name = metadata_name((file for file in METADATA if (Path(self.source) / file).is_file()), self.source)
            path = Path(self.source) / name if name else None
        object.__setattr__(self, "file", path)
        object.__setattr__(self, "columns", tuple(self._columns()))

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Yield the values of each row by column; none of a row that cannot be read."""
        found = itertools.islice(read_table(self.source, self.options).rows, self.limit)
        return (row.values for row in found)

    def examples(self, max_errors: str) -> Examples:
        """Return the examples of the rows, without those that cannot be used.

        Raises:
            DataError: As in `load_examples`.
        """
        return load_rows(self.source, self.options, self.limit, max_errors)

    def _columns(self) -> Iterable[str]:
        kind = format_of(self.file.name) if self.file else None
        if self.file is not None and kind == "parquet" and self.file.is_file():
            with open_regular_file(self.file) as file:
                return ParquetRows(file, str(self.file)).column_names
        names: dict[str, None] = {}
        for row in self.rows():
            names |= dict.fromkeys(row)
            if names and kind != "jsonl" and kind != "json":  # all rows of a table have the same columns
                break
        return names


def added_columns(own: Collection[str], prefix: str | None, *, errors: bool, added: Sequence[str] = ADDED) -> list[str]:
    """Return the names of the columns that are added.

    Args:
        own: The names of the columns that are there.
        prefix: What they begin with; `None` begins them with `PREFIX` if a plain name is taken.
        errors: Whether a column for errors is among them.
        added: Their plain names.

    Raises:
        ConfigError: A name is taken; the message says which.
    """
    taken = {folded(name): name for name in own}
    plain = [*added, *([_ERROR] if errors else [])]
    if prefix is None:
        prefix = PREFIX if any(folded(name) in taken for name in plain) else ""
    names = [f"{prefix}{name}" for name in plain]
    if clash := [taken[folded(name)] for name in names if folded(name) in taken]:
        raise ConfigError(
            f"the table already has a column {clash[0]!r}; expected new names for the columns that are added; choose "
            f"what these begin with, such as {spelled('prefix', 'new_')}"
        )
    return names


class Decides(Protocol[P_co]):
    """A classifier, or a panel."""

    def decide(self, examples: Source, *, progress: bool = False, bad: BadRows | None = None) -> Sequence[P_co]:
        """Return the answer for each example."""


@dataclass(frozen=True)
class Answer(Generic[P_co]):
    """The answer of a classifier or panel for one row.

    Attributes:
        name: What messages call the row: its line, its number, or its picture.
        example: What was made of it; `None` if it could not be read.
        prediction: The answer; `None` for a row that cannot be used.
        error: Why it cannot be used, else "".
    """

    name: str
    example: Example | None = None
    prediction: P_co | None = None
    error: str = ""


def check_rows(examples: Examples, max_errors: str, *, progress: bool = False) -> BadRows:
    """Read the headers of all pictures, before a model is loaded; return the rows that cannot be used.

    Args:
        examples: The rows that became examples, and those that did not.
        max_errors: How many rows may be wrong, as in `BadRows`.
        progress: Show a progress bar.

    Raises:
        DataError: More cannot be used; the first ten are listed.
    """
    bad = BadRows(max_errors, given=examples, can_leave_out=True)
    read_sizes(examples, bad, progress=progress)
    bad.check(len(examples))
    return bad


def classify(
    classifier: Decides[P_co], examples: Examples, bad: BadRows, *, progress: bool = False
) -> list[Answer[P_co]]:
    """Return the answer of a classifier or panel for each row, in order, equal to that of its `decide`.

    Args:
        classifier: What classifies.
        examples: The rows that became examples, and those that did not.
        bad: What `check_rows` returned; receives the rows that turn out to be bad.
        progress: Show a progress bar.

    Raises:
        DataError: More rows cannot be used than may be; the first ten are listed.
    """
    predictions = iter(classifier.decide(examples, progress=progress, bad=bad))
    bad.check(len(examples))
    found: dict[int, Answer[P_co]] = {row.position: Answer(row.name, error=str(row.error)) for row in examples.unread}
    problems = {row.position: str(row.error) for row in bad}
    positions = (position for position in itertools.count() if position not in found)
    for number, (position, example) in enumerate(zip(positions, examples, strict=False)):
        name = example.origin or f"row {position + 1}"
        if number in problems:
            found[position] = Answer(name, example, error=problems[number])
        else:
            found[position] = Answer(name, example, next(predictions))
    return [found[position] for position in sorted(found)]


def cells_of(answers: Sequence[Answer[Prediction]], label_names: Sequence[str], *, errors: bool) -> list[Cells]:
    """Return what the added columns hold in each row, in the order of `added_columns`."""
    rows: list[Cells] = []
    for answer in answers:
        made, error = answer.prediction, [one_line(answer.error) if answer.error else None] if errors else []
        if made is None:
            rows.append([*[None] * len(ADDED), *error])
        else:
            rows.append([made.probability, made.label, made.decision, label_names[made.label], *error])
    return rows
