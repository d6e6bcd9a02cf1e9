"""FeatureStore: what is kept comes back bit by bit, and what is damaged does not come back at all."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_vl_classifier import FeatureStore, Tap
from qwen_vl_classifier.errors import FeatureStoreError

MEAN, LAST = Tap(-1, "mean"), Tap(2, "last")
WIDTH = 8


def entries(*numbers: int, tap: Tap = MEAN) -> dict:
    """Features under the keys of these numbers."""
    return {
        key(number): (tap, np.random.default_rng(number).normal(size=WIDTH).astype(np.float32)) for number in numbers
    }


def key(number: int) -> bytes:
    return bytes([number]) * 32


def only_shard(folder: Path) -> Path:
    (shard,) = folder.glob("*.parquet")
    return shard


def assert_holds(store: FeatureStore, wanted: dict) -> None:
    for name, (_, feature) in wanted.items():
        kept = store.get(name)
        assert kept is not None
        assert kept.dtype == np.float32
        assert kept.tobytes() == feature.tobytes()


def test_what_is_kept_comes_back_bit_by_bit(tmp_path):
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38, 1 / 3, 0], dtype=np.float32)
    wanted = entries(1, 2) | {key(3): (LAST, odd)}
    store = FeatureStore(tmp_path)
    store.put(wanted)
    assert_holds(store, wanted)
    assert_holds(FeatureStore(tmp_path), wanted)
    assert len(store) == 3
    assert key(1) in store
    assert key(9) not in store
    assert store.get(key(9)) is None


def test_keeping_nothing_writes_nothing(tmp_path):
    FeatureStore(tmp_path).put({})
    assert list(tmp_path.iterdir()) == []


def test_two_stores_on_one_folder(tmp_path):
    first, second = FeatureStore(tmp_path), FeatureStore(tmp_path)
    first.put(entries(1, 2))
    second.put(entries(2, 3))
    assert second.get(key(1)) is None  # not looked for yet
    for store in (first, second):
        store.refresh()
        assert len(store) == 3
        assert_holds(store, entries(1, 2, 3))


def test_summary_counts_shards_rows_and_bytes(tmp_path):
    store = FeatureStore(tmp_path / "new" / "folder")
    assert store.summary() == {"shards": 0, "rows": "none", "bytes": 0}
    store.put(entries(1, 2))
    store.put(entries(3, tap=LAST))
    size = sum(path.stat().st_size for path in store.folder.iterdir())
    assert store.summary() == {"shards": 2, "rows": "last:2 1, mean:-1 2", "bytes": size}
    assert FeatureStore(store.folder).summary() == store.summary()


@pytest.mark.parametrize("left", [0, 1, 100, 0.5, -1])
def test_a_truncated_shard_is_found_and_set_aside(tmp_path, left):
    FeatureStore(tmp_path).put(entries(1))
    shard = only_shard(tmp_path)
    content = shard.read_bytes()
    shard.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.warns(UserWarning, match="damaged .* computed again"):
        store = FeatureStore(tmp_path)
    assert store.get(key(1)) is None
    assert [path.suffix for path in tmp_path.iterdir()] == [".damaged"]
    store.put(entries(1))
    assert_holds(FeatureStore(tmp_path), entries(1))  # without a warning: it is told once


def test_a_flipped_byte_in_a_feature_is_found(tmp_path):
    wanted = entries(1, 2, 3)
    FeatureStore(tmp_path).put(wanted)
    shard = only_shard(tmp_path)
    content = bytearray(shard.read_bytes())
    place = bytes(content).index(wanted[key(2)][1][:4].tobytes())  # too few values for compression to hide them
    content[place] ^= 1
    shard.write_bytes(content)
    store = FeatureStore(tmp_path)  # the keys are sound
    assert len(store) == 3
    with pytest.warns(UserWarning, match="damaged"):
        assert store.get(key(2)) is None
    assert len(store) == 0


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_no_flipped_byte_anywhere_gives_a_wrong_feature(tmp_path, flip):
    """The whole file in steps: every answer is the feature or `None`, with a warning, and never another error."""
    wanted = entries(1, 2)
    FeatureStore(tmp_path / "sound").put(wanted)
    shard = only_shard(tmp_path / "sound")
    content = shard.read_bytes()
    answers = {True: 0, False: 0}
    for place in range(flip % 5, len(content), 5):
        folder = tmp_path / str(place)
        folder.mkdir()
        damaged = bytearray(content)
        damaged[place] ^= flip
        (folder / shard.name).write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store = FeatureStore(folder)
            kept = [store.get(name) for name in wanted]
        for feature, (_, true) in zip(kept, wanted.values(), strict=True):
            assert feature is None or feature.tobytes() == true.tobytes(), place
            answers[feature is None] += 1
        assert bool(caught) or all(feature is not None for feature in kept), place
    assert min(answers.values()) > 50  # both happened: neither answer is the only one


def test_a_leftover_of_a_killed_run_is_ignored(tmp_path):
    FeatureStore(tmp_path).put(entries(1))
    leftover = only_shard(tmp_path).with_name("0" * 32 + ".partial")
    leftover.write_bytes(b"PAR1 and no more")
    store = FeatureStore(tmp_path)
    assert len(store) == 1
    assert store.summary()["shards"] == 1
    assert leftover.exists()  # it may be another process at work


def test_parquet_files_of_others_are_left_alone(tmp_path):
    theirs = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["a claim"]}), theirs)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"")
    store = FeatureStore(tmp_path)
    assert len(store) == 0
    assert sorted(tmp_path.iterdir()) == [broken, theirs]


@pytest.mark.parametrize(
    "columns",
    [
        {"key": ["text"]},
        {"key": pa.array([key(1)], pa.binary(32))},
        {"key": pa.array([key(1)], pa.binary(32)), "feature": pa.array([[1.0, 2.0]])},
        {"key": pa.array([key(1)], pa.binary(32)), "feature": pa.array([None], pa.list_(pa.float32(), 2))},
    ],
    ids=["keys are text", "no features", "lists of any length", "a feature is missing"],
)
def test_a_shard_of_another_make_is_no_feature(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / f"{'a' * 32}.parquet")
    with pytest.warns(UserWarning, match="damaged"):
        assert FeatureStore(tmp_path).get(key(1)) is None


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path):
    store = FeatureStore(tmp_path / "tap=mean" / "key=1")
    store.put(entries(1))
    assert_holds(FeatureStore(store.folder), entries(1))
    assert FeatureStore(store.folder).summary()["rows"] == "mean:-1 1"


def test_a_shard_that_cannot_be_opened_stays_where_it_is(tmp_path, monkeypatch):
    FeatureStore(tmp_path).put(entries(1))

    def no_more_files(*_args, **_options):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(pq, "ParquetFile", no_more_files)
        with pytest.warns(UserWarning, match="damaged"):
            store = FeatureStore(tmp_path)
    assert store.get(key(1)) is None
    store.refresh()
    assert_holds(store, entries(1))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FeatureStoreError, match=r"features cannot be kept here .* give a folder") as caught:
            FeatureStore(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path, monkeypatch, call):
    store = FeatureStore(tmp_path)
    store.put(entries(1))

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os if call == "fsync" else Path, call, full)
        with pytest.raises(FeatureStoreError, match=r"No space left .* free some space"):
            store.put(entries(2))
    assert len(list(tmp_path.iterdir())) == 1
    assert store.get(key(2)) is None
    assert_holds(store, entries(1))
    store.put(entries(2))
    assert_holds(FeatureStore(tmp_path), entries(1, 2))


def test_a_folder_that_vanished_is_the_same_error(tmp_path):
    store = FeatureStore(tmp_path / "store")
    (tmp_path / "store").rmdir()
    (tmp_path / "store").write_text("a file in its place")
    with pytest.raises(FeatureStoreError, match="cannot be written"):
        store.put(entries(1))


def test_shards_are_never_changed(tmp_path):
    store = FeatureStore(tmp_path)
    contents: dict[Path, bytes] = {}
    for numbers in ((0, 1), (1, 2), (3,)):
        store.put(entries(*numbers))
        for path, content in contents.items():
            assert path.read_bytes() == content
        contents |= {path: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    assert len(contents) == 3
