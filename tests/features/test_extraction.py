"""extract_features: each example at most once in a store's life, whatever was killed or damaged in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, Example, FeatureStore, Tap, extract_features
from qwen_vl_classifier.backbone import windows
from qwen_vl_classifier.backbone.checkpoint import fingerprint
from qwen_vl_classifier.backbone.processor import EncodedExample
from qwen_vl_classifier.errors import ConfigError, FeatureStoreError
from qwen_vl_classifier.features.extraction import Extraction, every_tap, keep_features, stream_features
from qwen_vl_classifier.features.reader import FeatureReader
from qwen_vl_classifier.features.store import feature_keys
from tests import nano

TAPS = [Tap(-1, "mean"), Tap(2, "last"), Tap(-1, "text")]


def key_of(fingerprint: str, tap: Tap, example: EncodedExample) -> bytes:
    return feature_keys(fingerprint, [tap], [example]).tobytes()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return nano.make_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("nano") / "checkpoint")


@pytest.fixture(scope="module")
def backbone(checkpoint) -> Backbone:
    return Backbone.load(checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def encoded(backbone, monkeypatch) -> list[int]:
    """The number of examples in every call of the backbone."""
    calls: list[int] = []
    encode = backbone.encode_prepared

    def counting(prepared, taps, **options):
        calls.append(len(prepared))
        return encode(prepared, taps, **options)

    monkeypatch.setattr(backbone, "encode_prepared", counting)
    return calls


@pytest.fixture
def rows() -> list[Example]:
    pictures = [Image.new("RGB", (56 + 28 * (number % 3), 56), (number * 20, 0, 90)) for number in range(4)]
    return [Example(pictures[number % 4], f"text {number}") for number in range(9)] + [Example(None, "no picture")]


def extract(rows, backbone, store=None, taps=TAPS):
    return extract_features(rows, backbone, taps, store=store, progress=False)


def test_without_a_store_it_is_encode(backbone, rows):
    features = extract(rows, backbone)
    assert features.shape == (10, 3, backbone.hidden_size)
    np.testing.assert_array_equal(features, backbone.encode(rows, TAPS))


def test_features_kept_are_exactly_those_encoded(backbone, rows, encoded, tmp_path):
    first = extract(rows, backbone, FeatureStore(tmp_path))
    np.testing.assert_array_equal(first, backbone.encode(rows, TAPS))
    encoded.clear()
    store = FeatureStore(tmp_path)
    second = extract(rows, backbone, store)
    assert encoded == []
    assert second.dtype == np.float32
    assert second.tobytes() == first.tobytes()
    assert len(store) == 30
    kept = store.get(key_of(backbone.fingerprint, TAPS[1], backbone.prepare(rows[3:4])[0]))
    np.testing.assert_array_equal(kept, first[3, 1])


def test_only_what_is_new_is_encoded(backbone, rows, encoded, tmp_path):
    store = FeatureStore(tmp_path)
    extract(rows[:6], backbone, store)
    extract(list(reversed(rows)), backbone, store)
    assert encoded == [6, 4]
    extract(rows, backbone, store, [Tap(3, "mean")])
    assert encoded == [6, 4, 10]
    mixed = extract(rows, backbone, store, [TAPS[0], Tap(3, "mean")])
    assert encoded == [6, 4, 10]
    np.testing.assert_allclose(mixed, backbone.encode(rows, [TAPS[0], Tap(3, "mean")]), rtol=1e-4, atol=1e-5)


def test_the_same_example_twice_in_one_run_is_encoded_once(backbone, rows, encoded, tmp_path):
    store = FeatureStore(tmp_path)
    features = extract([rows[0], rows[1], rows[0], rows[0]], backbone, store)
    assert encoded == [2]
    np.testing.assert_array_equal(features[[0, 0, 0]], features[[0, 2, 3]])
    assert (features[0] != features[1]).any()
    assert len(store) == 6


def test_the_same_content_is_one_example_wherever_it_lies(backbone, encoded, tmp_path):
    picture = Image.new("RGB", (64, 64), "teal")
    picture.save(tmp_path / "here.png")
    picture.save(tmp_path / "there.png")
    store = FeatureStore(tmp_path / "store")
    sources = [tmp_path / "here.png", str(tmp_path / "there.png"), (tmp_path / "here.png").read_bytes(), picture]
    extract(
        [Example(source, "same", label) for label, source in zip((0, 1, None, 0), sources, strict=True)],
        backbone,
        store,
    )
    assert encoded == [1]


def test_the_key_changes_with_everything_that_the_feature_depends_on(backbone):
    picture, other = Image.new("RGB", (64, 64), "teal"), Image.new("RGB", (64, 64), (0, 128, 129))
    examples = [
        Example(picture, "text"),
        Example(other, "text"),
        Example(picture, "text."),
        Example((picture, picture), "text"),
        Example(None, "text"),
    ]
    prepared = backbone.prepare(examples)
    fingerprint = backbone.fingerprint
    keys = [key_of(fingerprint, TAPS[0], item) for item in prepared]
    keys += [key_of(fingerprint, tap, prepared[0]) for tap in (Tap(-1, "last"), Tap(1, "mean"))]
    keys += [key_of("0" * 64, TAPS[0], prepared[0])]
    assert len(set(keys)) == len(keys) == 8
    assert {len(name) for name in keys} == {32}
    again = backbone.prepare([Example(picture.copy(), "text", label=1, id="x")])[0]
    assert key_of(fingerprint, TAPS[0], again) == keys[0]


def changed_prompt(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = settings["chat_template"].replace("user", "human", 1) + "\n"
    path.write_text(json.dumps(settings))


def changed_weights(folder: Path) -> None:
    """Another revision: one bit of one weight, in a file of the same name and size."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def changed_pictures(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (changed_weights, {}),
        (changed_prompt, {}),
        (changed_pictures, {}),
        (None, {"dtype": "bfloat16"}),
        (None, {"min_pixels": 784}),
        (None, {"max_pixels": 100352}),
        (None, {}),
    ],
    ids=["revision", "prompt", "picture settings", "dtype", "min_pixels", "max_pixels", "transformers"],
)
def test_no_feature_is_stale(checkpoint, rows, tmp_path, monkeypatch, change, options):
    """None of these changes the pictures' grid or the number of tokens, so that the key alone can tell."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    before = Backbone.load(folder, device="cpu", dtype="float32")
    taps = [Tap(2, "mean"), Tap(-1, "last")]
    store = FeatureStore(tmp_path / "store")
    extract(rows, before, store, taps)
    keys = feature_keys(before.fingerprint, taps, before.prepare(rows))
    if change:
        change(folder)
    elif not options:
        monkeypatch.setattr(fingerprint.transformers, "__version__", "6.0.0")
    after = Backbone.load(folder, device="cpu", **({"dtype": "float32"} | options))
    others = feature_keys(after.fingerprint, taps, after.prepare(rows))
    assert not set(map(bytes, keys.reshape(-1, 32))) & set(map(bytes, others.reshape(-1, 32)))
    assert not store.holds(others.reshape(-1, 32)).any()
    same = Backbone.load(folder, device="cpu", **({"dtype": "float32"} | options))
    np.testing.assert_array_equal(feature_keys(same.fingerprint, taps, same.prepare(rows)), others)


def test_minor_versions_of_transformers_share_features(checkpoint, backbone, monkeypatch):
    monkeypatch.setattr(fingerprint.transformers, "__version__", "5.99.1")
    assert Backbone.load(checkpoint, device="cpu", dtype="float32").fingerprint == backbone.fingerprint


def test_a_store_serves_backbones_side_by_side(backbone, checkpoint, rows, encoded, tmp_path):
    store = FeatureStore(tmp_path)
    extract(rows, backbone, store)
    smaller = Backbone.load(checkpoint, device="cpu", dtype="float32", max_pixels=3136)
    assert smaller.fingerprint != backbone.fingerprint
    features = extract(rows, smaller, store)
    np.testing.assert_allclose(features, smaller.encode(rows, TAPS), rtol=1e-4, atol=1e-5)
    assert len(store) == 60


@pytest.mark.parametrize("seed", range(8))
def test_damaged_features_are_computed_again_once(backbone, rows, encoded, tmp_path, seed, one_thread):
    """A bit at a random place, the tail or the footer too; or the file cut at a random length."""
    rng = np.random.default_rng(seed)
    true = extract(rows, backbone, FeatureStore(tmp_path))
    (shard,) = tmp_path.glob("*.parquet")
    content = bytearray(shard.read_bytes())
    if seed % 2:
        del content[int(rng.integers(len(content))) :]
    else:
        start = [0, len(content) // 2, len(content) - 1500, len(content) - 8][seed // 2]  # pages, footer, its length
        content[int(rng.integers(start, len(content)))] ^= 1 << int(rng.integers(8))
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match="computed again"):
        again = extract(rows, backbone, FeatureStore(tmp_path))
    np.testing.assert_array_equal(again, true)
    assert encoded == [10, 10]
    extract(rows, backbone, FeatureStore(tmp_path))  # healed: no warning, no call
    assert encoded == [10, 10]


def test_damage_costs_the_rows_of_the_damaged_shard_alone(backbone, rows, encoded, monkeypatch, tmp_path):
    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 4)
    extract(rows, backbone, FeatureStore(tmp_path))
    shard = max(tmp_path.glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)  # the last: two rows
    shard.write_bytes(shard.read_bytes()[:-1])
    encoded.clear()
    with pytest.warns(UserWarning, match="damaged"):
        done = keep_features(rows, backbone, TAPS, FeatureStore(tmp_path), progress=False)
    assert encoded == [2]
    assert done == Extraction(rows=10, encoded=2, features=6)


def test_a_stream_is_read_little_ahead_of_what_is_encoded(backbone, encoded, monkeypatch, tmp_path):
    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 4)
    ahead = []

    def stream():
        for number in range(60):
            ahead.append(number - sum(encoded))
            yield Example(None, f"text {number}")

    features = extract(stream(), backbone, FeatureStore(tmp_path))
    assert len(features) == 60
    assert sum(encoded) == 60
    assert max(ahead) <= 4 * 6  # a few windows may be prepared while one is encoded


def test_windows_come_one_by_one(backbone, rows, monkeypatch, tmp_path):
    whole = extract(rows, backbone, FeatureStore(tmp_path))
    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 4)
    for store in (None, FeatureStore(tmp_path)):
        found = list(stream_features(iter(rows), backbone, TAPS, store=store, progress=False))
        assert [window.shape for window in found] == [(4, 3, 64), (4, 3, 64), (2, 3, 64)]
        np.testing.assert_allclose(np.concatenate(found), whole, rtol=1e-4, atol=1e-5)


def test_keeping_holds_and_reads_nothing(backbone, rows, encoded, monkeypatch, tmp_path):
    monkeypatch.setattr(FeatureStore, "_load", lambda *_: pytest.fail("features were read"))
    store = FeatureStore(tmp_path)
    rows = [*rows, rows[0]]
    assert keep_features(rows, backbone, TAPS, store, progress=False) == Extraction(11, 10, 30)
    assert keep_features(rows, backbone, TAPS, store, progress=False) == Extraction(11, 0, 0)
    again = FeatureStore(tmp_path)
    assert keep_features(iter(rows), backbone, TAPS, again, progress=False) == Extraction(11, 0, 0)
    assert encoded == [10]


def test_only_taps_that_are_missing_are_read(backbone, rows, monkeypatch, tmp_path):
    asked = []
    encode = backbone.encode_prepared

    def noting(prepared, taps, **options):
        asked.append((len(prepared), [str(tap) for tap in taps]))
        return encode(prepared, taps, **options)

    monkeypatch.setattr(backbone, "encode_prepared", noting)
    store = FeatureStore(tmp_path)
    extract(rows, backbone, store, [Tap(-1, "mean")])
    extract(rows[:3], backbone, store, [Tap(1, "text")])
    features = extract(rows, backbone, store, [Tap(-1, "mean"), Tap(1, "text"), Tap(2, "last")])
    assert asked == [(10, ["mean:-1"]), (3, ["text:1"]), (10, ["text:1", "last:2"])]
    assert len(store) == 30
    wanted = backbone.encode(rows, [Tap(-1, "mean"), Tap(1, "text"), Tap(2, "last")])
    np.testing.assert_allclose(features, wanted, rtol=1e-4, atol=1e-5)


def test_the_work_of_another_process_is_seen_before_it_is_done_twice(backbone, rows, encoded, monkeypatch, tmp_path):
    monkeypatch.setattr(windows, "WINDOW_EXAMPLES", 4)
    mine, theirs = FeatureStore(tmp_path), FeatureStore(tmp_path)
    extract(rows[:8], backbone, theirs)
    encoded.clear()
    extract(rows, backbone, mine)
    assert sum(encoded) == 2


def test_float16_features_are_the_same_whether_new_or_kept(backbone, rows, encoded, tmp_path):
    exact = extract(rows, backbone)
    encoded.clear()
    first, second = (extract(rows, backbone, FeatureStore(tmp_path, dtype="float16")) for _ in range(2))
    assert encoded == [10]
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, exact.astype(np.float16))
    np.testing.assert_allclose(first, exact, rtol=2**-11, atol=2**-24)
    # Who asks for float32 gets it, at the price of a pass; then both are kept.
    np.testing.assert_array_equal(extract(rows, backbone, FeatureStore(tmp_path)), exact)
    assert encoded == [10, 10]


def test_features_that_float16_cannot_hold_stay_as_they_are(backbone, rows, monkeypatch, tmp_path):
    encode = backbone.encode_prepared
    monkeypatch.setattr(
        backbone, "encode_prepared", lambda *args, **options: encode(*args, **options) * np.float32(1e5)
    )
    large = extract(rows, backbone)
    assert (np.abs(large) > 65504).any()
    for _ in range(2):
        features = extract(rows, backbone, FeatureStore(tmp_path, dtype="float16"))
        assert np.isfinite(features).all()
        over = (np.abs(large) >= 65520).any(axis=2)
        assert over.any()
        np.testing.assert_array_equal(features[over], large[over])


def test_shards_say_what_they_hold(backbone, checkpoint, tmp_path):
    rows = [Example(None, f"text {number}", id=None if number == 2 else f"row-{number}") for number in range(3)]
    extract(rows, backbone, FeatureStore(tmp_path))
    (shard,) = tmp_path.glob("*.parquet")
    table = pq.read_table(shard)
    assert table["id"].to_pylist() == ["row-0"] * 3 + ["row-1"] * 3 + [None] * 3
    assert table["tap"].to_pylist() == ["mean:-1", "last:2", "text:-1"] * 3
    assert set(table["fingerprint"].to_pylist()) == {backbone.fingerprint}
    assert table.schema.metadata[b"qwen_vl_classifier.backbone"] == str(checkpoint).encode()


def test_every_tap_is_every_layer_and_the_last_norm_by_every_pooling(backbone, checkpoint):
    taps = every_tap(backbone)
    assert len(set(taps)) == len(taps) == 5 * 4
    assert {tap.layer for tap in taps} == {1, 2, 3, 4, -1}
    half = Backbone.load(checkpoint, device="cpu", dtype="float32", num_layers=2)
    assert {tap.layer for tap in every_tap(half)} == {1, 2}
    half.check_taps(every_tap(half))


def test_nothing_to_encode(backbone, encoded, tmp_path):
    assert extract([], backbone, FeatureStore(tmp_path)).shape == (0, 3, backbone.hidden_size)
    assert encoded == []


def test_impossible_taps_are_refused_before_anything_is_read(backbone, encoded):
    with pytest.raises(ConfigError, match="4 layers loaded"):
        extract(iter([pytest.fail]), backbone, taps=[Tap(5, "mean")])
    assert encoded == []


def test_features_that_cannot_be_written_are_an_error(backbone, rows, monkeypatch, tmp_path):
    store = FeatureStore(tmp_path)

    def full(_number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FeatureStoreError, match="run again"):
        extract(rows, backbone, store)


@pytest.mark.parametrize("kept_before", [False, True])
def test_features_that_are_removed_during_a_run_are_not_called_kept(backbone, rows, monkeypatch, tmp_path, kept_before):
    if kept_before:
        keep_features(rows, backbone, TAPS, FeatureStore(tmp_path), progress=False)
    keep = FeatureReader.keep

    def removing(self, *arguments):
        result = keep(self, *arguments)
        for path in tmp_path.glob("*.parquet"):
            path.unlink()
        return result

    monkeypatch.setattr(FeatureReader, "keep", removing)
    with pytest.raises(FeatureStoreError, match="1 of its feature files were removed by another program"):
        keep_features(rows, backbone, TAPS, FeatureStore(tmp_path), progress=False)
