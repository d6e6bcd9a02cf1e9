"""Load whole data sets as examples: all rows are checked, and one error reports all that is wrong.

`load_examples` is for data sets with their options; `as_examples` is what every verb does with the rows it is given.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from qwen_vl_classifier.config.fields import MAX_TEXT_CHARS, most_errors
from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.bad_rows import BadRow, Examples, how_to_leave_out, listed_problems
from qwen_vl_classifier.data.example import Example
from qwen_vl_classifier.data.in_memory import iterable_rows
from qwen_vl_classifier.data.labels import Labels
from qwen_vl_classifier.data.locating import CellError
from qwen_vl_classifier.data.readers import read_table
from qwen_vl_classifier.data.rows import RowParser, checked_text, plain_value
from qwen_vl_classifier.data.table import Columns, LoadOptions, Table
from qwen_vl_classifier.errors import ConfigError, DataError, shown

_log = logging.getLogger(__name__)

_LABEL_TYPES = (int, bool, type(None))
_FIRST_ROWS = 1000  # a column that all of these lack is missing


Source: TypeAlias = "str | os.PathLike[str] | Example | Mapping[str, Any] | Iterable[Mapping[str, Any] | Example]"
"""What `load_examples` takes; also a Hugging Face data set, a DataFrame of pandas or polars, or a table of pyarrow."""


def load_examples(
    source: Source,
    *,
    image_column: str = "image",
    text_column: str = "text",
    label_column: str = "label",
    id_column: str = "id",
    positive: str | None = None,
    class_names: tuple[str, str] | None = None,
    text: str | None = None,
    allow_outside: bool = False,
    require_labels: bool = False,
    read_labels: bool = True,
    soft_labels: bool = False,
    one_of: bool = False,
    limit: int | None = None,
    max_errors: str | int | None = "",
    max_text_chars: int = MAX_TEXT_CHARS,
) -> list[Example]:
    """Load a data set, with every row checked but no picture decoded.

    A row's picture is a path, the bytes of an image file, Hugging Face's `{"bytes": ..., "path": ...}`, a PIL
    image, a list of these, or null for text alone. Its label and id may be missing. Columns other than the
    four named go to `Example.fields`.

    Args:
        source: A `.jsonl`, `.ndjson`, `.csv`, `.tsv`, `.json` or `.parquet` file, those of text also packed (`.gz`); a
            folder whose subfolders hold the pictures of each class, `0` and `1` or by any name with `positive`, or that
            has a `metadata.csv`, `.jsonl` or `.parquet` with `file_name`; a Hugging Face data set; a DataFrame of
            pandas or polars, or a table of pyarrow; an iterable of dicts or of examples; or one dict or example alone.
        image_column: Column of the picture(s). Paths are relative to the data file, or to the working
            directory for rows given in Python.
        text_column: Column of the text.
        label_column: Column of the label: 0 or 1, as number, text or truth value, or words with `positive`.
        id_column: Column of the id, unique in the data set; may be missing.
        positive: The label that counts as 1; every other counts as 0. Labels are compared as text, whatever their type,
            without the blanks around them.
        class_names: What class 0 and class 1 are called: labels may be these words, and 0 and 1. A classifier reads
            what it is given with its own `label_names`.
        text: One text for all rows, in place of the text column. A folder needs it.
        allow_outside: Allow a data file to name pictures outside of its own folder.
        require_labels: Refuse rows without a label.
        read_labels: Read labels at all; where false, examples have none, and a folder may hold any subfolders.
        soft_labels: Take any number from 0 to 1 as label, the probability of class 1; for training.
        one_of: The label column, or the class folder, names one of several classes, by any word. Examples then have no
            label, and the word is in `Example.fields` under the label column's name, for `train_panel` and panels.
        limit: Take only so many rows, the first.
        max_errors: Leave out at most this many rows that cannot be used: a number, or a percentage such as "5%"; "100%"
            leaves out all of them, whatever is wrong. They are the `unread` of the list that is returned, and the
            `max_errors` of `train` and others counts them too. `None` is as "", but errors do not advise it.
        max_text_chars: Refuse a longer text, in characters.

    Returns:
        One example for each row that is not left out, in order; at least one.

    Raises:
        DataError: If the source cannot be read, holds no rows, or holds rows that cannot be used; the first
            ten of these are listed, by line or row number from 1, with their total; or if no row has the label that
            is to count as 1.
        ConfigError: If `limit` or `max_text_chars` is below 1, or options about labels contradict each other.

    Example:
        >>> load_examples([{"image": None, "text": "A claim.", "verdict": "true"}],
        ...               label_column="verdict", positive="true")
        [Example(image=None, text='A claim.', label=1, id=None)]
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"{spelled('limit', limit)}; expected at least 1; leave it out to take all rows")
    options = LoadOptions(
        Columns(image_column, text_column, label_column, id_column),
        positive=positive,
        class_names=class_names,
        text=text,
        allow_outside=allow_outside,
        require_labels=require_labels,
        read_labels=read_labels,
        soft_labels=soft_labels,
        one_of=one_of,
        max_text_chars=max_text_chars,
    )
    return load_rows(source, options, limit, max_errors)


