"""Shards: their columns, complete or absent, and a folder that refuses what was made in another way."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.scoring.formats import RowError, ScoredRow
from qwen_vl_classifier.scoring.parts import Shard
from qwen_vl_classifier.scoring.shards import ScoreManifest, ShardFolder

ONE = ScoreManifest((("spam", "a" * 64),), data="d" * 64, options={"shard_size": 3, "limit": None})
TWO = dataclasses.replace(ONE, classifiers=(("spam", "a" * 64), ("eggs", "b" * 64)))
YES, NO = Prediction(1, 0.75, "yes"), Prediction(0, 0.25, "no")
ROWS = [ScoredRow("x", 0, (YES,)), ScoredRow("y", 1, error=RowError("image_missing", "no picture")), ScoredRow("z", 2, (NO,))]


@pytest.fixture
def shards(tmp_path) -> ShardFolder:
    folder = ShardFolder(tmp_path / "deep" / "out", ONE)
    folder.open()
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_shards_sort_by_name(shards):
    for index in (2, 0, 10):
        shards.write(index, ROWS)
    assert files(shards.folder / "shards") == ["000000.parquet", "000002.parquet", "000010.parquet"]


def test_errors_are_counted(shards):
    shards.write(0, ROWS)
    assert shards.errors_in(0, rows=3) == 1


def test_a_missing_shard_is_to_be_made(shards):
    assert shards.errors_in(0, rows=3) is None


def test_a_shard_of_another_length_is_to_be_made(shards):
    shards.write(0, ROWS)
    assert shards.errors_in(0, rows=2) is None


def test_a_shard_of_other_columns_is_to_be_made(shards):
    pq.write_table(pa.table({"row": [0, 1, 2]}), shards.folder / "shards" / "000000.parquet")
    assert shards.errors_in(0, rows=3) is None


def test_every_damage_to_values_is_noticed(shards):
    shards.write(0, ROWS)
    path = shards.folder / "shards" / "000000.parquet"
    whole = path.read_bytes()
    chunk = pq.read_metadata(path).row_group(0).column(2)  # the probabilities
    last_byte = chunk.dictionary_page_offset + chunk.total_compressed_size - 1
    path.write_bytes(whole[:last_byte] + bytes([whole[last_byte] ^ 1]) + whole[last_byte + 1 :])
    assert shards.errors_in(0, rows=3) is None
    path.write_bytes(whole[:-20])
    assert shards.errors_in(0, rows=3) is None
    path.write_bytes(whole)
    assert shards.errors_in(0, rows=3) == 1


def test_a_write_that_fails_leaves_nothing(shards, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot be written here \(No space left on device\); give a folder"):
        shards.write(0, ROWS)
    assert files(shards.folder) == ["manifest.json"]


def test_a_shard_appears_only_when_it_is_on_disk(shards, monkeypatch):
    seen = []
    fsync = os.fsync

    def look(descriptor):
        fsync(descriptor)
        seen.append((os.fstat(descriptor).st_size, files(shards.folder / "shards")))

    monkeypatch.setattr(os, "fsync", look)
    shards.write(0, ROWS)
    [(size, names)] = seen
    assert size == (shards.folder / "shards" / "000000.parquet").stat().st_size
    assert [name for name in names if not name.startswith(".")] == []
    assert files(shards.folder / "shards") == ["000000.parquet"]


def test_opening_again_keeps_shards_and_clears_what_a_kill_left(shards):
    shards.write(0, ROWS)
    before = files(shards.folder)
    (shards.folder / ".manifest.json.1.partial").write_text("half")
    (shards.folder / "shards" / ".000001.parquet.1.partial").write_text("half")
    ShardFolder(shards.folder, ONE).open()
    assert files(shards.folder) == before


@pytest.mark.parametrize(
    ("kept", "given", "difference"),
    [
        (
            ONE,
            dataclasses.replace(ONE, classifiers=(("spam", "b" * 64),)),
            "classifiers was probability by aaaaaaaaaaaa, is now probability by bbbbbbbbbbbb",
        ),
        (
            TWO,
            dataclasses.replace(TWO, classifiers=TWO.classifiers[::-1]),
            "classifiers was probability_spam by aaaaaaaaaaaa, probability_eggs by bbbbbbbbbbbb, "
            "is now probability_eggs by bbbbbbbbbbbb, probability_spam by aaaaaaaaaaaa",
        ),
        (
            TWO,
            dataclasses.replace(TWO, classifiers=(TWO.classifiers[0], ("ham", "b" * 64))),
            "classifiers was probability_spam by aaaaaaaaaaaa, probability_eggs by bbbbbbbbbbbb, "
            "is now probability_spam by aaaaaaaaaaaa, probability_ham by bbbbbbbbbbbb",
        ),
        (ONE, dataclasses.replace(ONE, data="e" * 64), "data was dddddddddddd, is now eeeeeeeeeeee"),
        (ONE, dataclasses.replace(ONE, data="d" * 63 + "e"), "data was dddddddddddd, is now dddddddddddd"),
        (
            ONE,
            dataclasses.replace(ONE, options={"shard_size": 4, "limit": 9, "text": "t"}),
            "shard_size was 3, is now 4; limit was None, is now 9; text was absent, is now 't'",
        ),
    ],
)
def test_what_was_made_in_another_way_is_refused_by_name(tmp_path, kept, given, difference):
    shards = ShardFolder(tmp_path, kept)
    shards.open()
    (tmp_path / "shards" / "000000.parquet").write_text("kept")
    manifest = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        ShardFolder(tmp_path, given).open()
    assert str(caught.value) == (
        f"{tmp_path}: holds scores of another run: {difference}; give another folder, or delete this one to score again"
    )
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    ShardFolder(tmp_path, kept).open()


def test_without_shards_there_is_nothing_to_mix_up(shards):
    ShardFolder(shards.folder, TWO).open()
    assert json.loads((shards.folder / "manifest.json").read_text()) == TWO.to_json()


@pytest.mark.parametrize("text", ["", "{", "\ud800"])
def test_a_damaged_manifest_is_refused(shards, text):
    (shards.folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"its manifest\.json is damaged"):
        shards.open()


@pytest.mark.parametrize("content", [None, [], {}, {"options": 1, "classifiers": None}])
def test_a_manifest_of_another_form_is_refused(shards, content):
    shards.write(0, ROWS)
    (shards.folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="data was absent, is now dddddddddddd"):
        shards.open()


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path):
    for name in ("thesis.txt", ".x.partial"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'thesis\.txt' but no manifest\.json"):
        ShardFolder(tmp_path, ONE).open()
    assert files(tmp_path) == [".x.partial", "thesis.txt"]
    assert not (tmp_path / "shards").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot be written here \(File exists\)"):
        ShardFolder(tmp_path / "out", ONE).open()
