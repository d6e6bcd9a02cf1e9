"""Feature files: Parquet, complete or absent, never changed, named by the SHA-256 of their content.

A file has the columns `key` (32 bytes), `tap` (text), `id` (text or null), `fingerprint` (text, of the backbone) and
`feature` (list of float32 or float16); the name of the backbone is in its metadata. Because the name is a checksum of
the content, any flipped bit or missing byte is detected, and `sha256sum` can check a file too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qwen_vl_classifier.features.index import KEY_BYTES, Keys
from qwen_vl_classifier.files.bounded import open_regular_file, read_file
from qwen_vl_classifier.files.whole import encodable, new_file

FeatureType: TypeAlias = Literal["float32", "float16"]

FEATURE_FILE = re.compile(r"[0-9a-f]{64}\.parquet")  # all other files are ignored
DAMAGED = ".damaged"

_MOST_BYTES = 256 << 20  # of a file, and of its keys and features in memory; the store writes far smaller ones
_BACKBONE = b"qwen_vl_classifier.backbone"


class DamagedFileError(Exception):
    """The content of a feature file does not match the checksum in its name."""


class ForeignFileError(Exception):
    """A file is named by the checksum of its content, but does not have the columns of a feature file."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The backbone that made features.

    Attributes:
        backbone: Its name.
        fingerprint: Its fingerprint.
    """

    backbone: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a feature file records about itself.

    Attributes:
        taps: The tap of each row.
        dtype: The type of its features.
        width: Their length.
        origin: The backbone that made them.
        size: Bytes on disk.
    """

    taps: list[str]
    dtype: FeatureType
    width: int
    origin: Origin
    size: int


def write_features(
    folder: Path,
    *,
    keys: Sequence[bytes],
    taps: Sequence[str],
    ids: Sequence[str | None],
    origin: Origin,
    values: npt.NDArray[np.float32] | npt.NDArray[np.float16],
) -> Path:
    """Write a feature file; on return it is on disk.

    Args:
        folder: The folder of the store.
        keys: The key of each row.
        taps: The tap of each row.
        ids: The id of the example of each row, or `None`.
        origin: The backbone that made the features.
        values: Shape (rows, width).

    Raises:
        OSError: The file cannot be written; nothing is left behind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "key": pa.array(keys, pa.binary(KEY_BYTES)),
            "tap": pa.array(taps, pa.string()),
            "id": pa.array([None if name is None else encodable(name) for name in ids], pa.string()),
            "fingerprint": pa.array([origin.fingerprint] * len(keys), pa.string()),
            "feature": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
        },
        metadata={_BACKBONE: encodable(origin.backbone)},
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=["tap", "fingerprint"], write_page_checksum=True)
    content = sink.getvalue()
    path = folder / f"{hashlib.sha256(content).hexdigest()}.parquet"
    with new_file(path, durable=True, clear=False) as file:  # the store clears, once for many files
        file.write(content)
    return path


def read_keys(path: Path) -> tuple[Keys, FeatureType]:
    """Read the keys of a feature file and the type of its features, but not the features.

    Raises:
        DamagedFileError: Its content has changed.
        ForeignFileError: It has other columns.
        OSError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with (
            open_regular_file(path, most=_MOST_BYTES) as file,
            pq.ParquetFile(file, page_checksum_verification=True) as parquet,
        ):
            dtype, _ = _feature_type(parquet)
            return _keys(parquet.read(columns=["key"], use_threads=False)), dtype
    except (ForeignFileError, pa.ArrowException, ValueError, OSError, KeyError) as error:
        # What pyarrow cannot make sense of is an OSError without a number, or a lack of memory for absurd lengths.
        if getattr(error, "errno", None) is not None:
            raise
        check_file(path)
        if isinstance(error, MemoryError):
            raise
        raise ForeignFileError(f"{path.name}: {error}") from error


def read_features(path: Path) -> tuple[Keys, npt.NDArray[Any]]:
    """Read keys and features of a feature file, checked byte by byte.

    Returns:
        The keys, and the features of shape (rows, width), float32 or float16.

    Raises:
        DamagedFileError: Its content has changed.
        ForeignFileError: It has other columns.
        OSError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = read_file(path, most=_MOST_BYTES)
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise DamagedFileError(path.name)
    try:
        parquet = pq.ParquetFile(pa.BufferReader(content))
        dtype, width = _feature_type(parquet)
        table = parquet.read(columns=["key", "feature"], use_threads=False)
        feature = table.column("feature").combine_chunks()
        if feature.null_count or feature.flatten().null_count:
            raise ForeignFileError("features are missing")
        return _keys(table), feature.flatten().to_numpy().astype(dtype, copy=False).reshape(-1, width)
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise ForeignFileError(f"{path.name}: {error}") from error


def read_facts(path: Path) -> FileFacts:
    """Read what a feature file records about itself, and check it byte by byte.

    Raises:
        DamagedFileError: Its content has changed.
        ForeignFileError: It has other columns.
        OSError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = check_file(path)
    try:
        with open_regular_file(path, most=_MOST_BYTES) as file, pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            dtype, width = _feature_type(parquet)
            table = parquet.read(columns=["tap", "fingerprint"], use_threads=False)
            origin = Origin((schema.metadata or {}).get(_BACKBONE, b"").decode(), table["fingerprint"][0].as_py())
            return FileFacts(table["tap"].to_pylist(), dtype, width, origin, size)
    except (pa.ArrowException, ValueError, LookupError) as error:  # also: it has no rows
        raise ForeignFileError(f"{path.name}: {error}") from error


def check_file(path: Path) -> int:
    """Check that a feature file has the checksum in its name, and return its size in bytes.

    Raises:
        DamagedFileError: It does not.
        OSError: It cannot be read.
    """
    with open_regular_file(path, most=_MOST_BYTES) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != path.stem:
            raise DamagedFileError(path.name)
        return file.tell()


def _feature_type(parquet: Any) -> tuple[FeatureType, int]:
    """Return type and length of the features of a feature file, before any of them is read."""
    import pyarrow as pa

    schema = parquet.schema_arrow
    kind = schema.field("feature").type
    types: dict[Any, FeatureType] = {pa.float32(): "float32", pa.float16(): "float16"}
    if not pa.types.is_fixed_size_list(kind) or kind.value_type not in types:
        raise ForeignFileError("it has no features")
    if schema.field("key").type != pa.binary(KEY_BYTES):
        raise ForeignFileError("it has no keys")
    row = KEY_BYTES + kind.list_size * kind.value_type.bit_width // 8
    if parquet.metadata.num_rows * row > _MOST_BYTES:  # a few bytes of Parquet may stand for any number of rows
        raise ForeignFileError(f"it has {parquet.metadata.num_rows:,} rows")
    return types[kind.value_type], kind.list_size


def _keys(table: Any) -> Keys:
    column = table.column("key").combine_chunks()
    if column.null_count or not len(column):
        raise ForeignFileError("keys are missing")
    keys = np.frombuffer(column.buffers()[1], dtype=np.uint8)[column.offset * KEY_BYTES :]
    return keys[: len(column) * KEY_BYTES].reshape(-1, KEY_BYTES)
