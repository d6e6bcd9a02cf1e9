"""Shards: a folder of scores that says what made them, and in which every file is complete or absent.

::

    manifest.json             what was scored, by what and how; a run that differs is refused
    token_budget.json         the most tokens in one batch, chosen once: how rows are batched decides their last bits
    shards/000000.parquet     the scores of the first rows, in order (or .jsonl, .csv: see `formats`)
    shards/000001.parquet     the scores of the next ones, ...

A run holds a lock on a folder of this machine, which the system lifts when the run ends, in whatever way. In an object
store there are no locks: there, two runs at once write the same shards twice, with the same content.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.files.locations import open_folder
from qwen_vl_classifier.scoring.formats import NO_WORDS, ScoredRow, Words, columns_of, errors_in, write_rows
from qwen_vl_classifier.scoring.jobs import Shard

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SHARDS = "shards"

_BUDGET = "token_budget.json"
_LOCK = ".lock"

_SHA256 = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


@dataclass(frozen=True, slots=True)
class ScoreManifest:
    """Everything that the scores in a folder depend on.

    Attributes:
        classifiers: For each classifier its name, unlike all others, and its fingerprint; in the order of columns.
        data: SHA-256 of the data.
        options: Name and value of each option that decides which rows there are, how they are cut, or what is written.
        format: Of the shards: "parquet", "jsonl" or "csv".
        words: For each classifier what it calls its classes, or `None`; empty where none has words.
    """

    classifiers: tuple[tuple[str, str], ...]
    data: str
    options: Mapping[str, Any]
    format: str = "parquet"
    words: Words = NO_WORDS

    @property
    def names(self) -> list[str]:
        """The names of the classifiers; of a single one it does not matter."""
        return [name for name, _ in self.classifiers]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `manifest.json`."""
        columns = columns_of("probability", self.names)
        content = {
            "format_version": FORMAT_VERSION,
            "classifiers": dict(zip(columns, (fingerprint for _, fingerprint in self.classifiers), strict=True)),
            "data": self.data,
            "format": self.format,
            "options": dict(self.options),
        }
        return content | ({"words": [own and list(own) for own in self.words]} if self.words else {})

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ScoreManifest:
        """Make a manifest from what `to_json` returned."""
        classifiers = [
            (column.removeprefix("probability").removeprefix("_"), fingerprint)
            for column, fingerprint in content["classifiers"].items()
        ]
        return cls(tuple(classifiers), content["data"], content["options"], content["format"], content.get("words", ()))


