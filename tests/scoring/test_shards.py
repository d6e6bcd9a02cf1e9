"""Shards: their columns, complete or absent, and a folder that refuses what was made in another way."""

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_vl_classifier.data.example import Prediction
from qwen_vl_classifier.errors import ConfigError, ScoringError
from qwen_vl_classifier.files.locations import Folder
from qwen_vl_classifier.scoring.formats import ScoredRow
from qwen_vl_classifier.scoring.jobs import RowError, Shard
from qwen_vl_classifier.scoring.manifest import ScoreManifest
from qwen_vl_classifier.scoring.shards import ShardFolder

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
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(name for name in names if not name.startswith("digests/0"))


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


def survey(shards: ShardFolder, *sizes: int, **options):
    """Look at as many shards as there are sizes, each of which is a number of rows."""
    return shards.survey((Shard(index, 0, rows, ()) for index, rows in enumerate(sizes)), **options)


def test_errors_are_counted(shards):
    shards.write(0, ROWS)
    found = survey(shards, 3, 3)
    assert (list(found.there), found.rows, found.errors, found.damaged) == ([1, 0], 3, 1, [])


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
    (tmp_path / "digests").mkdir()
    (tmp_path / "digests" / f"000000-{'0' * 64}-4-0").touch()
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
    found = survey(shards, *[3] * 5)
    assert (list(found.there), found.rows, found.errors, found.damaged) == ([1, 0, 1, 0, 0], 6, 2, [3])


def test_scores_in_a_store(caplog):
    fsspec = pytest.importorskip("fsspec")
    url = "memory://test-scores-in-a-store"
    shards = ShardFolder(url, ONE)
    shards.open()
    for index in (1, 2, 3):
        shards.write(index, ROWS)
    assert shards.settle_token_budget(512) == 512
    again = ShardFolder(url, ONE)
    again.open(resume=True)
    found = survey(again, 3, 3, 3, 3)
    assert (list(found.there), found.rows, found.errors) == ([0, 1, 1, 1], 9, 3)
    assert again.settle_token_budget(1024) == 512
    with pytest.raises(ConfigError, match="holds scores of another run: classifiers was"):
        ShardFolder(url, TWO).open()

    store = fsspec.filesystem("memory")
    paths = [f"/test-scores-in-a-store/shards/{index:06d}.parquet" for index in (1, 2)]
    store.pipe_file(paths[0], store.cat_file(paths[0])[:-1])  # of another size
    store.pipe_file(paths[1], bytes(len(store.cat_file(paths[1]))))  # of the same
    assert survey(again, 3, 3, 3, 3).damaged == [1]
    found = survey(again, 3, 3, 3, 3, verify=True)
    assert (list(found.there), found.damaged) == ([0, 0, 0, 1], [1, 2])
    again.set_aside(found.damaged)
    assert [path.rpartition("/")[2][:6] for path in store.find("/test-scores-in-a-store/damaged")] == [
        "000001",
        "000002",
    ]
    with pytest.raises(
        ScoringError, match=r"during the run: shards/000001\.parquet, shards/000002\.parquet; run again"
    ):
        again.confirm(Shard(index, 0, 3, ()) for index in (1, 2, 3))


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

        with pytest.raises(ConfigError, match=r"No space left on device.*finished shards are kept"):
            write_on()
        assert 0 < sum(survey(shards, *[3] * 100).there) == len(written) < 100
        assert [name for name in files(disk) if name.endswith(".partial")] == []
        shards.close()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("flips", [100, pytest.param(4000, marks=pytest.mark.soak)])
def test_no_flipped_bit_passes(tmp_path, form, flips):
    """Of pages, of the footer, of lines and values: nothing parses a shard before its bytes are compared."""
    shards = ShardFolder(tmp_path, dataclasses.replace(ONE, format=form))
    for index in range(flips):
        shards.write(index, ROWS)
    draws = random.Random(0)
    for path in (tmp_path / "shards").iterdir():
        content, status = bytearray(path.read_bytes()), path.stat()
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk does that loses a bit
    found = survey(shards, *[3] * flips)
    assert (sum(found.there), found.rows, found.damaged) == (0, 0, list(range(flips)))


def spoilt_by(spoil: str, path: Path) -> None:
    """Put something else in the place of a file."""
    content = path.read_bytes()
    path.unlink()
    if spoil == "folder":
        path.mkdir()
    elif spoil == "pipe":
        os.mkfifo(path)
    elif spoil == "device":
        path.symlink_to("/dev/zero")
    elif spoil == "circle":
        path.symlink_to(path.name)
    else:
        path.write_bytes({"empty": b"", "longer": content + b"\n", "cut": content[:-1], "garbage": bytes(9)}[spoil])


