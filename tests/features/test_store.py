"""FeatureStore: what is kept comes back bit by bit, and what is damaged does not come back at all."""

from __future__ import annotations

import errno
import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_vl_classifier import FeatureStore, Tap
from qwen_vl_classifier.errors import ConfigError, FeatureStoreError
from qwen_vl_classifier.features import store as store_module
from qwen_vl_classifier.features.folder_contents import summarise

MEAN, LAST = Tap(-1, "mean"), Tap(2, "last")
WIDTH = 8


def entries(*numbers: int, tap: Tap = MEAN) -> dict:
    """Features under the keys of these numbers."""
    return {
        key(number): (tap, np.random.default_rng(number).normal(size=WIDTH).astype(np.float32)) for number in numbers
    }


def key(number: int) -> bytes:
    return bytes([number]) * 32


def as_keys(*numbers: int) -> np.ndarray:
    return np.array([list(key(number)) for number in numbers], dtype=np.uint8)


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


@pytest.mark.parametrize("left", [0, 1, 100, 0.5, -9, -1])
def test_a_truncated_shard_is_found_and_set_aside(tmp_path, left):
    FeatureStore(tmp_path).put(entries(1))
    shard = only_shard(tmp_path)
    content = shard.read_bytes()
    shard.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    with pytest.warns(UserWarning, match="damaged; its features are computed again"):
        store = FeatureStore(tmp_path)
    assert store.get(key(1)) is None
    assert [path.suffix for path in tmp_path.iterdir()] == [".damaged"]
    store.put(entries(1))
    assert_holds(FeatureStore(tmp_path), entries(1))  # without a warning: it is told once


ASKED = {
    "get": lambda store: store.get(key(1)) is not None,
    "holds": lambda store: store.holds(as_keys(1, 2, 3)).any(),
    "read": lambda store: store.read(as_keys(1, 2, 3), np.empty((3, WIDTH), dtype=np.float32)).any(),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_flipped_bit_in_a_feature_is_found(tmp_path, ask):
    wanted = entries(1, 2, 3)
    FeatureStore(tmp_path).put(wanted)
    shard = only_shard(tmp_path)
    content = bytearray(shard.read_bytes())
    place = bytes(content).index(wanted[key(2)][1][:4].tobytes())  # too few values for compression to hide them
    content[place] ^= 1
    shard.write_bytes(content)
    store = FeatureStore(tmp_path)  # the keys are sound
    assert len(store) == 3
    with pytest.warns(UserWarning, match="damaged; its features are computed again"):
        assert not ask(store)
    assert len(store) == 0
    assert [path.name for path in tmp_path.iterdir()] == [shard.name + ".damaged"]


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_no_flipped_bit_anywhere_gives_a_wrong_feature(tmp_path, flip):
    """The whole file in steps, footer included: no bit may change unseen, and none may lead to another error."""
    wanted = entries(1, 2)
    FeatureStore(tmp_path / "sound").put(wanted)
    shard = only_shard(tmp_path / "sound")
    content = shard.read_bytes()
    at_once = 0
    for place in range(flip % 11, len(content), 11):
        folder = tmp_path / str(place)
        folder.mkdir()
        damaged = bytearray(content)
        damaged[place] ^= flip
        (folder / shard.name).write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            store = FeatureStore(folder)
            at_once += len(store) == 0
            assert [store.get(name) for name in wanted] == [None, None], place
        assert ["damaged" in str(warning.message) for warning in caught] == [True], place
        store.put(wanted)
        assert_holds(FeatureStore(folder), wanted)
    assert 0 < at_once < len(content) // 11  # both ways of finding it were taken: with the keys, with the features


def test_damage_to_one_of_two_copies_costs_nothing(tmp_path):
    first, second = FeatureStore(tmp_path), FeatureStore(tmp_path)
    first.put(entries(1, 2))
    second.put(entries(2, 3))
    for shard in sorted(tmp_path.iterdir()):
        content = shard.read_bytes()
        shard.write_bytes(content[:-20] + b"x" + content[-19:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store = FeatureStore(tmp_path)
            assert store.holds(as_keys(1, 2, 3)).tolist() in ([True, True, False], [False, True, True])
        assert_holds(store, entries(2))
        (tmp_path / f"{shard.name}.damaged").unlink()
        shard.write_bytes(content)


def test_what_another_process_found_damaged_or_deleted_is_simply_missing(tmp_path):
    store = FeatureStore(tmp_path)
    store.put(entries(1))
    reader = FeatureStore(tmp_path)
    only_shard(tmp_path).unlink()
    assert not reader.holds(as_keys(1)).any()
    assert reader.get(key(1)) is None
    store.put(entries(1))
    reader.refresh()
    assert_holds(reader, entries(1))


def test_a_damaged_shard_that_cannot_be_set_aside_is_told_of_once(tmp_path, monkeypatch):
    FeatureStore(tmp_path).put(entries(1))
    shard = only_shard(tmp_path)
    shard.write_bytes(shard.read_bytes()[:50])

    def refuse(*_args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.warns(UserWarning, match="damaged"):
        store = FeatureStore(tmp_path)
    store.refresh()  # without a warning
    store.put(entries(1))  # the same content, so the same file: it is sound again
    assert_holds(FeatureStore(tmp_path), entries(1))


def test_a_leftover_of_a_killed_run_is_no_feature_and_goes_with_the_next_writing(tmp_path):
    FeatureStore(tmp_path).put(entries(1))
    leftover = only_shard(tmp_path).with_name("0" * 32 + ".partial")
    leftover.write_bytes(b"PAR1 and no more")
    store = FeatureStore(tmp_path)
    assert len(store) == 1
    assert leftover.exists()  # who only reads changes nothing
    store.put(entries(2))
    assert not leftover.exists()


def test_parquet_files_of_others_are_left_alone(tmp_path):
    theirs = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["a claim"]}), theirs)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"")
    store = FeatureStore(tmp_path)
    assert len(store) == 0
    assert sorted(tmp_path.iterdir()) == [broken, theirs]


