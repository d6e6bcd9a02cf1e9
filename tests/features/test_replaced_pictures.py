"""A picture or a row that is replaced in place, with the size and times of the one before, is never taken for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_vl_classifier.config.score import ScoreConfig
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.features.extraction import extract_features
from qwen_vl_classifier.features.store import FeatureStore
from qwen_vl_classifier.images.identity import picture_identity
from qwen_vl_classifier.scoring.run import score


def replace_in_place(path: Path, content: bytes) -> None:
    """Write other bytes to the same inode, and set its times back."""
    before = path.stat()
    assert len(content) == before.st_size
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


@pytest.fixture
def rows(tmp_path):
    """Write a picture and a row about it; return the file of the row."""
    picture(tmp_path / "a.bmp", "red")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"image": "a.bmp", "text": "It is red."}) + "\n")
    return data


def picture(path: Path, colour: str) -> bytes:
    Image.new("RGB", (60, 60), colour).save(path)
    return path.read_bytes()


def test_no_kept_feature_is_that_of_the_picture_before(rows, tiny_backbone, tiny_classifier, tmp_path):
    store, taps, path = FeatureStore(tmp_path / "features"), [tiny_classifier.tap], tmp_path / "a.bmp"
    example = [{"image": str(path), "text": "It is red."}]
    before = extract_features(example, tiny_backbone, taps, store=store, progress=False)
    identity = picture_identity(path)
    replace_in_place(path, picture(tmp_path / "b.bmp", "blue"))
    after = extract_features(example, tiny_backbone, taps, store=FeatureStore(store.folder), progress=False)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_array_equal(after, extract_features(example, tiny_backbone, taps, progress=False))
    assert picture_identity(path) != identity


def test_scores_do_not_come_from_features_of_the_picture_before(rows, tiny_classifier, tmp_path):
    config = ScoreConfig(features=str(tmp_path / "features"), format="jsonl")
    found = []
    for out, colour in (("one", "red"), ("two", "blue")):
        replace_in_place(tmp_path / "a.bmp", picture(tmp_path / "b.bmp", colour))
        score(tiny_classifier, rows, tmp_path / out, config=config, progress=False)
        (shard,) = (tmp_path / out).rglob("*.jsonl")
        found.append(json.loads(shard.read_text())["probability"])
    assert found[0] != found[1]


def test_rows_that_were_changed_are_other_data(rows, tiny_classifier, tmp_path):
    score(tiny_classifier, rows, tmp_path / "out", progress=False)
    replace_in_place(rows, rows.read_bytes().replace(b"red", b"odd"))
    with pytest.raises(ConfigError, match="data"):
        score(tiny_classifier, rows, tmp_path / "out", progress=False)