@pytest.mark.parametrize("spoil", ["empty", "longer", "cut", "garbage", "folder", "pipe", "device", "circle"])
def test_what_is_no_sound_shard_is_set_aside_by_name(shards, caplog, spoil):
    for index in range(3):
        shards.write(index, ROWS)
    place = Path(shards.folder)
    spoilt_by(spoil, place / "shards" / "000001.parquet")
    found = survey(shards, 3, 3, 3)
    assert (list(found.there), found.rows, found.errors, found.damaged) == ([1, 0, 1], 6, 2, [1])
    shards.set_aside(found.damaged)
    assert caplog.messages == [f"{place}: damaged, set aside in damaged/ and scored again: shards/000001.parquet"]
    assert len(list((place / "damaged").iterdir())) == 1
    shards.write(1, ROWS)
    assert list(survey(shards, 3, 3, 3).there) == [1, 1, 1]


@pytest.mark.parametrize(
    "name", ["000001", "000001-", f"000001-{'a' * 64}-1-0", f"000001-{'a' * 63}-2134-1", f"1-{'a' * 64}-1-{'9' * 5000}"]
)
def test_a_digest_that_is_damaged_or_gone_costs_its_shard(shards, name):
    for index in range(2):
        shards.write(index, ROWS)
    [digest] = (Path(shards.folder) / "digests").glob("000001-*")
    if len(name) < 200:
        digest.rename(digest.with_name(name))
    else:
        digest.unlink()
    assert survey(shards, 3, 3).damaged == [1]


def test_a_digest_without_its_shard_is_what_a_kill_leaves_and_no_damage(shards):
    shards.write(0, ROWS)
    (Path(shards.folder) / "shards" / "000000.parquet").unlink()
    found = survey(shards, 3)
    assert (list(found.there), found.damaged) == ([0], [])


def test_shards_without_any_digest_are_refused(shards):
    shards.write(0, ROWS)
    shutil.rmtree(Path(shards.folder) / "digests")
    with pytest.raises(ConfigError, match=r"holds shards but no digests/, so damaged shards cannot be recognised; put"):
        reopen(shards)


def test_bytes_that_differ_from_another_machine_are_sound_too(shards):
    """Two runs in a store, which has no locks: digests of both are there, and the shard of either."""
    shards.write(0, ROWS[:2])
    shards.write(0, ROWS)
    assert len(list((Path(shards.folder) / "digests").iterdir())) == 2
    assert survey(shards, 3).errors == 1


def test_the_time_of_a_shard_is_not_looked_at(shards):
    for index, moment in enumerate([0, 2**32]):
        shards.write(index, ROWS)
        os.utime(Path(shards.folder) / "shards" / f"00000{index}.parquet", (moment, moment))
    assert list(survey(shards, 3, 3).there) == [1, 1]


def test_a_shard_that_cannot_be_read_now_is_not_taken_for_damaged(shards, monkeypatch):
    shards.write(0, ROWS)

    def out_of_files(*arguments, **options):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Folder, "digest", out_of_files)
    with pytest.raises(ConfigError, match=r"Too many open files"):
        survey(shards, 3)


@pytest.mark.parametrize("gone", ["manifest.json", "shards", "shards/000000.parquet", "digests"])
def test_what_is_removed_during_a_run_is_noticed_at_its_end(shards, gone):
    shards.write(0, ROWS)
    path = Path(shards.folder) / gone
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(ScoringError, match=r"removed or changed by another program during the run: .*; run again"):
        shards.confirm([Shard(0, 0, 3, ())])


def test_another_manifest_or_a_cut_shard_is_noticed_at_the_end(shards):
    shards.write(0, ROWS)
    shards.confirm([Shard(0, 0, 3, ())])
    for name in ("shards/000000.parquet", "manifest.json"):
        (Path(shards.folder) / name).write_text("{}")
    with pytest.raises(ScoringError, match=r"during the run: manifest\.json, shards/000000\.parquet; run again"):
        shards.confirm([Shard(0, 0, 3, ())])


