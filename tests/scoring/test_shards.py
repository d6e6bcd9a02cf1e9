"""Shards: their columns, complete or absent, and a folder that refuses what was made in another way."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.errors import ConfigError
from qwen_vl_classifier.scoring.formats import ScoredRow
from qwen_vl_classifier.scoring.jobs import RowError, Shard
from qwen_vl_classifier.scoring.shards import ScoreManifest, ShardFolder

ONE = ScoreManifest((("spam", "a" * 64),), data="d" * 64, options={"shard_size": 3, "limit": None})
TWO = dataclasses.replace(ONE, classifiers=(("spam", "a" * 64), ("eggs", "b" * 64)))
YES, NO = Prediction(1, 0.75, "yes"), Prediction(0, 0.25, "no")
GONE = RowError("image_missing", "no picture")
ROWS = [ScoredRow("x", 0, (YES,)), ScoredRow("y", 1, error=GONE), ScoredRow("z", 2, (NO,))]


@pytest.fixture
def shards(tmp_path) -> Iterator[ShardFolder]:
    folder = ShardFolder(tmp_path / "deep" / "out", ONE)
    folder.open()
    yield folder
    folder.close()


def files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    )


def reopen(shards: ShardFolder, manifest: ScoreManifest = ONE, **options) -> None:
    shards.close()
    again = ShardFolder(shards.folder, manifest)
    try:
        again.open(**options)
    finally:
        again.close()


def test_shards_sort_by_name(shards):
    for index in (2, 0, 10):
        shards.write(index, ROWS)
    assert files(Path(shards.folder) / "shards") == ["000000.parquet", "000002.parquet", "000010.parquet"]


def test_errors_are_counted(shards):
    shards.write(0, ROWS)
    assert shards.errors_in(0, rows=3) == 1


def test_a_missing_shard_is_to_be_made(shards):
    assert shards.errors_in(0, rows=3) is None


def test_a_shard_of_another_length_is_to_be_made(shards):
    shards.write(0, ROWS)
    assert shards.errors_in(0, rows=2) is None


def test_a_shard_of_other_columns_is_to_be_made(shards):
    shards.write(0, ROWS)
    pq.write_table(pa.table({"row": [0, 1, 2]}), Path(shards.folder) / "shards" / "000000.parquet")
    assert shards.errors_in(0, rows=3) is None


def test_a_shard_that_was_cut_off_is_to_be_made(shards):
    shards.write(0, ROWS)
    path = Path(shards.folder) / "shards" / "000000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert shards.errors_in(0, rows=3) is None


def test_whoever_reads_a_shard_notices_damaged_values(shards):
    shards.write(0, ROWS)
    path = Path(shards.folder) / "shards" / "000000.parquet"
    whole = path.read_bytes()
    chunk = pq.read_metadata(path).row_group(0).column(2)  # the probabilities
    last_byte = chunk.dictionary_page_offset + chunk.total_compressed_size - 1
    path.write_bytes(whole[:last_byte] + bytes([whole[last_byte] ^ 1]) + whole[last_byte + 1 :])
    with pytest.raises(OSError, match="CRC checksum"), path.open("rb") as file:
        pq.read_table(file, page_checksum_verification=True)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_leaves_nothing(shards, monkeypatch, reason):
    def full(descriptor):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "fsync", full)
    told = re.escape(f"scores cannot be written here ({os.strerror(reason)}); give a folder")
    with pytest.raises(ConfigError, match=told):
        shards.write(0, ROWS)
    assert files(Path(shards.folder)) == ["manifest.json"]


def test_a_shard_appears_only_when_it_is_on_disk(shards, monkeypatch):
    seen = []
    fsync = os.fsync

    def look(descriptor):
        fsync(descriptor)
        seen.append((os.fstat(descriptor).st_size, files(Path(shards.folder) / "shards")))

    monkeypatch.setattr(os, "fsync", look)
    shards.write(0, ROWS)
    [(size, names)] = [(size, names) for size, names in seen if any(name.startswith(".") for name in names)]
    assert size == (Path(shards.folder) / "shards" / "000000.parquet").stat().st_size
    assert [name for name in names if not name.startswith(".")] == []
    assert files(Path(shards.folder) / "shards") == ["000000.parquet"]


def test_opening_again_keeps_shards_and_clears_what_a_kill_left(shards):
    shards.write(0, ROWS)
    before = files(Path(shards.folder))
    (Path(shards.folder) / ".manifest.json.1.partial").write_text("half")
    (Path(shards.folder) / "shards" / ".000001.parquet.1.partial").write_text("half")
    reopen(shards)
    assert files(Path(shards.folder)) == before


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
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "000000.parquet").write_text("kept")
    manifest = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        reopen(shards, given)
    assert str(caught.value) == (
        f"{tmp_path}: holds scores of another run: {difference}; give another folder, or delete this one to score again"
    )
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    reopen(shards, kept)


def test_without_shards_there_is_nothing_to_mix_up(shards):
    shards.settle_token_budget(512)
    reopen(shards, TWO)
    assert files(Path(shards.folder)) == ["manifest.json"]
    assert json.loads((Path(shards.folder) / "manifest.json").read_text()) == TWO.to_json()


@pytest.mark.parametrize("text", ["", "{", "\ud800"])
def test_a_damaged_manifest_is_refused(shards, text):
    (Path(shards.folder) / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=r"its manifest\.json is damaged"):
        reopen(shards)


@pytest.mark.parametrize("content", [None, [], {}, {"options": 1, "classifiers": None}])
def test_a_manifest_of_another_form_is_refused(shards, content):
    shards.write(0, ROWS)
    (Path(shards.folder) / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="data was absent, is now dddddddddddd"):
        reopen(shards)


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path):
    for name in ("thesis.txt", ".x.partial"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'thesis\.txt' but no manifest\.json"):
        ShardFolder(tmp_path, ONE).open()
    assert files(tmp_path) == [".x.partial", "thesis.txt"]
    assert not (tmp_path / "shards").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot be written here \(Not a directory\)"):
        ShardFolder(tmp_path / "out", ONE).open()


def test_a_second_run_is_refused_while_the_first_one_lasts(shards):
    with pytest.raises(ConfigError) as caught:
        ShardFolder(shards.folder, ONE).open()
    assert re.fullmatch(
        rf"{shards.folder}: another run is writing here \(process {os.getpid()} on .+\); wait until it has ended, or "
        "give another folder",
        str(caught.value),
    )
    reopen(shards)


def test_the_lock_of_a_run_that_was_killed_does_not_last(shards):
    shards.close()
    script = (
        "import sys, os, signal; from tests.scoring.test_shards import *\n"
        "ShardFolder(sys.argv[1], ONE).open(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", script, shards.folder], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    reopen(shards)


def test_resume_wants_something_to_resume(tmp_path, shards):
    with pytest.raises(ConfigError, match="nothing to resume; leave out --resume"):
        ShardFolder(tmp_path / "new", ONE).open(resume=True)
    assert not (tmp_path / "new").exists()
    reopen(shards, resume=True)


def test_the_first_token_budget_counts(shards):
    assert shards.settle_token_budget(512) == 512
    assert shards.settle_token_budget(1024) == 512
    assert ShardFolder(shards.folder, ONE).settle_token_budget(2048) == 512


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
def test_a_survey_counts_what_is_there(tmp_path, form):
    shards = ShardFolder(tmp_path, dataclasses.replace(ONE, format=form))
    for index in (0, 2):
        shards.write(index, ROWS)
    (tmp_path / "shards" / f"000003.{form}").write_bytes(b"damaged")
    there, rows, errors = shards.survey(Shard(index, 3 * index, 3, ()) for index in range(5))
    assert (list(there), rows, errors) == ([1, 0, 1, 0, 0], 6, 2)


def test_scores_in_a_store(tmp_path):
    pytest.importorskip("fsspec")
    shards = ShardFolder("memory://test-scores-in-a-store", ONE)
    shards.open()
    shards.write(1, ROWS)
    assert shards.settle_token_budget(512) == 512
    again = ShardFolder("memory://test-scores-in-a-store", ONE)
    again.open(resume=True)
    there, rows, errors = again.survey(Shard(index, 3 * index, 3, ()) for index in range(3))
    assert (list(there), rows, errors) == ([0, 1, 0], 3, 1)
    assert again.settle_token_budget(1024) == 512
    with pytest.raises(ConfigError, match="holds scores of another run: classifiers was"):
        ShardFolder("memory://test-scores-in-a-store", TWO).open()


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/shm").is_dir(), reason="only root can mount a small disk")
def test_a_small_disk_that_is_full_holds_whole_shards_alone(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        shards = ShardFolder(disk / "out", ONE)
        shards.open()
        written: list[int] = []

        def write_on() -> None:
            for index in range(100):
                shards.write(index, ROWS)
                written.append(index)

        with pytest.raises(ConfigError, match=r"No space left on device.*a shard that is complete is not made again"):
            write_on()
        there, *_ = shards.survey(Shard(number, 3 * number, 3, ()) for number in range(100))
        assert 0 < sum(there) == len(written) < 100
        assert [name for name in files(disk) if name.endswith(".partial")] == []
        shards.close()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
