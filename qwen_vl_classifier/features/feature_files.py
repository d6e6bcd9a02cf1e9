"""Shards: Parquet files that are complete or absent, never change, and are named by the SHA-256 of their content.

A shard has the columns `key` (32 bytes), `tap` (text), `id` (text or null), `fingerprint` (text, of the backbone) and
`feature` (list of float32 or float16); the name of the backbone is in its metadata. Since the name of a file says what
it must hold, any flipped bit and any missing byte shows, wherever it is, and `sha256sum` can look for it too.
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
from qwen_vl_classifier.files.whole import new_file

FeatureType: TypeAlias = Literal["float32", "float16"]

SHARD_NAME = re.compile(r"[0-9a-f]{64}\.parquet")  # other people's files are left alone
OLDER_NAME = re.compile(r"[0-9a-f]{32}\.parquet")  # shards that were written before this format
DAMAGED = ".damaged"

_BACKBONE = b"qwen_vl_classifier.backbone"


class DamagedShardError(Exception):
    """The content of a shard is not what its name says."""


class ForeignShardError(Exception):
    """A file has the name of a shard, and the content to it, but not the columns."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What made features.

    Attributes:
        backbone: The name of the backbone.
        fingerprint: Its fingerprint.
    """

    backbone: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What a shard says of itself.

    Attributes:
        taps: The tap of each row.
        dtype: The type of its features.
        width: Their length.
        origin: What made them.
        size: Bytes on disk.
    """

    taps: list[str]
    dtype: FeatureType
    width: int
    origin: Origin
    size: int


def write_shard(
    folder: Path,
    *,
    keys: Sequence[bytes],
    taps: Sequence[str],
    ids: Sequence[str | None],
    origin: Origin,
    values: npt.NDArray[np.float32] | npt.NDArray[np.float16],
) -> Path:
    """Write a shard; on return it is on disk.

    Args:
        folder: Where to.
        keys: The key of each row.
        taps: The tap of each row.
        ids: The id of the example of each row, or `None`.
        origin: What made the features.
        values: Shape (rows, width).

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "key": pa.array(keys, pa.binary(KEY_BYTES)),
            "tap": pa.array(taps, pa.string()),
            "id": pa.array([None if name is None else _encodable(name) for name in ids], pa.string()),
            "fingerprint": pa.array([origin.fingerprint] * len(keys), pa.string()),
            "feature": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
        },
        metadata={_BACKBONE: _encodable(origin.backbone)},
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=["tap", "fingerprint"], write_page_checksum=True)
    content = sink.getvalue()
    path = folder / f"{hashlib.sha256(content).hexdigest()}.parquet"
    with new_file(path, durable=True, clear=False) as file:  # the store clears, once for many shards
        file.write(content)
    return path


def read_keys(path: Path) -> tuple[Keys, FeatureType]:
    """Read the keys of a shard, and the type of its features; the features themselves are not looked at.

    Raises:
        DamagedShardError: Its content is not what it was.
        ForeignShardError: It has other columns.
        OSError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            dtype, _ = _feature_type(parquet.schema_arrow)
            return _keys(parquet.read(columns=["key"], use_threads=False)), dtype
    except (ForeignShardError, pa.ArrowException, ValueError, OSError, KeyError) as error:
        # What pyarrow cannot make sense of is an OSError without a number, or a lack of memory for absurd lengths.
        if getattr(error, "errno", None) is not None:
            raise
        check_shard(path)
        if isinstance(error, MemoryError):
            raise
        raise ForeignShardError(f"{path.name}: {error}") from error


def read_shard(path: Path) -> tuple[Keys, npt.NDArray[Any]]:
    """Read keys and features of a shard, checked byte by byte.

    Returns:
        The keys, and the features of shape (rows, width), float32 or float16.

    Raises:
        DamagedShardError: Its content is not what it was.
        ForeignShardError: It has other columns.
        OSError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise DamagedShardError(path.name)
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(columns=["key", "feature"], use_threads=False)
        dtype, width = _feature_type(table.schema)
        feature = table.column("feature").combine_chunks()
        if feature.null_count or feature.flatten().null_count:
            raise ForeignShardError("features are missing")
        return _keys(table), feature.flatten().to_numpy().astype(dtype, copy=False).reshape(-1, width)
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise ForeignShardError(f"{path.name}: {error}") from error


def read_facts(path: Path) -> ShardFacts:
    """Read what a shard says of itself, and check it byte by byte.

    Raises:
        DamagedShardError: Its content is not what it was.
        ForeignShardError: It has other columns.
        OSError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = check_shard(path)
    try:
        with path.open("rb") as file, pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            dtype, width = _feature_type(schema)
            table = parquet.read(columns=["tap", "fingerprint"], use_threads=False)
            origin = Origin((schema.metadata or {}).get(_BACKBONE, b"").decode(), table["fingerprint"][0].as_py())
            return ShardFacts(table["tap"].to_pylist(), dtype, width, origin, size)
    except (pa.ArrowException, ValueError, LookupError) as error:  # also: it has no rows
        raise ForeignShardError(f"{path.name}: {error}") from error


def check_shard(path: Path) -> int:
    """Make sure that a shard holds what its name says, and return how many bytes that are.

    Raises:
        DamagedShardError: It does not.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != path.stem:
            raise DamagedShardError(path.name)
        return file.tell()


def _feature_type(schema: Any) -> tuple[FeatureType, int]:
    """Return type and length of the features of a shard."""
    import pyarrow as pa

    kind = schema.field("feature").type
    if pa.types.is_fixed_size_list(kind) and schema.field("key").type == pa.binary(KEY_BYTES):
        if kind.value_type == pa.float32():
            return "float32", kind.list_size
        if kind.value_type == pa.float16():
            return "float16", kind.list_size
    raise ForeignShardError(f"columns {', '.join(map(str, schema))}")


def _keys(table: Any) -> Keys:
    column = table.column("key").combine_chunks()
    if column.null_count or not len(column):
        raise ForeignShardError("keys are missing")
    keys = np.frombuffer(column.buffers()[1], dtype=np.uint8)[column.offset * KEY_BYTES :]
    return keys[: len(column) * KEY_BYTES].reshape(-1, KEY_BYTES)


def _encodable(text: str) -> str:
    """Replace what UTF-8 cannot hold: JSON can spell half of a surrogate pair, Parquet cannot."""
    return text.encode("utf-8", "replace").decode()