class ShardFolder:
    """A folder of shards. One run at a time writes to it, with any number of workers.

    Args:
        location: Where they lie, by path or URL of a store; `open` makes it.
        manifest: What they depend on.
        storage_options: Options of fsspec for a store.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        manifest: ScoreManifest,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.manifest = manifest
        self._files = open_folder(location, storage_options)
        self._lock: int | None = None

    @property
    def folder(self) -> str:
        """The folder, for messages."""
        return self._files.path

    def open(self, *, resume: bool = False) -> None:
        """Make the folder, or check that what it holds was made in the same way; lock it, and clear what a kill left.

        Args:
            resume: Refuse a folder in which there is nothing yet.

        Raises:
            ConfigError: It holds other scores, or something else, or nothing to resume; another run writes to it; or it
                cannot be written.
        """
        try:
            with self._writing():
                if self._kept_manifest() is None and resume:
                    raise ConfigError(
                        f"{self.folder}: nothing to resume; leave out --resume to begin, or check the folder"
                    )
                self._take_lock()
                self._take_over()
                self._files.sweep()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lift the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def sweep(self, index: int | None = None) -> None:
        """Remove what workers that died left of a shard, or of all shards; only while no other worker writes them.

        Raises:
            ConfigError: It cannot be removed.
        """
        with self._writing():
            self._files.sweep("" if index is None else self._name(index))

    def errors_in(self, index: int, rows: int) -> int | None:
        """Count the rows with an error in a shard.

        Args:
            index: Which shard, from 0.
            rows: How many rows it should have.

        Returns:
            Their number, or `None` where the shard is missing, damaged or of another shape: it is to be made anew.
        """
        try:
            with self._open(self._name(index)) as file:
                return errors_in(file, rows, self.manifest.names, self.manifest.format, self.manifest.words)
        except OSError:
            return None

    def survey(self, shards: Iterable[Shard]) -> tuple[bytearray, int, int]:
        """Look which shards are there.

        Args:
            shards: All of the plan, in order.

        Returns:
            For each shard 1 where it is there and sound, else 0; the number of rows in those that are, and how many
            of these have an error.
        """
        there, rows, errors = bytearray(), 0, 0
        # Looking for a file that is absent takes long in a store: its files are listed once.
        names = None if self._files.is_local else set(self._files.names(f"{SHARDS}/"))
        for shard in shards:
            absent = names is not None and self._name(shard.index) not in names
            found = None if absent else self.errors_in(shard.index, shard.rows)
            there.append(found is not None)
            if found is not None:
                rows += shard.rows
                errors += found
        return there, rows, errors

    def write(self, index: int, rows: Sequence[ScoredRow]) -> None:
        """Write a shard; on return it is on disk.

        Args:
            index: Which shard, from 0.
            rows: Its rows, in order.

        Raises:
            ConfigError: It cannot be written.
        """
        content = write_rows(rows, self.manifest.names, self.manifest.format, self.manifest.words)
        with self._writing():
            self._files.write(self._name(index), content)

    def size_of(self, rows: Sequence[ScoredRow]) -> int:
        """Return how many bytes a shard of such rows would take."""
        return len(write_rows(rows, self.manifest.names, self.manifest.format, self.manifest.words))

    def settle_token_budget(self, proposal: int) -> int:
        """Return the folder's token budget: the first proposal of all.

        Raises:
            ConfigError: It cannot be written.
        """
        with self._writing():
            try:
                self._files.write(_BUDGET, json.dumps(proposal).encode() + b"\n", once=True)
            except FileExistsError:
                return int(self._files.read(_BUDGET))
        return proposal

    def _take_over(self) -> None:
        """Make sure that the folder is about what is to be scored, or make it so where it holds no scores yet."""
        content, kept = self.manifest.to_json(), self._kept_manifest()
        if _facts(kept) == _facts(content):
            return
        if next(self._files.names(f"{SHARDS}/"), None):
            raise ConfigError(
                f"{self.folder}: holds scores of another run: {'; '.join(_differences(kept, content))}; "
                "give another folder, or delete this one to score again"
            )
        self._files.remove(_BUDGET)
        self._files.write(MANIFEST, json.dumps(content, indent=2).encode() + b"\n")

    def _name(self, index: int) -> str:
        return f"{SHARDS}/{index:06d}.{self.manifest.format}"

    def _open(self, name: str) -> BinaryIO:
        if self._files.is_local:
            return Path(self.folder, name).open("rb")
        return io.BytesIO(self._files.read(name))

    def _take_lock(self) -> None:
        """Lock the folder, or refuse where another run holds it."""
        if not self._files.is_local:
            return
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(Path(self.folder, _LOCK), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise ConfigError(
                f"{self.folder}: another run is writing here ({holder or 'unknown'}); wait until it has ended, or give "
                "another folder"
            ) from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            return
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock = descriptor

    def _kept_manifest(self) -> Any:
        """Return the content of the folder's manifest, or `None` where there is none yet."""
        try:
            return json.loads(self._files.read(MANIFEST))
        except FileNotFoundError:
            others = self._others()
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

    def _others(self) -> list[str]:
        """Name what is in the folder, but for hidden files."""
        if self._files.is_local:
            folder = Path(self.folder)
            names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
        else:
            names = list(self._files.names())
        return sorted(name for name in names if not name.startswith("."))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: scores cannot be written here ({error.strerror or type(error).__name__}); give a "
                "folder that can be written, on a disk with room: a shard that is complete is not made again"
            ) from error


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
