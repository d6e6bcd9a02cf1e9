"""Shards: a folder of scores that says what made them, and in which every file is complete or absent.

::

    manifest.json             what was scored, by what and how; a run that differs is refused
    shards/000000.parquet     the scores of the first rows, in order
    shards/000001.parquet     the scores of the next ones, ...

A shard has the columns `id` (text), `row` (int64, from 0), for each classifier `probability` (float64), `label`
(int64) and `decision` (text), and `error` (text). In every row either `error` is null or the classifiers' columns are.
With several classifiers the names of their columns end in `_` and the name of the classifier.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.errors import ConfigError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards"

_PARTIAL = ".partial"

_SHA256 = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


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
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ScoreManifest:
    """Everything that the scores in a folder depend on.

    Attributes:
        classifiers: For each classifier its name, unlike all others, and its fingerprint; in the order of columns.
        data: SHA-256 of the data.
        options: Name and value of each option that decides which rows there are, or how they are cut.
    """

    classifiers: tuple[tuple[str, str], ...]
    data: str
    options: Mapping[str, Any]

    def columns(self, kind: str) -> list[str]:
        """Return the columns that hold the `probability`, the `label` or the `decision` by each classifier."""
        if len(self.classifiers) == 1:
            return [kind]
        return [f"{kind}_{name}" for name, _ in self.classifiers]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `manifest.json`."""
        fingerprints = (fingerprint for _, fingerprint in self.classifiers)
        return {
            "format_version": FORMAT_VERSION,
            "classifiers": dict(zip(self.columns("probability"), fingerprints, strict=True)),
            "data": self.data,
            "options": dict(self.options),
        }


class ShardFolder:
    """A folder of shards. One run at a time writes to it.

    Args:
        folder: Where they lie; `open` makes it.
        manifest: What they depend on.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: ScoreManifest) -> None:
        self.folder = Path(folder)
        self.manifest = manifest

    def open(self) -> None:
        """Make the folder, or check that what it holds was made in the same way, and clear what a kill left.

        Raises:
            ConfigError: It holds other scores, or something else, or cannot be written.
        """
        content = self.manifest.to_json()
        shards = self.folder / SHARDS
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = self._kept_manifest()
            if _facts(kept) != _facts(content):
                if any(shards.glob("*.parquet")):  # without shards there is nothing yet to mix up
                    raise ConfigError(
                        f"{self.folder}: holds scores of another run: {'; '.join(_differences(kept, content))}; "
                        "give another folder, or delete this one to score again"
                    )
                with _replacing(self.folder / MANIFEST) as file:
                    file.write(json.dumps(content, indent=2).encode() + b"\n")
            shards.mkdir(exist_ok=True)
            for partial in (*self.folder.glob(f".*{_PARTIAL}"), *shards.glob(f".*{_PARTIAL}")):
                partial.unlink()

    def errors_in(self, index: int, rows: int) -> int | None:
        """Count the rows with an error in a shard.

        Args:
            index: Which shard, from 0.
            rows: How many rows it should have.

        Returns:
            Their number, or `None` where the shard is missing, damaged or of another shape: it is to be made anew.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # By handle: of a path, pyarrow would look for partitions in the names of its folders.
            with self._path(index).open("rb") as file:
                table = pq.read_table(file, page_checksum_verification=True)
        except (OSError, pa.ArrowException):
            return None
        if table.num_rows != rows or not table.schema.equals(_schema(self.manifest)):
            return None
        return rows - int(table.column("error").null_count)

    def write(self, index: int, rows: Sequence[ScoredRow]) -> None:
        """Write a shard; on return it is on disk.

        Args:
            index: Which shard, from 0.
            rows: Its rows, in order.

        Raises:
            ConfigError: It cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: list[list[Any]] = [[_encodable(row.id) for row in rows], [row.row for row in rows]]
        for kind in ("probability", "label", "decision"):
            columns += [
                [getattr(row.predictions[number], kind) if row.predictions else None for row in rows]
                for number in range(len(self.manifest.classifiers))
            ]
        columns.append([None if row.error is None else _encodable(row.error) for row in rows])
        schema = _schema(self.manifest)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=schema)
        with self._writing(), _replacing(self._path(index)) as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)

    def _path(self, index: int) -> Path:
        return self.folder / SHARDS / f"{index:06d}.parquet"

    def _kept_manifest(self) -> Any:
        """Return the content of the folder's manifest, or `None` where there is none yet."""
        try:
            return json.loads((self.folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            others = sorted(entry.name for entry in self.folder.iterdir() if not entry.name.startswith("."))
            if others:
                raise ConfigError(
                    f"{self.folder}: holds {', '.join(map(repr, others[:3]))} but no {MANIFEST}, so it is no folder "
                    "of scores; give a new or empty folder"
                ) from None
            return None
        except ValueError:
            raise ConfigError(
                f"{self.folder}: its {MANIFEST} is damaged, so nothing says what its shards are; "
                "give another folder, or delete this one to score again"
            ) from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: scores cannot be written here ({error.strerror or type(error).__name__}); give a "
                "folder that can be written, on a disk with room: a shard that is complete is not made again"
            ) from error


def _schema(manifest: ScoreManifest) -> Any:
    """Return the names and types of a shard's columns."""
    import pyarrow as pa

    fields = [("id", pa.string()), ("row", pa.int64())]
    for kind, dtype in (("probability", pa.float64()), ("label", pa.int64()), ("decision", pa.string())):
        fields += [(column, dtype) for column in manifest.columns(kind)]
    return pa.schema([*fields, ("error", pa.string())])


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to, which takes the place of `path` once all of it is on disk."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _encodable(text: str) -> str:
    """Replace what UTF-8 cannot hold: JSON can spell half of a surrogate pair, Parquet cannot."""
    return text.encode("utf-8", "replace").decode()


def _differences(kept: Any, given: Any) -> list[str]:
    """Name each fact in which two manifests differ; of a SHA-256 the beginning is enough for people."""
    before, now = _facts(kept), _facts(given)
    return [
        _SHA256.sub(r"\1", f"{name} was {before.get(name, 'absent')}, is now {now.get(name, 'absent')}")
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _facts(manifest: Any) -> dict[str, str]:
    """Write what a manifest says as text by name, whatever one that was changed by hand holds."""
    facts: dict[str, str] = {}
    for name, value in manifest.items() if isinstance(manifest, dict) else ():
        if name == "options" and isinstance(value, dict):
            facts |= {option: repr(setting) for option, setting in value.items()}
        elif isinstance(value, dict):  # of classifiers also the order counts: it is that of the columns
            facts[name] = ", ".join(f"{column} by {fingerprint}" for column, fingerprint in value.items())
        else:
            facts[name] = str(value)
    return facts
