"""Rows to ask in an order that a person or a classifier has given: ids in a file, or the scores of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_vl_classifier.config.spelling import spelled
from qwen_vl_classifier.data.readers import read_table
from qwen_vl_classifier.data.table import LoadOptions
from qwen_vl_classifier.data.text_files import BYTE_ORDER_MARK, LongLine, bounded_lines
from qwen_vl_classifier.errors import DataError, one_line, shown
from qwen_vl_classifier.files.bounded import open_regular_file, parse_json, read_json
from qwen_vl_classifier.labelling.pool import Pool
from qwen_vl_classifier.scoring.formats import unescape_formula
from qwen_vl_classifier.scoring.shards import MANIFEST, SHARDS

_MOST_ROWS = 10_000_000  # of a file of ids
_SURE = 700.0  # log odds beyond which a probability is 0 or 1 in double precision


@dataclass(frozen=True, slots=True)
class Queue:
    """Rows to ask, in order.

    Attributes:
        rows: Their numbers in the pool.
        only: Whether nothing else is to be asked, and labels that are there already are to be confirmed or corrected.
        missing: How many rows of the file or run are not in the data.
    """

    rows: tuple[int, ...]
    only: bool
    missing: int = 0


def queue_from_rows(file: str | os.PathLike[str], pool: Pool) -> Queue:
    """Read which rows to ask, in their order: nothing else is asked then.

    Args:
        file: Lines of JSON as "Save row ids" of a report writes them, `{"id": "leaf-17"}` or `{"row": 17}`, or a text
            file with an id in each line.
        pool: The rows of the data that the report was about.

    Raises:
        DataError: The file cannot be read, a line is neither, or none of its rows is in the data.
    """
    path, finder = Path(file), _Finder(pool)
    rows: dict[int, None] = {}
    missing = 0
    try:
        with open_regular_file(path) as opened:
            for number, line in enumerate(bounded_lines(opened, str(path)), start=1):
                if number > _MOST_ROWS:
                    raise DataError(f"{path} has more than {_MOST_ROWS:,} lines; expected ids of rows; check the file")
                found = finder.of_line(line, f"{path}, line {number}")
                if found is None:
                    missing += bool(line.strip())
                else:
                    rows[found] = None
    except OSError as error:
        raise DataError(
            f"{spelled('rows', str(path))} cannot be read ({error.strerror}); expected a file of ids; check the path"
        ) from None
    if not rows:
        raise DataError(
            f"{path}: none of its {missing:,} rows is in the data of {len(pool.everything):,} rows; expected ids or "
            "numbers of these; give the data that the report was about"
        )
    return Queue(tuple(rows), only=True, missing=missing)


def queue_from_scores(folder: str | os.PathLike[str], pool: Pool) -> Queue:
    """Order rows by how unsure a classifier was of them: abstentions first, then the nearest to the threshold.

    The distance is that of log odds; with several classifiers or labels, the smallest counts, and where a row has
    exactly one of several classes, that between the two most probable ones. The threshold lies between the greatest
    probability with label 0 and the least with label 1.

    Args:
        folder: The output of `score`.
        pool: The rows of the data that was scored. They are found by id, and without ids by number.

    Raises:
        DataError: The folder cannot be read, or none of its rows is in the data.
    """
    place, finder = Path(folder), _Finder(pool)
    scored: list[int] = []
    scores = _Scores()
    missing = 0
    for values in _scored_rows(place):
        row = finder.of_score(values)
        if row is None:
            missing += 1
        elif scores.add(values):
            scored.append(row)
    if not scored:
        raise DataError(
            f"{place}: none of its scores is of a row of the data, which has {len(pool.everything):,} rows; expected "
            "scores of these rows; give the data that was scored"
        )
    order = np.array(scored)[scores.order()]
    return Queue(tuple(dict.fromkeys(order.tolist())), only=False, missing=missing)


class _Finder:
    """Finds the number of a row in the pool by what others call it."""

    def __init__(self, pool: Pool) -> None:
        numbers = pool.numbers.tolist()
        self._by_id: dict[str, int] = {
            example.id: row for example, row in zip(pool.everything, numbers, strict=True) if example.id is not None
        }
        self._by_index: dict[int, int] = dict(zip(pool.indices.tolist(), numbers, strict=True))
        self._by_position: dict[int, int] = dict(zip(pool.positions.tolist(), numbers, strict=True))
        self._by_name: dict[str, list[tuple[str, int]]] = {}  # pictures without ids, as of a folder
        for example, row in zip(pool.everything, numbers, strict=True):
            if example.id is None and len(example.images) == 1 and isinstance(example.images[0], (str, os.PathLike)):
                path = Path(example.images[0])
                self._by_name.setdefault(path.name, []).append((path.as_posix(), row))

    def of_line(self, line: bytes, place: str) -> int | None:
        """Return the row that a line of a file names.

        Raises:
            DataError: The line names none.
        """
        if isinstance(line, LongLine):
            raise DataError(f"{place}: {line.size:,} bytes; expected the id of a row; correct the file")
        try:
            text = line.removeprefix(BYTE_ORDER_MARK).decode("utf-8").strip()
        except UnicodeDecodeError:
            raise DataError(f"{place}: not UTF-8; expected the id of a row; save the file as UTF-8") from None
        if not text.startswith("{"):
            return self._by_id.get(text, self._of_name(text))
        try:
            values = parse_json(text)
        except ValueError:
            values = None
        name = values.get("id") if isinstance(values, dict) else None
        number = values.get("row") if isinstance(values, dict) else None
        if isinstance(name, str):
            return self._by_id.get(name, self._of_name(name))
        if isinstance(number, int) and not isinstance(number, bool):
            return self._by_index.get(number)
        raise DataError(
            f'{place}: {shown(text)}; expected {{"id": "..."}}, {{"row": 17}} or the id of a row; correct the file'
        )

    def of_score(self, values: Mapping[str, Any]) -> int | None:
        """Return the row that a row of scores is of."""
        name, number = str(values.get("id", "")), _whole(values.get("row"))
        if name in self._by_id:
            return self._by_id[name]
        if number is not None and name == str(number):  # `score` calls a row without an id by its number
            return self._by_position.get(number)
        return self._of_name(name)

    def _of_name(self, name: str) -> int | None:
        """Return the row of a picture whose path ends in a name; none where there are several."""
        alike = [row for path, row in self._by_name.get(Path(name).name, []) if f"/{path}".endswith(f"/{name}")]
        return alike[0] if len({*alike}) == 1 else None


@dataclass(slots=True)
class _Scores:
    """Probabilities, labels and decisions of rows, as they were read."""

    _rows: list[tuple[dict[str, float], dict[str, int], bool]] = field(default_factory=list)

    def add(self, values: Mapping[str, Any]) -> bool:
        """Add the scores of a row; return whether it has any."""
        margins = {
            column: margin
            for column, value in values.items()
            if column == "probability" or column.startswith("probability_")
            if (margin := _log_odds(value)) is not None
        }
        if not margins:
            return False
        labels = {}
        for column in margins:
            label = _whole(values.get(column.replace("probability", "label", 1)))
            if label in (0, 1):
                labels[column] = label
        abstains = any(values.get(column.replace("probability", "decision", 1)) == "abstain" for column in margins)
        self._rows.append((margins, labels, abstains))
        return True

    def order(self) -> list[int]:
        """Return the rows that were added by how unsure their scores are."""
        edges: dict[str, tuple[float, float]] = {}
        for margins, labels, _ in self._rows:
            for column, label in labels.items():
                low, high = edges.get(column, (-math.inf, math.inf))
                margin = margins[column]
                edges[column] = (low, min(high, margin)) if label else (max(low, margin), high)
        thresholds = {column: _between(*edge) for column, edge in edges.items()}

        def key(number: int) -> tuple[bool, float, int]:
            margins, labels, abstains = self._rows[number]
            if labels:
                return not abstains, min(abs(margins[column] - thresholds[column]) for column in labels), number
            first, *others = sorted(margins.values(), reverse=True)  # one of several classes, or no labels to go by
            return not abstains, first - others[0] if others else abs(first), number

        return sorted(range(len(self._rows)), key=key)


def _scored_rows(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Read the rows of all shards in a folder of scores, in order."""
    try:
        manifest = read_json(folder / MANIFEST)
        shards = sorted(path for path in (folder / SHARDS).iterdir() if not path.name.startswith("."))
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error, 100)
        raise DataError(
            f"{spelled('scores', str(folder))} cannot be read ({reason}); expected the folder that score has written; "
            f"check the path"
        ) from None
    options = manifest.get("options") if isinstance(manifest, dict) else None
    escapes = isinstance(options, dict) and options.get("escape_formulas", True)
    for shard in shards:
        for row in read_table(str(shard), LoadOptions(read_labels=False, read_ids=False)).rows:
            if row.problem:
                raise DataError(f"{shard}, row {row.number}: {row.problem}; expected scores; run score again")
            values = row.values
            if escapes and shard.suffix == ".csv" and isinstance(values.get("id"), str):
                values = {**values, "id": unescape_formula(values["id"])}
            yield values


def _log_odds(value: object) -> float | None:
    """Return the log odds of a probability, which CSV has as text; `None` for anything else."""
    try:
        probability = float(str(value))
    except ValueError:
        return None
    if not 0 <= probability <= 1:
        return None
    if probability in (0, 1):
        return math.copysign(_SURE, probability - 0.5)
    return math.log(probability) - math.log1p(-probability)


def _whole(value: object) -> int | None:
    """Return a whole number, which CSV has as text; `None` for anything else."""
    try:
        return int(str(value))
    except ValueError:
        return None


def _between(low: float, high: float) -> float:
    """Return the threshold between the greatest margin below it and the least above it."""
    if math.isinf(low) or math.isinf(high):
        return high if math.isinf(low) else low
    return (low + high) / 2
