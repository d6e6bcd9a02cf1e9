"""Shards: on disk as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_vl_classifier.features.feature_files import (
    DamagedFileError,
    ForeignFileError,
    Origin,
    check_file,
    read_facts,
    read_features,
    read_keys,
    write_features,
)

VALUES = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
KEYS = [bytes([number]) * 32 for number in range(3)]


def write(folder: Path, values: np.ndarray = VALUES) -> Path:
    return write_features(
        folder,
        keys=KEYS,
        taps=["mean:-1", "mean:-1", "last:2"],
        ids=["a", None, "half of a pair: \ud83d"],
        origin=Origin("builtin:tiny", "f" * 64),
        values=values,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read(tmp_path, dtype):
    path = write(tmp_path, VALUES.astype(dtype))
    keys, values = read_features(path)
    assert [key.tobytes() for key in keys] == KEYS
    assert values.dtype == dtype
    assert values.tobytes() == VALUES.astype(dtype).tobytes()
    assert read_keys(path)[0].tobytes() == b"".join(KEYS)
    assert read_keys(path)[1] == dtype
    facts = read_facts(path)
    assert (facts.taps, facts.dtype, facts.width) == (["mean:-1", "mean:-1", "last:2"], dtype, 5)
    assert facts.origin == Origin("builtin:tiny", "f" * 64)
    assert facts.size == check_file(path) == path.stat().st_size


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_any_reader_of_parquet_reads_it(tmp_path, dtype):
    table = pq.read_table(write(tmp_path, VALUES.astype(dtype)))
    assert table.column_names == ["key", "tap", "id", "fingerprint", "feature"]
    assert table["id"].to_pylist() == ["a", None, "half of a pair: ?"]
    assert set(table["fingerprint"].to_pylist()) == {"f" * 64}
    chosen = table.filter(pa.compute.equal(table["tap"], "mean:-1"))
    np.testing.assert_array_equal(np.stack(chosen["feature"].to_numpy()), VALUES[:2].astype(dtype))


def test_its_name_is_the_digest_of_its_content_and_nothing_else_is_left(tmp_path):
    path = write(tmp_path)
    assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".parquet"
    assert list(tmp_path.iterdir()) == [path]
    assert write(tmp_path) == path  # the same content is the same file
    assert list(tmp_path.iterdir()) == [path]


def test_content_then_name_then_folder_reach_the_disk(tmp_path, monkeypatch):
    done = []

    def sync(number, really=os.fsync):
        done.append("sync folder" if Path(f"/proc/self/fd/{number}").resolve() == tmp_path.resolve() else "sync file")
        really(number)

    def replace(path, target, really=Path.replace):
        done.append("rename")
        return really(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write(tmp_path)
    assert done == ["sync file", "rename", "sync folder"]


def test_every_flipped_bit_is_found(tmp_path):
    path = write(tmp_path)
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        for read in (read_features, read_facts, check_file):
            with pytest.raises(DamagedFileError):
                read(path)


@pytest.mark.parametrize(
    "columns",
    [
        {"key": ["text"]},
        {"key": pa.array(KEYS, pa.binary(32))},
        {"key": pa.array(KEYS, pa.binary(32)), "feature": pa.array([[1.0, 2.0]] * 3)},
        {"key": pa.array(["text"]), "feature": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))},
        {"key": pa.array([], pa.binary(32)), "feature": pa.array([], pa.list_(pa.float32(), 2))},
        {"key": pa.array([None], pa.binary(32)), "feature": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))},
    ],
    ids=["keys alone, as text", "no features", "lists of any length", "keys as text", "no rows", "a key is missing"],
)
def test_a_sound_file_of_another_make_is_foreign(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "theirs")
    content = (tmp_path / "theirs").read_bytes()
    path = tmp_path / f"{hashlib.sha256(content).hexdigest()}.parquet"
    path.write_bytes(content)
    for read in (read_keys, read_features, read_facts):
        with pytest.raises(ForeignFileError):
            read(path)


def test_a_missing_feature_is_foreign(tmp_path):
    feature = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"key": pa.array(KEYS[:2], pa.binary(32)), "feature": feature}), tmp_path / "theirs")
    content = (tmp_path / "theirs").read_bytes()
    path = tmp_path / f"{hashlib.sha256(content).hexdigest()}.parquet"
    path.write_bytes(content)
    with pytest.raises(ForeignFileError):
        read_features(path)
