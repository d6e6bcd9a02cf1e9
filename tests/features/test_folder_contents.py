"""summarise: what a folder holds, whoever wrote it, without changing it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from qwen_vl_classifier import FeatureStore, Tap
from qwen_vl_classifier.features.feature_files import Origin
from qwen_vl_classifier.features.folder_contents import summarise

MEAN, LAST = Tap(-1, "mean"), Tap(2, "last")
FIRST, SECOND = Origin("builtin:tiny", "1" * 64), Origin("folder", "2" * 64)


def entries(*numbers: int, tap: Tap = MEAN, scale: float = 1) -> dict:
    return {bytes([number]) * 32: (tap, np.full(8, scale, dtype=np.float32)) for number in numbers}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_empty_folder(tmp_path):
    nothing = {"shards": 0, "bytes": 0, "taps": {}, "types": {}, "backbones": {}, "damaged": [], "foreign": []}
    assert summarise(tmp_path) == nothing


def test_everything_is_counted_whatever_its_type(tmp_path):
    FeatureStore(tmp_path).put(entries(1, 2), origin=FIRST)
    FeatureStore(tmp_path).put(entries(3, tap=LAST), origin=SECOND)
    half = FeatureStore(tmp_path, dtype="float16")
    half.put(entries(4) | entries(5, scale=1e5), origin=FIRST)
    assert summarise(tmp_path) == {
        "shards": 4,
        "bytes": sum(path.stat().st_size for path in tmp_path.iterdir()),
        "taps": {"last:2": 1, "mean:-1": 4},
        "types": {"float32[8]": 4, "float16[8]": 1},
        "backbones": {f"builtin:tiny {'1' * 64}": 4, f"folder {'2' * 64}": 1},
        "damaged": [],
        "foreign": [],
    }


def test_damaged_and_foreign_files_are_named_and_stay(tmp_path):
    store = FeatureStore(tmp_path)
    for number in (1, 2):
        store.put(entries(number))
    first, second = sorted(tmp_path.iterdir())
    first.write_bytes(first.read_bytes()[:-30] + bytes(30))
    (tmp_path / f"{'a' * 64}.parquet.damaged").write_bytes(b"")
    foreign = hashlib.sha256(b"no features").hexdigest()
    (tmp_path / f"{foreign}.parquet").write_bytes(b"no features")
    (tmp_path / "train.parquet").write_bytes(b"")
    before = contents(tmp_path)
    summary = summarise(tmp_path)
    assert summary["shards"] == 1
    assert summary["bytes"] == second.stat().st_size
    assert summary["damaged"] == [f"{'a' * 64}.parquet.damaged", first.name]
    assert summary["foreign"] == [f"{foreign}.parquet"]
    assert contents(tmp_path) == before
