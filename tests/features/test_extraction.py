"""extract_features: each example at most once in a store's life, whatever was killed or damaged in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier import Backbone, Example, FeatureStore, Tap, extract_features
from qwen_vl_classifier.backbone import planning
from qwen_vl_classifier.errors import ConfigError, FeatureStoreError
from qwen_vl_classifier.features.store import feature_key
from tests import nano

ROOT = Path(__file__).resolve().parents[2]
TAPS = [Tap(-1, "mean"), Tap(2, "last"), Tap(-1, "text")]


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
    kept = store.get(feature_key(backbone.fingerprint, TAPS[1], backbone.prepare(rows[3:4])[0]))
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
    keys = [feature_key(fingerprint, TAPS[0], item) for item in prepared]
    keys += [feature_key(fingerprint, tap, prepared[0]) for tap in (Tap(-1, "last"), Tap(1, "mean"))]
    keys += [feature_key("0" * 64, TAPS[0], prepared[0])]
    assert len(set(keys)) == len(keys) == 8
    assert {len(name) for name in keys} == {32}
    again = backbone.prepare([Example(picture.copy(), "text", label=1, id="x")])[0]
    assert feature_key(fingerprint, TAPS[0], again) == keys[0]


def test_a_store_serves_backbones_side_by_side(backbone, checkpoint, rows, encoded, tmp_path):
    store = FeatureStore(tmp_path)
    extract(rows, backbone, store)
    smaller = Backbone.load(checkpoint, device="cpu", dtype="float32", max_pixels=3136)
    assert smaller.fingerprint != backbone.fingerprint
    features = extract(rows, smaller, store)
    np.testing.assert_allclose(features, smaller.encode(rows, TAPS), rtol=1e-4, atol=1e-5)
    assert len(store) == 60


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_features_are_computed_again_once(backbone, rows, encoded, tmp_path, damage):
    true = extract(rows, backbone, FeatureStore(tmp_path))
    (shard,) = tmp_path.glob("*.parquet")
    content = bytearray(shard.read_bytes())
    if damage == "truncate":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 0x10
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match="computed again"):
        again = extract(rows, backbone, FeatureStore(tmp_path))
    np.testing.assert_array_equal(again, true)
    assert encoded == [10, 10]
    extract(rows, backbone, FeatureStore(tmp_path))  # healed: no warning, no call
    assert encoded == [10, 10]


def test_a_stream_is_read_a_window_at_a_time(backbone, encoded, monkeypatch, tmp_path):
    monkeypatch.setattr(planning, "_WINDOW", 4)
    read = []

    def stream():
        for number in range(10):
            read.append((number, list(encoded)))
            yield Example(None, f"text {number}")

    features = extract(stream(), backbone, FeatureStore(tmp_path))
    assert len(features) == 10
    assert encoded == [4, 4, 2]
    assert read[4] == (4, [4])  # the first window was encoded before the fifth example was read


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


KILLED = """
import os, sys, time
os.environ["HF_HUB_OFFLINE"] = "1"
from qwen_vl_classifier import Backbone, Example, FeatureStore, Tap, extract_features
from qwen_vl_classifier.backbone import planning

planning._WINDOW = 4
written = 0

def hang_in_the_third(number, sync=os.fsync):
    global written
    written += 1
    if written == 3:
        print("writing the third window", flush=True)
        time.sleep(600)
    sync(number)

os.fsync = hang_in_the_third
backbone = Backbone.load(sys.argv[1], device="cpu", dtype="float32")
rows = (Example(None, f"text {number}") for number in range(20))
extract_features(rows, backbone, [Tap(-1, "mean")], store=FeatureStore(sys.argv[2]), progress=False)
"""


def test_a_killed_run_loses_no_more_than_the_window_in_flight(backbone, checkpoint, encoded, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing the third window\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".parquet", ".parquet", ".partial"]
    rows = [Example(None, f"text {number}") for number in range(20)]
    store = FeatureStore(tmp_path)
    assert len(store) == 8
    features = extract(rows, backbone, store, [Tap(-1, "mean")])
    assert sum(encoded) == 12
    np.testing.assert_allclose(features, backbone.encode(rows, [Tap(-1, "mean")]), rtol=1e-4, atol=1e-5)
