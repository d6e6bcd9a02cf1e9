"""FeatureStore: features kept on disk by content, so that a frozen backbone never sees the same example twice.

A store is a folder of feature files (see `feature_files.py`). They are written whole or not at all and never changed,
so several processes may write to one folder, and a kill loses no more than the window in progress. A file that is
found damaged is renamed to end in `.damaged`, and its features are computed again.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.errors import ConfigError, FeatureStoreError
from qwen_vl_classifier.features.feature_files import (
    DAMAGED,
    FEATURE_FILE,
    DamagedFileError,
    FeatureType,
    ForeignFileError,
    Origin,
    check_file,
    read_features,
    read_keys,
    write_features,
)
from qwen_vl_classifier.features.index import KEY_BYTES, KeyIndex, Keys
from qwen_vl_classifier.files.whole import clear_leftovers

T = TypeVar("T")

Key: TypeAlias = bytes

_FILE_BYTES = 16 << 20  # of features in one file, which is written and read as a whole
_CACHE_BYTES = 64 << 20  # of files that stay in memory after reading, the last ones used


def feature_keys(fingerprint: str, taps: Sequence[Tap], examples: Sequence[EncodedExample]) -> Keys:
    """Compute the keys of features: SHA-256 over everything they depend on, backbone, pixels, text and tap.

    The backbone's fingerprint covers its weights, configuration, prompt, pixel limits and other picture settings,
    tokeniser, dtype and the major version of transformers. Pixels enter as the patches that the model reads, after
    decoding and resizing, and text as its token ids in the prompt. So a library that decodes or resizes in another
    way changes the key too.

    Args:
        fingerprint: The backbone's fingerprint.
        taps: Where features are read.
        examples: The prepared examples.

    Returns:
        Shape (examples, taps, 32).
    """
    keys = np.empty((len(examples), len(taps), KEY_BYTES), dtype=np.uint8)
    names = [str(tap).encode() for tap in taps]
    for row, example in enumerate(examples):
        content = hashlib.sha256()
        ids = np.asarray(example.ids, dtype="<i8").tobytes()
        for part in (fingerprint.encode(), example.pictures.key, ids):
            content.update(len(part).to_bytes(8, "little"))
            content.update(part)
        for column, name in enumerate(names):
            digest = content.copy()
            digest.update(name)
            keys[row, column] = np.frombuffer(digest.digest(), dtype=np.uint8)
    return keys


class FeatureStore:
    """A folder of features.

    Args:
        folder: Path of the folder; created if missing.
        dtype: "float32" keeps features exactly, and finds only features kept so. "float16" takes half the space and
            rounds to 11 significant bits; a feature with a value that float16 cannot hold, beyond 65504, is kept in
            float32. It finds features kept in either type, and rounds both alike.

    Attributes:
        folder: Path of the folder.
        dtype: The type in which features are kept.
        written: Number of features that this object has written.

    Raises:
        ConfigError: Another dtype.
        FeatureStoreError: The folder cannot be made or read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     len(FeatureStore(folder))
        0
    """

    def __init__(self, folder: str | os.PathLike[str], *, dtype: FeatureType = "float32") -> None:
        if dtype not in get_args(FeatureType):
            raise ConfigError(f"dtype {dtype!r} of kept features: expected {' or '.join(get_args(FeatureType))}")
        self.folder = Path(folder)
        self.dtype = dtype
        self.written = 0
        self._index = KeyIndex()
        self._names: list[str] = []  # of files, by their number in the index
        self._seen: set[str] = set()
        self._sound: set[int] = set()
        self._loaded: OrderedDict[int, tuple[Keys, npt.NDArray[Any]]] = OrderedDict()
        self._cleared = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FeatureStoreError(
                f"{self.folder}: features cannot be stored here ({error.strerror}); give a folder that can be written"
            ) from error
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: Key) -> bool:
        return bool(self._index.find(_as_keys([key]))[0][0] >= 0)

    def refresh(self) -> None:
        """Look for files that other processes have added."""
        self._index.add(self._new_shards())

    def get(self, key: Key) -> npt.NDArray[np.float32] | None:
        """Return a feature of shape (hidden,), or `None` if it is not kept or no longer readable."""
        feature: npt.NDArray[np.float32]
        for _, features in self._find(_as_keys([key])):
            for feature in features:
                return feature
        return None

    def read(self, keys: Keys, into: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Read many features; every byte of the files that hold them is checked.

        Args:
            keys: Shape (n, 32).
            into: Shape (n, hidden); the features that are found are written here.

        Returns:
            For each key whether it was found.
        """
        found = np.zeros(len(keys), dtype=bool)
        for rows, features in self._find(keys):
            into[rows] = features
            found[rows] = True
        return found

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Tell which features are kept; every byte of a file is checked when it is first needed.

        Args:
            keys: Shape (n, 32).
        """
        while True:
            shards, _ = self._index.find(keys)
            unread = [int(shard) for shard in np.unique(shards[shards >= 0]) if shard not in self._sound]
            if None not in [self._open(shard, check_file) for shard in unread]:
                return shards >= 0

    def put(
        self,
        features: Mapping[Key, tuple[Tap, npt.NDArray[np.float32]]],
        *,
        origin: Origin | None = None,
        ids: Mapping[Key, str | None] | None = None,
    ) -> None:
        """Keep features; on return they are on disk.

        Args:
            features: For each key the tap and the feature of shape (hidden,).
            origin: The backbone that made them, recorded in the files.
            ids: For each key the id of its example, recorded in the files.

        Raises:
            FeatureStoreError: They cannot be written.
        """
        if not features:
            return
        keys = list(features)
        values = np.stack([feature for _, feature in features.values()]).astype(np.float32)
        taps = [str(tap) for tap, _ in features.values()]
        for rows, stored in self._split(values):
            chosen = [keys[row] for row in rows]
            try:
                if not self._cleared:
                    clear_leftovers(self.folder)
                    self._cleared = True
                path = write_features(
                    self.folder,
                    keys=chosen,
                    taps=[taps[row] for row in rows],
                    ids=[ids.get(key) if ids else None for key in chosen],
                    origin=origin or Origin("", ""),
                    values=stored,
                )
            except OSError as error:
                raise FeatureStoreError(
                    f"{self.folder}: features cannot be written ({error.strerror}); free some space, then run again: "
                    "features that are kept already are not computed again"
                ) from error
            self.written += len(rows)
            number = self._enter(path.name)
            self._sound.add(number)
            self._index.add([(number, _as_keys(chosen))])

    def confirm(self) -> None:
        """Make sure at the end of a run that the files that it wrote, or checked instead, are still there.

        Raises:
            FeatureStoreError: Some are gone, or the folder is.
        """
        gone = {self._names[number] for number in self._sound} - set(self._list())
        if gone:
            raise FeatureStoreError(
                f"{self.folder}: {len(gone)} of its feature files were removed by another program during the run; run "
                f"again when no other program uses the folder"
            )

    def as_kept(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return features, shape (..., hidden), as the store would return them: rounded in a float16 store."""
        if self.dtype == "float32":
            return features
        half, fits = _to_half(features)
        return np.where(fits[..., None], half.astype(np.float32), features)

    def _find(self, keys: Keys) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]]:
        """Yield the features that are kept, file by file, each time with their rows in `keys`."""
        pending = np.arange(len(keys))
        while len(pending):
            shards, rows = self._index.find(keys[pending])
            again = [np.empty(0, dtype=np.intp)]
            for shard in np.unique(shards[shards >= 0]):
                here = np.flatnonzero(shards == shard)
                content = self._load(int(shard))
                if content is None:  # perhaps another file has them too
                    again.append(pending[here])
                    continue
                shard_keys, features = content
                here = here[(shard_keys[rows[here]] == keys[pending[here]]).all(axis=1)]
                yield pending[here], self.as_kept(features[rows[here]].astype(np.float32))
            pending = np.concatenate(again)

    def _load(self, number: int) -> tuple[Keys, npt.NDArray[Any]] | None:
        """Return the content of a file of the index, or `None` if it cannot be used."""
        if number in self._loaded:
            self._loaded.move_to_end(number)
            return self._loaded[number]
        content = self._open(number, read_features)
        if content is not None:
            self._loaded[number] = content
            while len(self._loaded) > 1 and sum(f.nbytes for _, f in self._loaded.values()) > _CACHE_BYTES:
                self._loaded.popitem(last=False)
        return content

    def _open(self, number: int, read: Callable[[Path], T]) -> T | None:
        """Read a file of the index, and remove it from the index if that fails."""
        result = self._attempt(self._names[number], read)
        if result is None:
            self._index.discard(number)
            self._sound.discard(number)
        else:
            self._sound.add(number)
        return result

    def _new_shards(self) -> Iterator[tuple[int, Keys]]:
        for name in self._list():
            if FEATURE_FILE.fullmatch(name) and name not in self._seen:
                self._seen.add(name)
                content = self._attempt(name, read_keys)
                # A float32 store must not return rounded features.
                if content is not None and (content[1] == "float32" or self.dtype == "float16"):
                    yield self._enter(name), content[0]

    def _attempt(self, name: str, read: Callable[[Path], T]) -> T | None:
        """Read a file, or return `None` if it cannot be used: its features are then computed again."""
        path = self.folder / name
        try:
            return read(path)
        except FileNotFoundError:  # deleted, or another process found it damaged first
            self._seen.discard(name)
        except ForeignFileError:
            warnings.warn(f"{path} is not a feature file of this format; it is ignored", stacklevel=5)
        except DamagedFileError:
            warnings.warn(f"{path} is damaged; its features are computed again", stacklevel=5)
            try:
                path.rename(path.with_name(name + DAMAGED))
                self._seen.discard(name)
            except OSError:  # the folder is read-only: the file stays, and is not read again
                pass
        except OSError as error:  # it may be sound
            warnings.warn(f"{path} cannot be read ({error.strerror}); its features are computed again", stacklevel=5)
            self._seen.discard(name)
        return None

    def _enter(self, name: str) -> int:
        """Add a file name; return its number in the index."""
        self._seen.add(name)
        self._names.append(name)
        return len(self._names) - 1

    def _list(self) -> list[str]:
        try:
            return sorted(path.name for path in self.folder.iterdir())
        except OSError as error:
            raise FeatureStoreError(
                f"{self.folder}: kept features cannot be read ({error.strerror}); give a folder that can be read"
            ) from error

    def _split(
        self, values: npt.NDArray[np.float32]
    ) -> Iterator[tuple[npt.NDArray[np.intp], npt.NDArray[np.float32] | npt.NDArray[np.float16]]]:
        """Split features into files; yield the rows of each file and their features in the type to write."""
        whole = np.arange(len(values))
        groups: list[tuple[npt.NDArray[np.intp], npt.NDArray[Any]]] = [(whole, values)]
        if self.dtype == "float16":
            half, fits = _to_half(values)
            groups = [(whole[fits], half[fits]), (whole[~fits], values[~fits])]
        for rows, stored in groups:
            step = max(1, _FILE_BYTES // max(1, stored[:1].nbytes))
            for start in range(0, len(rows), step):
                yield rows[start : start + step], stored[start : start + step]


def _to_half(features: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
    """Round to float16, and tell for each feature whether that made no finite value infinite."""
    with np.errstate(over="ignore"):
        half = features.astype(np.float16)
    overflows = np.isinf(half) & np.isfinite(features)
    return half, ~np.asarray(overflows.any(axis=-1))


def _as_keys(keys: Sequence[Key]) -> Keys:
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
