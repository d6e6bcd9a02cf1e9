"""What a file of scores looks like: its columns, and three formats that hold them, byte for byte the same each time.

Columns are `id` (text), `row` (int64, from 0), for each classifier `probability` (float64), `label` (int64) and
`decision` (text), then `error_code` and `error` (text). In every row either the last two are null or the classifiers'
columns are. With several classifiers the names of their columns end in `_` and the name of the classifier. Of a
classifier that has words for its classes, `label_name` has the word for the label; it stands before `error_code`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.files.whole import encodable
from qwen_vl_classifier.scoring.jobs import RowError

Words: TypeAlias = "Sequence[Sequence[str] | None]"
"""For each classifier what it calls class 0 and class 1, or `None` where it has no words; empty where none has."""

NO_WORDS: Words = ()

_KINDS = ("probability", "label", "decision")
_SCORED = b'"error_code":null,'  # in a line of JSON: inside a text, its quotes would be escaped


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One row of a shard.

    Attributes:
        id: Its name in the data set.
        row: Its position in the data set, from 0.
        predictions: One from each classifier; none where there is an error.
        error: Why it could not be scored, or `None`.
    """

    id: str
    row: int
    predictions: tuple[Prediction, ...] = ()
    error: RowError | None = None


def columns_of(kind: str, names: Sequence[str]) -> list[str]:
    """Return the columns that hold the `probability`, the `label` or the `decision` by each classifier."""
    return [kind] if len(names) == 1 else [f"{kind}_{name}" for name in names]


def all_columns(names: Sequence[str], words: Words = NO_WORDS) -> list[str]:
    """Return the names of all columns, in order."""
    scores = [column for kind in _KINDS for column in columns_of(kind, names)]
    named = [column for column, own in zip(columns_of("label_name", names), words, strict=False) if own]
    return ["id", "row", *scores, *named, "error_code", "error"]


def write_rows(rows: Sequence[ScoredRow], names: Sequence[str], form: str, words: Words = NO_WORDS) -> bytes:
    """Return the content of a file.

    Args:
        rows: In order.
        names: Of the classifiers.
        form: "parquet", "jsonl" or "csv".
        words: What classifiers call their classes.
    """
    cells = [list(_cells(row, names, words)) for row in rows]
    if form == "parquet":
        return _parquet(cells, names, words)
    header = all_columns(names, words)
    if form == "jsonl":
        lines = (json.dumps(dict(zip(header, row, strict=True)), separators=(",", ":")) for row in cells)
        return "".join(f"{line}\n" for line in lines).encode()
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *cells])
    return text.getvalue().encode()


def errors_in(file: BinaryIO, rows: int, names: Sequence[str], form: str, words: Words = NO_WORDS) -> int | None:
    """Count the rows with an error in a file; of Parquet, only its end is read.

    Args:
        file: Open for reading.
        rows: How many rows it should have.
        names: Of the classifiers.
        form: "parquet", "jsonl" or "csv".
        words: What classifiers call their classes.

    Returns:
        Their number, or `None` where the file is damaged or of another shape.
    """
    count = {"parquet": _errors_in_parquet, "jsonl": _errors_in_jsonl, "csv": _errors_in_csv}[form]
    found = count(file, names, words)
    return found[1] if found is not None and found[0] == rows else None


def _cells(row: ScoredRow, names: Sequence[str], words: Words) -> Iterator[Any]:
    yield encodable(row.id)
    yield row.row
    for kind in _KINDS:
        for number in range(len(names)):
            yield getattr(row.predictions[number], kind) if row.predictions else None
    for number, own in enumerate(words):
        if own:
            yield encodable(own[row.predictions[number].label]) if row.predictions else None
    yield None if row.error is None else row.error.code
    yield None if row.error is None else encodable(row.error.message)


def _parquet(cells: Sequence[Sequence[Any]], names: Sequence[str], words: Words) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(names, words)
    arrays = [pa.array([row[place] for row in cells], field.type) for place, field in enumerate(schema)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file, compression="zstd", write_page_checksum=True)
    return file.getvalue()


def _schema(names: Sequence[str], words: Words) -> Any:
    """Return the names and types of the columns."""
    import pyarrow as pa

    types = {"row": pa.int64()}
    types |= dict.fromkeys(columns_of("probability", names), pa.float64())
    types |= dict.fromkeys(columns_of("label", names), pa.int64())
    return pa.schema([(name, types.get(name, pa.string())) for name in all_columns(names, words)])


def _errors_in_parquet(file: BinaryIO, names: Sequence[str], words: Words) -> tuple[int, int] | None:
    """Count rows, and those with an error, by the statistics at the file's end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except (OSError, pa.ArrowException, ValueError):
        return None
    if not schema.equals(_schema(names, words)):
        return None
    place = schema.get_field_index("error_code")
    codes = [metadata.row_group(number).column(place).statistics for number in range(metadata.num_row_groups)]
    if not all(statistics is not None and statistics.has_null_count for statistics in codes):
        return None
    return metadata.num_rows, metadata.num_rows - sum(statistics.null_count for statistics in codes)


def _errors_in_jsonl(file: BinaryIO, names: Sequence[str], words: Words) -> tuple[int, int] | None:
    rows = errors = 0
    for line in file:
        if not (line.startswith(b"{") and line.endswith(b"}\n")):
            return None
        rows += 1
        errors += _SCORED not in line
        if rows == 1:
            try:
                first = json.loads(line)
            except ValueError:
                return None
            if list(first) != all_columns(names, words):
                return None
    return rows, errors


def _errors_in_csv(file: BinaryIO, names: Sequence[str], words: Words) -> tuple[int, int] | None:
    header = all_columns(names, words)
    place = header.index("error_code")
    rows = errors = 0
    try:
        table = csv.reader(io.StringIO(file.read().decode(), newline=""), strict=True)
        if next(table, None) != header:
            return None
        for cells in table:
            if len(cells) != len(header):
                return None
            rows += 1
            errors += bool(cells[place])
    except (csv.Error, UnicodeDecodeError):
        return None
    return rows, errors
