"""`extract` on the command line: features are kept once, under the keys that others look them up by."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwen_vl_classifier.backbone.backbone import Backbone
from qwen_vl_classifier.backbone.taps import Tap
from qwen_vl_classifier.cli.main import main
from qwen_vl_classifier.data.loading import load_examples
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore

FLAGS = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture
def data(tmp_path) -> Path:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "text": "It is red.", "id": "first"}, {"image": "a.png", "text": "It is blue."}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of examples in each call of the backbone."""
    counts = []
    encode = Backbone.encode_prepared

    def counting(self, prepared, taps, **options):
        counts.append(len(prepared))
        return encode(self, prepared, taps, **options)

    monkeypatch.setattr(Backbone, "encode_prepared", counting)
    return counts


def run(*arguments: object) -> int:
    return main(["extract", *map(str, arguments), *FLAGS])


def test_features_are_kept_for_everyone(tmp_path, data, tiny_backbone, encoded, capsys):
    store = tmp_path / "features"
    assert run(data, "--features", store, "--taps", "mean:-1, last:2") == 0
    told = capsys.readouterr().out
    assert re.fullmatch(r".*/features: 2 rows x 2 taps are kept; encoded 2 rows now, \d+ a second\n", told)
    assert encoded == [2]
    examples, taps = load_examples(data), [Tap(2, "last"), Tap(-1, "mean")]
    kept = extract_features(examples, tiny_backbone, taps, store=FeatureStore(store))
    assert encoded == [2]
    np.testing.assert_array_equal(kept, tiny_backbone.encode(examples, taps))


def test_complete_features_cost_nothing(tmp_path, data, encoded, capsys):
    store = tmp_path / "features"
    run(data, "--features", store)
    files = sorted(store.iterdir())
    capsys.readouterr()
    assert run(data, "--features", store) == 0
    told = f"{store}: nothing to do: 2 rows x 2 taps are kept already\n"
    assert capsys.readouterr().out == told
    assert encoded == [2]
    assert sorted(store.iterdir()) == files


def test_only_new_rows_are_encoded(tmp_path, data, encoded, capsys):
    store = tmp_path / "features"
    run(data, "--features", store, "--limit", 1)
    run(data, "--features", store)
    assert encoded == [1, 1]
    assert "2 rows x 2 taps are kept; encoded 1 rows now" in capsys.readouterr().out


def test_all_taps_are_every_layer_by_every_pooling(tmp_path, data, encoded, capsys):
    store = tmp_path / "features"
    assert run(data, "--features", store, "--taps", "all") == 0
    assert "2 rows x 28 taps are kept; encoded 2 rows now" in capsys.readouterr().out
    assert run(data, "--features", store, "--taps", "auto") == 0
    assert "nothing to do: 2 rows x 28 taps" in capsys.readouterr().out
    assert run(data, "--features", store, "--taps", "text:6,image:-1") == 0
    assert encoded == [2]
    (shard,) = store.iterdir()
    table = pq.read_table(shard)
    assert len(table) == 56
    assert len(set(table["tap"].to_pylist())) == 28
    assert table["id"].to_pylist() == ["first"] * 28 + [None] * 28


def test_a_flipped_bit_is_found_and_costs_its_rows(tmp_path, data, encoded, capsys):
    store = tmp_path / "features"
    run(data, "--features", store)
    (shard,) = store.iterdir()
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 4
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged; its features are computed again"):
        assert run(data, "--features", store) == 0
    assert encoded == [2, 2]
    capsys.readouterr()
    assert run(data, "--features", store) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_float16_is_kept_apart_from_float32(tmp_path, data, encoded, capsys):
    store = tmp_path / "features"
    half = ("--feature-dtype", "float16")
    assert run(data, "--features", store, *half) == 0
    assert run(data, "--features", store, *half) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run(data, "--features", store) == 0  # float16 does not answer for float32
    assert encoded == [2, 2]
    assert run(data, "--features", tmp_path / "exact") == 0
    assert run(data, "--features", tmp_path / "exact", *half) == 0  # but float32 does for float16
    assert encoded == [2, 2, 2]


def test_training_finds_what_was_kept(tmp_path, data, encoded):
    rows = [{"image": None, "text": f"text {number}", "label": number % 2} for number in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = ("--features", tmp_path / "features", "--feature-dtype", "float16")
    assert run(data, *kept, "--taps", "auto") == 0
    train = ("train", data, "--out", tmp_path / "classifier", "--epochs", "1", *kept, *FLAGS)
    assert main([*map(str, train)]) == 0
    assert encoded == [20]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--taps", "mean"), "tap 'mean': write it as POOLING:LAYER"),
        (("--taps", "mean:99"), "tap mean:99: builtin:tiny has"),
        (("--text-column", "claim"), "has no column 'claim'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, data, flags, message, capsys):
    assert run(data, "--features", tmp_path / "features", *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("qwen-vl-classifier extract: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_store_must_be_named(data, capsys):
    with pytest.raises(SystemExit) as caught:
        run(data)
    assert caught.value.code == 2
    assert "--features" in capsys.readouterr().err
