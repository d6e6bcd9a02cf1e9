"""What a folder of scores says in all: how many rows each classifier decided in which way."""

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
from qwen_vl_classifier.scoring.formats import columns_of
from qwen_vl_classifier.scoring.manifest import ScoreManifest
from qwen_vl_classifier.scoring.shards import MANIFEST, SHARDS


def decision_counts(folder: Path) -> list[str]:
    """Count the decisions in all shards of a folder of scores on this machine.

    Args:
        folder: With scores by a run that has ended.

    Returns:
        One line for each classifier, such as "12 yes (dog), 30 no (cat), 2 abstain".

    Raises:
        OSError: A file cannot be read.
    """
    manifest = ScoreManifest.from_json(read_json(folder / MANIFEST))
    columns = columns_of("decision", manifest.names)
    counts = {column: Counter[str]() for column in columns}
    for shard in sorted((folder / SHARDS).glob(f"*.{manifest.format}")):
        for column, found in _decisions(shard, manifest.format, columns).items():
            counts[column].update(found)
    lines = []
    for place, column in enumerate(columns):
        own = manifest.words[place] if manifest.words else None
        no, yes = (f" ({one_line(name)})" for name in own) if own else ("", "")
        found = counts[column]
        parts = [f"{found['yes']:,} yes{yes}", f"{found['no']:,} no{no}"]
        parts += [f"{found['abstain']:,} abstain"] * bool(found["abstain"])
        lines.append(f"{f'{manifest.names[place]}: ' if len(columns) > 1 else ''}{first_of(parts)}")
    return lines


def _decisions(shard: Path, form: str, columns: list[str]) -> Mapping[str, Mapping[str, int]]:
    """Return how often each decision occurs in a shard, for each of the columns."""
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
