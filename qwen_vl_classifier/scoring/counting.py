"""What a folder of scores says in all: how many rows each classifier decided in which way, or have which class."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_vl_classifier.errors import first_of, one_line
from qwen_vl_classifier.files.bounded import open_regular_file, read_json
from qwen_vl_classifier.files.whole import encodable
from qwen_vl_classifier.scoring.formats import columns_of, escape_formula
from qwen_vl_classifier.scoring.manifest import ScoreManifest
from qwen_vl_classifier.scoring.shards import MANIFEST, SHARDS

_MOST_CLASSES = 20  # in a line


def decision_counts(folder: Path) -> list[str]:
    """Count the decisions in all shards of a folder of scores on this machine.

    Args:
        folder: With scores by a run that has ended.

    Returns:
        One line for each classifier, such as "12 yes (dog), 30 no (cat), 2 abstain", and for each panel of exclusive
        classes, such as "12 dog, 30 cat".

    Raises:
        OSError: A file cannot be read.
    """
    manifest = ScoreManifest.from_json(read_json(folder / MANIFEST))
    classes = {number for group in manifest.exclusive for number in group.numbers}
    decisions = {
        number: column for number, column in enumerate(columns_of("decision", manifest.names)) if number not in classes
    }
    columns = [*decisions.values(), *(group.columns[0] for group in manifest.exclusive)]
    counts = {column: Counter[str]() for column in columns}
    for shard in sorted((folder / SHARDS).glob(f"*.{manifest.format}")):
        for column, found in _values(shard, manifest.format, columns).items():
            counts[column].update(found)
    lines = []
    for number, column in decisions.items():
        own = manifest.words[number] if manifest.words else None
        no, yes = (f" ({one_line(name)})" for name in own) if own else ("", "")
        found = counts[column]
        parts = [f"{found['yes']:,} yes{yes}", f"{found['no']:,} no{no}"]
        parts += [f"{found['abstain']:,} abstain"] * bool(found["abstain"])
        lines.append(f"{f'{one_line(manifest.names[number])}: ' if len(columns) > 1 else ''}{first_of(parts)}")
    for group in manifest.exclusive:
        found = counts[group.columns[0]]
        parts = [f"{found[_as_written(name, manifest)]:,} {one_line(name)}" for name in group.classes]
        lines.append(f"{f'{one_line(group.name)}: ' if group.name else ''}{first_of(parts, most=_MOST_CLASSES)}")
    return lines


def _as_written(name: str, manifest: ScoreManifest) -> str:
    """Return a text as the cells of a file have it."""
    escaped = manifest.format == "csv" and manifest.options.get("escape_formulas", True)
    return escape_formula(encodable(name)) if escaped else encodable(name)


def _values(shard: Path, form: str, columns: list[str]) -> Mapping[str, Mapping[str, int]]:
    """Return how often each value occurs in a shard, for each of the columns."""
    with open_regular_file(shard) as file:
        if form == "parquet":
            from pyarrow import parquet

            table = parquet.ParquetFile(file).read(columns=columns)
            return {column: Counter(filter(None, table[column].to_pylist())) for column in columns}
        lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
        rows: Iterable[Mapping[str, Any]] = csv.DictReader(lines) if form == "csv" else map(json.loads, lines)
        counts = {column: Counter[str]() for column in columns}
        for row in rows:
            for column in columns:
                if row[column]:
                    counts[column][row[column]] += 1
    return counts