def test_a_sound_file_that_is_no_shard_is_left_alone(tmp_path):
    pq.write_table(pa.table({"key": ["text"]}), tmp_path / "theirs")
    content = (tmp_path / "theirs").read_bytes()
    path = (tmp_path / "theirs").rename(tmp_path / f"{hashlib.sha256(content).hexdigest()}.parquet")
    with pytest.warns(UserWarning, match="not a feature file of this format; it is ignored"):
        assert len(FeatureStore(tmp_path)) == 0
    assert path.read_bytes() == content


class TestFloat16:
    """Half the bytes, never an infinity that was none, and never an answer to who asked for float32."""

    def test_features_come_back_rounded_and_smaller(self, tmp_path):
        rng = np.random.default_rng(0)
        wanted = {rng.bytes(32): (MEAN, rng.normal(size=2048).astype(np.float32)) for _ in range(40)}
        sizes = {}
        for dtype in ("float32", "float16"):
            FeatureStore(tmp_path / dtype, dtype=dtype).put(wanted)
            sizes[dtype] = only_shard(tmp_path / dtype).stat().st_size
        assert 0.45 < sizes["float16"] / sizes["float32"] < 0.55
        store = FeatureStore(tmp_path / "float16", dtype="float16")
        for name, (_, feature) in wanted.items():
            kept = store.get(name)
            assert kept.dtype == np.float32
            np.testing.assert_array_equal(kept, feature.astype(np.float16).astype(np.float32))
            np.testing.assert_array_equal(kept, store.as_kept(feature))
            np.testing.assert_allclose(kept, feature, rtol=2**-11, atol=2**-25)

    def test_a_feature_that_would_overflow_is_kept_as_it_is(self, tmp_path):
        features = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
        features[1, 3] = 65520  # the least that rounds to infinity
        features[2, 0] = -3e38
        features[3, 0] = np.inf  # was one before
        wanted = {key(number): (MEAN, feature) for number, feature in enumerate(features)}
        FeatureStore(tmp_path, dtype="float16").put(wanted)
        store = FeatureStore(tmp_path, dtype="float16")
        assert len(store) == 4
        for number in (1, 2):
            np.testing.assert_array_equal(store.get(key(number)), features[number])
        for number in (0, 3):
            np.testing.assert_array_equal(store.get(key(number)), features[number].astype(np.float16))
        np.testing.assert_array_equal(store.as_kept(features), [store.get(key(number)) for number in range(4)])
        assert len(list(tmp_path.iterdir())) == 2
        assert FeatureStore(tmp_path).holds(as_keys(0, 1, 2, 3)).tolist() == [False, True, True, False]

    def test_what_is_asked_decides(self, tmp_path):
        FeatureStore(tmp_path, dtype="float16").put(entries(1))
        FeatureStore(tmp_path).put(entries(2))
        exact, rounded = FeatureStore(tmp_path), FeatureStore(tmp_path, dtype="float16")
        assert exact.holds(as_keys(1, 2)).tolist() == [False, True]
        assert exact.get(key(1)) is None
        assert key(1) not in exact
        assert_holds(exact, entries(2))
        for number in (1, 2):
            feature = entries(number)[key(number)][1]
            np.testing.assert_array_equal(rounded.get(key(number)), feature.astype(np.float16))
        exact.put(entries(1))
        assert_holds(FeatureStore(tmp_path), entries(1, 2))

    def test_another_type_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="dtype 'bfloat16' of kept features: expected float32 or float16"):
            FeatureStore(tmp_path, dtype="bfloat16")


