"""FeatureStore: features kept on disk by content, so that a frozen backbone never sees the same example twice.

A store is a folder of Parquet shards with three columns: `key` (SHA-256, 32 bytes), `tap` (text) and `feature`
(list of float32). Shards are written whole or not at all and never changed, so that several processes may write to one
folder and a kill loses no more than the batch in flight. One that is found damaged is renamed to end in `.damaged`.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.errors import FeatureStoreError

Key = bytes

_KEY_BYTES = hashlib.sha256().digest_size
_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.parquet")  # other people's files are left alone


def feature_key(fingerprint: str, tap: Tap, example: EncodedExample) -> Key:
    """Name a feature by everything that it depends on.

    Args:
        fingerprint: That of the backbone: weights, prompt, pixel limits, dtype.
        tap: Where it was read.
        example: Its token ids and the pixels behind them.
    """
    digest = hashlib.sha256()
    for part in (fingerprint.encode(), str(tap).encode(), example.pictures.key):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    digest.update(np.asarray(example.ids, dtype="<i8").tobytes())
    return digest.digest()


class FeatureStore:
    """A folder of features.

    Args:
        folder: Where they lie; made if missing.

    Attributes:
        folder: Where they lie.
        written: Number of features that this object has put there.

    Raises:
        FeatureStoreError: The folder cannot be made or read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     len(FeatureStore(folder))
        0
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._where: dict[Key, tuple[Path, int]] = {}
        self._shards: dict[Path, npt.NDArray[np.float32]] = {}
        self._known: set[Path] = set()
        self.written = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FeatureStoreError(
                f"{self.folder}: features cannot be kept here ({error.strerror}); give a folder that can be written"
            ) from error
        self.refresh()

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: Key) -> bool:
        return key in self._where

    def refresh(self) -> None:
        """Look for shards that other processes have added."""
        for path in sorted(self.folder.glob("*.parquet")):
            if path not in self._known and _SHARD_NAME.fullmatch(path.name):
                self._known.add(path)
                keys = self._read(path, "key")
                if keys is not None:
                    self._where |= {key: (path, row) for row, key in enumerate(keys.to_pylist())}

    def get(self, key: Key) -> npt.NDArray[np.float32] | None:
        """Return a feature of shape (hidden,), or `None` where it is not kept or no longer readable."""
        if key not in self._where:
            return None
        path, row = self._where[key]
        if path not in self._shards:
            column = self._read(path, "feature")
            if column is None:
                return None
            self._shards[path] = column.flatten().to_numpy().reshape(len(column), -1)
        feature: npt.NDArray[np.float32] = self._shards[path][row]
        return feature

    def put(self, features: Mapping[Key, tuple[Tap, npt.NDArray[np.float32]]]) -> None:
        """Keep features; on return they are on disk.

        Args:
            features: For each key the tap and the feature of shape (hidden,).

        Raises:
            FeatureStoreError: They cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not features:
            return
        values = np.stack([feature for _, feature in features.values()]).astype(np.float32)
        table = pa.table(
            {
                "key": pa.array(list(features), pa.binary(_KEY_BYTES)),
                "tap": pa.array([str(tap) for tap, _ in features.values()]),
                "feature": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
            }
        )
        path = self.folder / f"{uuid.uuid4().hex}.parquet"
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                pq.write_table(table, file, compression="zstd", write_page_checksum=True)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise FeatureStoreError(
                f"{self.folder}: features cannot be written ({error.strerror}); free some space, then run again: "
                "what is kept so far is not computed again"
            ) from error
        self.written += len(features)
        self._known.add(path)
        self._shards[path] = values
        self._where |= {key: (path, row) for row, key in enumerate(features)}

    def summary(self) -> dict[str, Any]:
        """Count what is kept: shards, rows for each tap, bytes on disk."""
        counts: Counter[str] = Counter()
        size = 0
        for path in sorted(self._known):
            taps = self._read(path, "tap")
            if taps is not None:
                counts.update(taps.to_pylist())
                size += path.stat().st_size
        return {
            "shards": len(self._known),
            "rows": ", ".join(f"{tap} {count}" for tap, count in sorted(counts.items())) or "none",
            "bytes": size,
        }

    def _read(self, path: Path, name: str) -> Any:
        """Read a column of a shard, or return `None` where it is damaged: its features are computed again."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path, page_checksum_verification=True, memory_map=False) as file:
                column = pa.concat_arrays(file.read(columns=[name]).column(name).chunks)
            if not (_is_wanted(name, column.type) and len(column) and column.null_count == 0):
                raise pa.ArrowInvalid(f"{name} holds {column.type}")
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            warnings.warn(
                f"{path.name} in {self.folder} is damaged ({type(error).__name__}); its features are computed again",
                stacklevel=3,
            )
            self._forget(path)
            # A file that cannot be opened, or for which there is no memory, may be sound: it stays where it is.
            if getattr(error, "errno", None) is None and not isinstance(error, MemoryError):
                with suppress(OSError):
                    path.rename(path.with_suffix(".damaged"))
            return None
        return column

    def _forget(self, path: Path) -> None:
        self._known.discard(path)
        self._where = {key: place for key, place in self._where.items() if place[0] != path}


def _is_wanted(name: str, kind: Any) -> bool:
    """Tell whether a column of a shard has the type that `put` writes."""
    import pyarrow as pa

    if name == "feature":
        return pa.types.is_fixed_size_list(kind) and bool(kind.value_type == pa.float32())
    return bool(kind == (pa.binary(_KEY_BYTES) if name == "key" else pa.string()))
