"""A folder of scores in shards, with a record of what made them; every file is complete or absent.

::

    manifest.json             what was scored, by what and how; a run that differs is refused
    token_budget.json         the most tokens in one batch, chosen once: how rows are batched decides their last bits
    shards/000000.parquet     the scores of the first rows, in order (or .jsonl, .csv: see `formats`)
    shards/000001.parquet     the scores of the next ones, ...
    digests/000000-9f3c...-2134-1    an empty file, whose name is the digest of shard 0: its number, SHA-256, bytes, and
                                     rows with an error
    damaged/000000-5e1c....parquet   a shard that was not as it was written, set aside and scored again

Whoever writes a shard writes its digest first, and whoever finds a shard compares it before anything else reads it. A
digest is a name, so that one listing gives all of them, there is nothing to parse, and a kill leaves no half of one.
What a shard holds is trusted for its digest alone, not for the time of its file.

A run holds a lock on a folder of this machine, which the system lifts when the run ends, in whatever way. In an object
store there are no locks: there, two runs at once write the same shards twice, with the same content.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_classifier.config.fields import is_number
from qwen_vl_classifier.errors import ConfigError, ScoringError, first_of
from qwen_vl_classifier.files.bounded import REFUSED, parse_json
from qwen_vl_classifier.files.locations import open_folder
from qwen_vl_classifier.files.locking import FolderLock
from qwen_vl_classifier.files.room import check_inner_folders
from qwen_vl_classifier.scoring.formats import ScoredRow, write_rows
from qwen_vl_classifier.scoring.jobs import Shard
from qwen_vl_classifier.scoring.manifest import ScoreManifest, differences

MANIFEST = "manifest.json"
SHARDS = "shards"
DIGESTS = "digests"
DAMAGED = "damaged"

_BUDGET = "token_budget.json"
_MOST_TOKENS = 10**9  # in one batch, that a file may ask for

_DIGEST = re.compile(rf"{DIGESTS}/([0-9]{{6,12}})-([0-9a-f]{{64}})-([0-9]{{1,18}})-([0-9]{{1,18}})")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Digest:
    """The state of a shard when it was written.

    Attributes:
        sha256: Of its bytes, in hexadecimal.
        size: How many these are.
        errors: Rows in it that have an error.
    """

    sha256: str
    size: int
    errors: int


@dataclass(frozen=True, slots=True)
class Survey:
    """Which shards of a plan are there.

    Attributes:
        there: For each shard 1 where it is there and sound, else 0.
        rows: Rows in those that are.
        errors: Those of them that have an error.
        damaged: The shards that are there and are not sound.
    """

    there: bytearray
    rows: int
    errors: int
    damaged: Sequence[int]


class ShardFolder:
    """A folder of shards. One run at a time writes to it, with any number of workers.

    Args:
        location: Where they lie, by path or URL of a store; `open` makes it.
        manifest: What they depend on.
        storage_options: Options of fsspec for a store.
        run: For a worker, the run that has locked the folder (`ShardFolder.run`). It writes only while this run has it.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        manifest: ScoreManifest,
        storage_options: Mapping[str, Any] | None = None,
        run: str = "",
    ) -> None:
        self.manifest = manifest
        self._files = open_folder(location, storage_options)
        self._lock: FolderLock | None = None
        if run:
            self._lock = FolderLock(Path(self.folder), run)

    @property
    def folder(self) -> str:
        """The folder, for messages."""
        return self._files.path

    @property
    def run(self) -> str:
        """Name of the run that has the folder locked; "" where none is locked."""
        return self._lock.run if self._lock else ""

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
                if self._files.is_local:
                    lock = FolderLock(Path(self.folder))
                    lock.take()
                    self._lock = lock
                    check_inner_folders(Path(self.folder), SHARDS, DIGESTS, DAMAGED)
                self._take_over()
                self._kept_budget()
                self._files.sweep()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lift the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def sweep(self, index: int | None = None) -> None:
        """Remove what workers that died left of a shard, or of all shards; only while no other worker writes them.

        Raises:
            ConfigError: It cannot be removed.
        """
        with self._writing():
            if self._is_ours():  # otherwise these are files that the workers of another run write
                self._files.sweep("" if index is None else self._name(index))

    def is_about_this(self) -> bool:
        """Tell whether the folder holds the manifest of this run.

        Raises:
            ConfigError: The folder cannot be read.
        """
        try:
            return not differences(self._kept_manifest(), self.manifest.to_json())
        except ConfigError:  # there is another file of this name, or none
            return False
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot be read ({error.strerror or type(error).__name__}); check the folder"
            ) from None

    def survey(self, shards: Iterable[Shard], *, verify: bool = False) -> Survey:
        """Look which shards are there, and are what was written. Nothing is changed.

        Shards of a folder on this machine are read whole and compared with their digests. In a store the size counts.

        Args:
            shards: All of the plan, in order.
            verify: Read and compare those of a store too.

        Raises:
            ConfigError: A shard cannot be read, though nothing says that it is damaged.
        """
        there, rows, errors, damaged = bytearray(), 0, 0, []
        with self._writing():
            digests = self._digests()
            # Looking for a file that is absent takes long in a store: its files are listed once.
            sizes = None if self._files.is_local else self._sizes()
            for shard in shards:
                name, known = self._name(shard.index), digests.get(shard.index, ())
                try:
                    if sizes is None or (verify and name in sizes):
                        found = self._compare(name, known)
                    else:
                        found = _of_size(known, sizes[name])
                except (FileNotFoundError, KeyError):
                    there.append(0)
                    continue
                there.append(found is not None)
                if found is None:
                    damaged.append(shard.index)
                else:
                    rows += shard.rows
                    errors += found.errors
        return Survey(there, rows, errors, damaged)

    def set_aside(self, damaged: Sequence[int]) -> None:
        """Rename damaged shards, so that they are scored again, and name them in the log.

        Raises:
            ConfigError: One cannot be renamed.
        """
        if not damaged:
            return
        with self._writing():
            for index in damaged:
                aside = f"{DAMAGED}/{index:06d}-{uuid.uuid4().hex[:8]}.{self.manifest.format}"
                self._files.move(self._name(index), aside)
        _log.warning(
            "%s: damaged, set aside in %s/ and scored again: %s",
            self.folder,
            DAMAGED,
            first_of([self._name(index) for index in damaged], most=5),
        )

    def confirm(self, shards: Iterable[Shard]) -> None:
        """Make sure at the end of a run that what it wrote or found is still there: shards, sizes and manifest.

        Args:
            shards: Those that should be there.

        Raises:
            ScoringError: Something is gone, or of another size.
            ConfigError: The folder cannot be read.
        """
        with self._writing():
            self._check_ours()
            digests, sizes = self._digests(), self._sizes()
            gone = [
                shard.index
                for shard in shards
                if _of_size(digests.get(shard.index, ()), sizes.get(self._name(shard.index), -1)) is None
            ]
            changed = [] if self.is_about_this() else [MANIFEST]
        if gone or changed:
            raise ScoringError(
                f"{self.folder}: removed or changed by another program during the run: "
                f"{first_of([*changed, *map(self._name, gone)], most=5)}; run again when no other program writes there"
            )

    def write(self, index: int, rows: Sequence[ScoredRow]) -> None:
        """Write a shard, its digest first; on return it is on disk.

        Args:
            index: Which shard, from 0.
            rows: Its rows, in order.

        Raises:
            ConfigError: It cannot be written.
            ScoringError: The folder was removed or made anew by another run.
        """
        content = self._content(rows)
        errors = sum(row.error is not None for row in rows)
        digest = f"{DIGESTS}/{index:06d}-{hashlib.sha256(content).hexdigest()}-{len(content)}-{errors}"
        with self._writing():
            self._check_ours()
            self._files.write(digest, b"")
            self._check_ours()
            self._files.write(self._name(index), content)

    def size_of(self, rows: Sequence[ScoredRow]) -> int:
        """Return how many bytes a shard of such rows would take."""
        return len(self._content(rows))

    def settle_token_budget(self, proposal: int) -> int:
        """Return the folder's token budget: the first that any run proposed.

        Raises:
            ConfigError: It cannot be written.
        """
        with self._writing():
            try:
                self._files.write(_BUDGET, json.dumps(proposal).encode() + b"\n", once=True)
                return proposal
            except FileExistsError:
                if (kept := self._kept_budget()) is None:  # a link to nothing
                    raise self._damaged_budget() from None
                return kept

    def _kept_budget(self) -> int | None:
        """Return the token budget that the folder has, or `None` if it has none yet."""
        try:
            budget = parse_json(self._files.read(_BUDGET))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in REFUSED:
                raise
            budget = None
        if not isinstance(budget, int) or not is_number(budget, 1, _MOST_TOKENS):
            raise self._damaged_budget()
        return budget

    def _damaged_budget(self) -> ConfigError:
        return ConfigError(
            f"{self.folder}: its {_BUDGET} is damaged; expected a whole number from 1; write the number of another run "
            "of this classifier there, or delete the folder to score again"
        )

    def _take_over(self) -> None:
        """Make sure that the folder is about what is to be scored, or make it so where it holds no scores yet."""
        content, kept = self.manifest.to_json(), self._kept_manifest()
        if not differences(kept, content):
            if next(self._files.names(f"{SHARDS}/"), None) and not next(self._files.names(f"{DIGESTS}/"), None):
                raise ConfigError(
                    f"{self.folder}: holds shards but no {DIGESTS}/, so damaged shards cannot be recognised; put "
                    f"{DIGESTS}/ back, or delete the folder to score again"
                )
            return
        if next(self._files.names(f"{SHARDS}/"), None):
            raise ConfigError(
                f"{self.folder}: holds scores of another run: {differences(kept, content)}; "
                "give another folder, or delete this one to score again"
            )
        self._files.remove(_BUDGET)
        self._files.write(MANIFEST, json.dumps(content, indent=2).encode() + b"\n")

    def _is_ours(self) -> bool:
        """Tell whether the run still has its folder; where nothing is locked, nobody can tell."""
        return self._lock is None or self._lock.is_held()

    def _check_ours(self) -> None:
        if not self._is_ours():
            raise ScoringError(
                f"{self.folder}: was removed or replaced by another run while this run wrote there; its scores are "
                "gone; run again when no other program writes there"
            )

    def _digests(self) -> dict[int, list[Digest]]:
        """Return the digests of each shard: more than one where it was written again with other bytes."""
        found: dict[int, list[Digest]] = {}
        for name in self._files.names(f"{DIGESTS}/"):
            if match := _DIGEST.fullmatch(name):
                index, sha256, size, errors = match.groups()
                found.setdefault(int(index), []).append(Digest(sha256, int(size), int(errors)))
        return found

    def _sizes(self) -> dict[str, int]:
        """Return the size of each shard that is there."""
        return {entry.name: entry.size for entry in self._files.entries(f"{SHARDS}/")}

    def _compare(self, name: str, known: Sequence[Digest]) -> Digest | None:
        """Return the digest that a shard has, or `None` if it has none of those that are known."""
        try:
            size, sha256 = self._files.digest(name, {digest.size for digest in known})
        except OSError as error:
            if error.errno in (*REFUSED, errno.EIO) and self._files.is_local:
                return None
            raise
        return next((digest for digest in known if (digest.size, digest.sha256) == (size, sha256)), None)

    def _content(self, rows: Sequence[ScoredRow]) -> bytes:
        manifest = self.manifest
        escape = bool(manifest.options.get("escape_formulas", True))
        given = (manifest.names, manifest.format, manifest.words, manifest.kept, manifest.exclusive)
        return write_rows(rows, *given, escape_formulas=escape)

    def _name(self, index: int) -> str:
        return f"{SHARDS}/{index:06d}.{self.manifest.format}"

    def _kept_manifest(self) -> Any:
        """Return the content of the folder's manifest, or `None` where there is none yet."""
        try:
            return parse_json(self._files.read(MANIFEST))
        except FileNotFoundError:
            others = self._others()
            if others:
                raise ConfigError(
                    f"{self.folder}: holds {', '.join(map(repr, others[:3]))} but no {MANIFEST}, so it is not a "
                    f"folder of scores; give a new or empty folder"
                ) from None
            return None
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in REFUSED:
                raise
            raise ConfigError(
                f"{self.folder}: its {MANIFEST} is damaged, so its shards cannot be identified; "
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
                "folder that can be written, on a disk with room: finished shards are kept"
            ) from error


def _of_size(known: Iterable[Digest], size: int) -> Digest | None:
    """Return the digest of a size."""
    return next((digest for digest in known if digest.size == size), None)
