"""What a file of scores looks like: its columns, and three formats that hold them, byte for byte the same each time.

Columns are `id` (text), `row` (int64, from 0), the columns of the data that were asked for (text), for each classifier
`probability` (float64), `label` (int64) and `decision` (text), then `error_code` and `error` (text). In every row
either the last two are null or the classifiers' columns are. With several classifiers the names of their columns end in
`_` and the name of the classifier. Of a classifier that has words for its classes, `label_name` has the word for the
label; it stands before `error_code`.

Each label of a panel counts as a classifier, named as the label. Classes of which a row has exactly one have a
`probability` each, and together `class` (text) and `class_probability` (float64), which stand before `error_code`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.files.whole import encodable
from qwen_vl_classifier.scoring.jobs import RowError
from qwen_vl_classifier.scoring.scorers.exclusive_classes import ExclusiveClasses

Words: TypeAlias = "Sequence[Sequence[str] | None]"
"""For each classifier what it calls class 0 and class 1, or `None` where it has no words; empty where none has."""

NO_WORDS: Words = ()

_KINDS = ("probability", "label", "decision")
_FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # how a text begins that a spreadsheet may run


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One row of a shard.

    Attributes:
        id: Its name in the data set.
        row: Its position in the data set, from 0.
        predictions: One from each classifier; none where there is an error.
        classes: The likeliest class of each panel of exclusive classes, and its probability.
        error: Why it could not be scored, or `None`.
        kept: The columns of the data that are repeated.
    """

    id: str
    row: int
    predictions: tuple[Prediction, ...] = ()
    classes: tuple[tuple[str, float], ...] = ()
    error: RowError | None = None
    kept: tuple[str | None, ...] = ()


class _Lines(list[str]):
    """A list of what was written to it."""

    write = list.append


def columns_of(kind: str, names: Sequence[str]) -> list[str]:
    """Return the columns that hold the `probability`, the `label` or the `decision` by each classifier."""
    return [kind] if len(names) == 1 else [f"{kind}_{name}" for name in names]


def all_columns(
    names: Sequence[str],
    words: Words = NO_WORDS,
    kept: Sequence[str] = (),
    exclusive: Sequence[ExclusiveClasses] = (),
) -> list[str]:
    """Return the names of all columns, in order.

    Args:
        names: Of the classifiers.
        words: What classifiers call their classes.
        kept: Columns of the data that are repeated; `data_` comes before a name that is taken.
        exclusive: Classifiers that are classes of which a row has exactly one.
    """
    by_kind = {kind: columns_of(kind, names) for kind in (*_KINDS, "label_name")}
    scores = [by_kind[kind][number] for kind, number in _filled(len(names), exclusive)]
    named = [by_kind["label_name"][number] for number in _named(words, exclusive)]
    classes = [column for group in exclusive for column in group.columns]
    own = ["id", "row", *scores, *named, *classes, "error_code", "error"]
    return [*own[:2], *(f"data_{name}" if name in own else name for name in kept), *own[2:]]


def _filled(count: int, exclusive: Sequence[ExclusiveClasses]) -> Iterator[tuple[str, int]]:
    """Yield each kind of column with the number of each classifier that has it; a class has its probability alone."""
    classes = _numbers(exclusive)
    for kind in _KINDS:
        yield from ((kind, number) for number in range(count) if kind == "probability" or number not in classes)


def _named(words: Words, exclusive: Sequence[ExclusiveClasses]) -> list[int]:
    """Return the numbers of the classifiers that have a column for the word of the label."""
    classes = _numbers(exclusive)
    return [number for number, own in enumerate(words) if own and number not in classes]


def _numbers(exclusive: Sequence[ExclusiveClasses]) -> set[int]:
    return {number for group in exclusive for number in group.numbers}


def write_rows(
    rows: Sequence[ScoredRow],
    names: Sequence[str],
    form: str,
    words: Words = NO_WORDS,
    kept: Sequence[str] = (),
    exclusive: Sequence[ExclusiveClasses] = (),
    *,
    escape_formulas: bool = False,
) -> bytes:
    """Return the content of a file.

    Args:
        rows: In order.
        names: Of the classifiers.
        form: "parquet", "jsonl" or "csv".
        words: What classifiers call their classes.
        kept: Names of the columns of the data that are repeated.
        exclusive: Classifiers that are classes of which a row has exactly one.
        escape_formulas: In CSV, pass texts through `escape_formula`.
    """
    filled, named = list(_filled(len(names), exclusive)), _named(words, exclusive)
    cells = [list(_cells(row, filled, words, named, len(exclusive))) for row in rows]
    header = all_columns(names, words, kept, exclusive)
    if form == "parquet":
        types = [{"probability": "float64", "label": "int64", "decision": "string"}[kind] for kind, _ in filled]
        types += ["string"] * len(named) + ["string", "float64"] * len(exclusive)
        return _parquet(cells, header, ["string", "int64", *["string"] * len(kept), *types, "string", "string"])
    if form == "jsonl":
        lines = (json.dumps(dict(zip(header, row, strict=True)), separators=(",", ":")) for row in cells)
        return "".join(f"{line}\n" for line in lines).encode()
    if escape_formulas:
        header, *cells = [
            [escape_formula(cell) if isinstance(cell, str) else cell for cell in row] for row in (header, *cells)
        ]
    written = _Lines()
    csv.writer(written, lineterminator="\r\n").writerows([header, *cells])  # quotes cells with either character in them
    return "".join(f"{line[:-2]}\n" for line in written).encode()


def escape_formula(text: str) -> str:
    """Put ' before a text that a spreadsheet may take for a formula, as OWASP advises; `unescape_formula` removes it.

    Texts that begin so already, but for the ', get one more: otherwise two texts would become one.

    Example:
        >>> escape_formula("=1+1"), escape_formula("'=1+1"), escape_formula("'tis")
        ("'=1+1", "''=1+1", "'tis")
    """
    return f"'{text}" if _FORMULA.match(text) else text


def unescape_formula(text: str) -> str:
    """Return what `escape_formula` was given.

    Example:
        >>> unescape_formula("'=1+1"), unescape_formula("'tis")
        ('=1+1', "'tis")
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _cells(
    row: ScoredRow, filled: Sequence[tuple[str, int]], words: Words, named: Sequence[int], groups: int
) -> Iterator[Any]:
    yield encodable(row.id)
    yield row.row
    yield from (None if cell is None else encodable(cell) for cell in row.kept)
    for kind, number in filled:
        yield getattr(row.predictions[number], kind) if row.predictions else None
    for number in named:
        own = words[number] or ("", "")
        yield encodable(own[row.predictions[number].label]) if row.predictions else None
    for name, probability in row.classes or [(None, None)] * groups:
        yield None if name is None else encodable(name)
        yield probability
    yield None if row.error is None else row.error.code
    yield None if row.error is None else encodable(row.error.message)


def _parquet(cells: Sequence[Sequence[Any]], header: Sequence[str], types: Sequence[str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(list(zip(header, map(pa.type_for_alias, types), strict=True)))
    arrays = [pa.array([row[place] for row in cells], field.type) for place, field in enumerate(schema)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file, compression="zstd", write_page_checksum=True)
    return file.getvalue()