@pytest.mark.parametrize("anew", [False, True])
def test_nothing_is_written_into_a_folder_that_is_not_the_runs_any_more(shards, anew):
    worker = ShardFolder(shards.folder, ONE, run=shards.run)
    worker.write(0, ROWS)
    shutil.rmtree(shards.folder)
    if anew:
        other = ShardFolder(shards.folder, TWO)
        other.open()
        (Path(shards.folder) / ".manifest.json.0.partial").write_text("of the other run")
    for folder in (worker, shards):
        with pytest.raises(ScoringError, match="was removed or replaced by another run while this run wrote there"):
            folder.write(1, ROWS)
        folder.sweep()
    with pytest.raises(ScoringError, match="was removed or replaced"):
        shards.confirm([])
    if anew:
        assert files(Path(shards.folder)) == [".manifest.json.0.partial", "manifest.json"]
        other.close()
    else:
        assert not Path(shards.folder).exists()


def test_a_copy_of_the_folder_is_not_the_folder_that_is_locked(shards):
    place = Path(shards.folder)
    place.rename(place.with_name("moved"))
    shutil.copytree(place.with_name("moved"), place)
    with pytest.raises(ScoringError, match="was removed or replaced"):
        shards.write(0, ROWS)


@pytest.mark.parametrize("name", ["shards", "digests", "damaged"])
def test_nothing_is_written_through_a_link_to_another_folder(shards, tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir()
    shards.close()
    (Path(shards.folder) / name).symlink_to(victim)
    with pytest.raises(ConfigError, match=rf"{name}: is a link or a file, expected a folder; remove it"):
        ShardFolder(shards.folder, ONE).open()
    assert list(victim.iterdir()) == []


def test_links_in_the_place_of_files_are_replaced_and_not_followed(shards, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    place = Path(shards.folder)
    (place / "shards").mkdir()
    for name in ("shards/000000.parquet", "token_budget.json"):
        (place / name).symlink_to(victim)
    with pytest.raises(ConfigError, match=r"its token_budget\.json is damaged"):
        shards.settle_token_budget(512)
    shards.write(0, ROWS)
    assert survey(shards, 3).errors == 1
    assert victim.read_text() == "precious"


def test_a_token_budget_that_is_a_link_to_nothing_is_damaged(shards, tmp_path):
    (Path(shards.folder) / "token_budget.json").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"its token_budget\.json is damaged"):
        shards.settle_token_budget(512)
    assert not (tmp_path / "nothing").exists()


DEEP = b"[" * 100_000 + b"]" * 100_000
DAMAGED_JSON = [
    b"",
    b"{",
    DEEP,
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b"\xff\xfe",
    b"9" * 5000,
    b"\0" * 100,
    b"x" * (9 << 20),
]
NO_BUDGETS = [
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'"512"',
    b"NaN",
    b"Infinity",
    b"1e400",
    b"512.0",
    b"0",
    b"-1",
    b"1e9",
    b"10000000000",
]


@pytest.mark.parametrize("content", [*DAMAGED_JSON, *NO_BUDGETS], ids=lambda content: content[:12].decode("latin-1"))
def test_a_damaged_token_budget_is_one_line(shards, content):
    (Path(shards.folder) / "token_budget.json").write_bytes(content)
    told = r"[^\n]*: its token_budget\.json is damaged; expected a whole number from 1; [^\n]*"
    with pytest.raises(ConfigError) as caught:
        shards.settle_token_budget(512)
    assert re.fullmatch(told, str(caught.value))
    with pytest.raises(ConfigError, match=told):
        reopen(shards)


@pytest.mark.parametrize("content", DAMAGED_JSON, ids=lambda content: content[:12].decode("latin-1"))
def test_a_damaged_manifest_is_one_line(shards, content):
    (Path(shards.folder) / "manifest.json").write_bytes(content)
    shards.write(0, ROWS)
    with pytest.raises(ConfigError, match=r"its manifest\.json is damaged|holds scores of another run"):
        reopen(shards)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "circle"])
@pytest.mark.parametrize("name", ["manifest.json", "token_budget.json"])
def test_what_is_no_file_is_one_line(shards, name, kind):
    shards.settle_token_budget(512)
    spoilt_by(kind, Path(shards.folder) / name)
    with pytest.raises(ConfigError, match=rf"its {re.escape(name)} is damaged"):
        reopen(shards)


def test_what_a_foreign_manifest_says_is_shown_on_one_line_and_bounded(shards):
    shards.write(0, ROWS)
    nasty = {"data": "\x1b[2J\n" * 10_000, "classifiers": {"\x1b]0;x\x07": [1] * 10_000}, "options": {"\r": "\u202e"}}
    (Path(shards.folder) / "manifest.json").write_text(json.dumps(nasty))
    with pytest.raises(ConfigError) as caught:
        reopen(shards)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 10_000