def test_many_features_are_cut_into_shards_of_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_FILE_BYTES", 3 * WIDTH * 4)
    store = FeatureStore(tmp_path)
    store.put(entries(*range(10)))
    assert len(list(tmp_path.iterdir())) == 4
    assert_holds(FeatureStore(tmp_path), entries(*range(10)))
    assert_holds(store, entries(*range(10)))


def test_few_shards_are_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_CACHE_BYTES", 2 * WIDTH * 4)
    store = FeatureStore(tmp_path)
    for number in range(6):
        store.put(entries(number))
    into = np.zeros((6, WIDTH), dtype=np.float32)
    assert store.read(as_keys(*range(6)), into).all()
    np.testing.assert_array_equal(into, [entries(number)[key(number)][1] for number in range(6)])
    assert len(store._loaded) == 2


def test_another_feature_of_which_the_index_knows_half_the_key_is_not_mistaken(tmp_path):
    alike = key(1)[:16] + bytes(16)
    store = FeatureStore(tmp_path)
    store.put(entries(1))
    assert alike in store  # what nobody can make with SHA-256
    assert store.get(alike) is None


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path):
    store = FeatureStore(tmp_path / "tap=mean" / "key=1")
    store.put(entries(1))
    assert_holds(FeatureStore(store.folder), entries(1))
    assert summarise(store.folder)["taps"] == {"mean:-1": 1}


def test_a_shard_that_cannot_be_opened_stays_where_it_is(tmp_path, monkeypatch):
    FeatureStore(tmp_path).put(entries(1))

    def no_more_files(*_args, **_options):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(pq, "ParquetFile", no_more_files)
        with pytest.warns(UserWarning, match=r"cannot be read \(Too many open files\)"):
            store = FeatureStore(tmp_path)
    assert store.get(key(1)) is None
    store.refresh()
    assert_holds(store, entries(1))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FeatureStoreError, match=r"features cannot be stored here .* give a folder") as caught:
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


class TestForeignFiles:
    """What others put among the files of a store."""

    @pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
    def test_what_is_no_file_is_passed_over(self, tmp_path, make):
        make(tmp_path / f"{'0' * 64}.parquet")
        with pytest.warns(UserWarning, match="cannot be read"):
            store = FeatureStore(tmp_path)
        assert len(store) == 0
        assert summarise(tmp_path)["foreign"] == [f"{'0' * 64}.parquet"]

    def test_a_small_file_of_a_billion_rows(self, tmp_path):

        rows = 10_000_000
        key = pa.array([b"k" * 32], pa.binary(32)).take(pa.array(np.zeros(rows, dtype=np.int32)))
        feature = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows, dtype=np.float32)), 1)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"key": key, "feature": feature}), sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
        assert len(content) < 10**6
        (tmp_path / f"{hashlib.sha256(content).hexdigest()}.parquet").write_bytes(content)
        with pytest.warns(UserWarning, match="is not a feature file"):
            assert len(FeatureStore(tmp_path)) == 0