def as_examples(
    rows: Source,
    *,
    class_names: tuple[str, str] | None = None,
    read_labels: bool = True,
    soft_labels: bool = False,
    max_errors: str | int | None = None,
) -> Sequence[Example]:
    """Return the rows that a verb was given as examples: anything that `load_examples` takes.

    A list of examples is returned unchanged, except that labels which are arrays of one element become numbers.

    Args:
        rows: The rows; relative paths of pictures begin in the working directory.
        class_names: What class 0 and class 1 are called: labels may be these words, and 0 and 1.
        read_labels: Read labels at all.
        soft_labels: Take any number from 0 to 1 as label.
        max_errors: As in `load_examples`; with it, a row without a label is one that cannot be used, if labels are
            read at all.

    Raises:
        DataError: It is something else, or rows cannot be used; they are listed by number, from 1.
    """
    if isinstance(rows, Example):
        rows = [rows]
    if isinstance(rows, (list, tuple)) and all(row.__class__ is Example for row in rows):
        labels = Labels(soft=True, required=bool(max_errors)) if read_labels else None
        return _checked(rows, labels, max_errors=max_errors)
    options = LoadOptions(
        class_names=class_names, read_labels=read_labels, soft_labels=soft_labels, require_labels=bool(max_errors)
    )
    return load_rows(rows, options, max_errors=max_errors)


def each_example(rows: Iterator[Any]) -> Iterator[Example]:
    """Yield the rows of an iterator as examples without labels, one after the other.

    Raises:
        DataError: A row cannot be used.
    """
    options = LoadOptions(read_labels=False)
    table = Table(f"the {type(rows).__name__}", "row", iterable_rows(rows, options.columns))
    parser = RowParser(table, options)
    for row in table.rows:
        if row.example is not None:
            yield from _checked([row.example], None, first=row.number)
            continue
        parsed = parser.parse(row)
        if parsed.example is None:
            raise DataError(f"row {row.number} of {table.name} cannot be used: {'; '.join(parsed.problems)}")
        yield parsed.example


def _checked(
    examples: Sequence[Example], labels: Labels | None, first: int = 1, max_errors: str | int | None = None
) -> Sequence[Example]:
    """Return examples whose texts are text, and whose labels, if they are to be read, are numbers or `None`."""
    changed: dict[int, Example] = {}
    problems: list[BadRow] = []
    checks_labels = labels is not None and bool(max_errors)
    for position, example in enumerate(examples):
        text, label = example.text, example.label
        if (
            text.__class__ is str
            and text.isascii()
            and not checks_labels
            and (labels is None or label.__class__ in _LABEL_TYPES)
        ):
            continue  # nearly all: every prediction comes through here
        column = "text"
        try:
            checked_text(text)
            column = "label"
            read = label if labels is None else labels.read(plain_value(label))[0]
        except CellError as problem:
            name = example.origin or f"row {first + position}"
            problems.append(BadRow(position, name, DataError(f"{column} {problem}")))
            continue
        if read is not label:
            changed[position] = replace(example, label=read)
    if len(problems) > most_errors(max_errors or "", len(examples)) or len(problems) == len(examples) > 0:
        raise DataError("\n".join(listed_problems(problems, len(examples), "examples")))
    if not changed and not problems:
        return examples
    bad = {problem.position for problem in problems}
    kept = (changed.get(position, example) for position, example in enumerate(examples) if position not in bad)
    return Examples(kept, [*(examples.unread if isinstance(examples, Examples) else ()), *problems])


def load_rows(
    source: Source, options: LoadOptions, limit: int | None = None, max_errors: str | int | None = None
) -> Examples:
    """Make examples of the rows of a source, without those that may be left out, or one error of all that is wrong.

    Arguments and errors are those of `load_examples`.
    """
    began = time.perf_counter()
    table = read_table(source, options)
    parser = RowParser(table, options)
    rows = itertools.islice(table.rows, limit)
    first_rows = list(itertools.islice(rows, _FIRST_ROWS))
    parser.check_columns(first_rows)

    examples = []
    problems: list[BadRow] = []
    first_with: dict[str, int] = {}
    total = 0
    for row in itertools.chain(first_rows, rows):  # rows as read take more memory than examples: they are not kept
        total += 1
        parsed = parser.parse(row)
        found = list(parsed.problems)
        if parsed.id is not None and (first := first_with.setdefault(parsed.id, row.number)) != row.number:
            found.append(f"{options.columns.id} is {shown(parsed.id)}, as on {table.unit} {first}")
        if found:
            problems.append(BadRow(total - 1, f"{table.unit} {row.number}", DataError("; ".join(found))))
        elif parsed.example is not None:
            examples.append(parsed.example)
    parser.labels.check(table.name)
    if len(problems) > most_errors(max_errors or "", total) or len(problems) == total:
        lines = listed_problems(problems, total, f"rows of {table.name}")
        advice = "" if max_errors is None else f", or leave them out with {how_to_leave_out()}"
        if max_errors:
            advice = f"; {spelled('max_errors', max_errors)} allows fewer" if len(problems) < total else ""
        lines.append(f"Correct these rows or take them out, then load again{advice}.")
        folder = table.folder.absolute() if table.folder else "the working directory"
        lines.append(f"Relative image paths start from {folder}.")
        if parser.labels.refused:
            lines.append(f"Labels that were read: {parser.labels.listed()}.")
        raise DataError("\n".join(lines))
    _log.debug("read %d rows of %s in %.1f s", total, table.name, time.perf_counter() - began)
    return Examples(examples, problems)
